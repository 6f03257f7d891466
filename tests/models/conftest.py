"""The golden file of each backbone of ours."""

from __future__ import annotations

import pytest
from references import Golden


@pytest.fixture(scope="session")
def vggt_golden() -> Golden:
    return Golden("vggt_tiny", "vggt")


@pytest.fixture(scope="session")
def pi3_golden() -> Golden:
    return Golden("pi3_tiny", "pi3")
