"""A tiny checkpoint of every backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import TINY, write_checkpoint


@pytest.fixture(scope="module", params=sorted(TINY))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("weights"))
