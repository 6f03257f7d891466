"""A tiny checkpoint of every backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

from geoaccel.models import BACKBONES


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("weights"))
