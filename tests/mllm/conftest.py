"""No test here may use what transformers calls deprecated: it warns, or it logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error::FutureWarning"))


class Deprecations(logging.Handler):
    """Messages of a logger that call something deprecated."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage():
            self.found.append(record.getMessage())


@pytest.fixture(autouse=True)
def deprecations() -> Iterator[list[str]]:
    """What transformers logs as deprecated during a test, which fails it."""
    handler, logger = Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    if "transformers" in sys.modules:
        logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # each is logged once a process
    yield handler.found
    logger.removeHandler(handler)
    assert not handler.found
