"""Networks of full size in bfloat16 on frames of 392 x 518, shapes alone: launches, waits, and bytes that are alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from device_runtime import why_not

from full_size import FEW_BLOCKS, full_size
from geoaccel.merging import HTTM, Asymmetric, FastVGGT

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

GIB = 2**30
METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "asymmetric": Asymmetric,
    "fastvggt": FastVGGT,
    "httm": HTTM,
}

# Backbone, method, frames: at most so many launches and waits, and GiB at the peak, weights and images with them.
# Forwards over 8 frames are not the first.
ROWS = {
    ("vggt", "dense", 8): (1150, 1, 4.9),
    ("pi3", "dense", 8): (820, 3, 2.2),
    ("vggt", "dense", 100): (3900, 3, 7.0),
    ("pi3", "dense", 100): (3400, 3, 4.1),
    ("vggt", "asymmetric", 100): (4000, 2, 7.0),
    ("vggt", "fastvggt", 100): (5000, 6, 7.0),
}
# Minutes each: the groups of HTTM are numbers here, too. At most 40,000 launches are wanted at a thousand frames.
SLOW = {
    ("vggt", "httm", 100): (5600, 27, 7.0),
    ("vggt", "dense", 1000): (28_500, 1, 37.2),
    ("vggt", "httm", 1000): (30_200, 27, 37.2),
}
# Rows under a memory limit belong here, too: `full_size` passes options on to the forward.


@pytest.mark.parametrize(
    ("backbone", "method", "frames"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_full_size(backbone: str, method: str, frames: int) -> None:
    found = full_size(backbone, METHODS[method](), frames, forwards=1 + (frames < 100))
    launches, waits, peak = (ROWS | SLOW)[backbone, method, frames]
    assert found.waits <= waits, str(found)
    assert 0.9 * launches <= found.launches <= launches, str(found)
    assert 0.9 * peak <= found.peak / GIB <= peak, str(found)


KNOBS: tuple[dict[str, Any], ...] = ({}, {"keys": 12})


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize(("backbone", "layers"), [("vggt", FEW_BLOCKS["vggt"]["depth"]), ("pi3", 2)])
def test_what_asymmetric_adds_to_a_layer(backbone: str, layers: int, knobs: dict[str, Any]) -> None:
    """Where flash attention takes keys in two groups, the second by halves of the queries; not by the first forward."""
    few: dict[str, Any] = {"forwards": 2, "config": FEW_BLOCKS[backbone], "heads": ("camera",)}
    dense, ours = (full_size(backbone, method, 100, **few) for method in (None, Asymmetric(**knobs)))
    assert 0 < ours.launches - dense.launches <= 6 * layers
    assert ours.waits == dense.waits


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("frames", [2, 9, 16, 64, 80, 100, 115, 128, 256])
@pytest.mark.parametrize("backbone", ["vggt", "pi3"])
def test_asymmetric_needs_no_byte_more_than_dense(backbone: str, frames: int, knobs: dict[str, Any]) -> None:
    """By cameras alone: the maps of dense heads would hide what happens in the blocks."""
    few: dict[str, Any] = {"forwards": 2, "config": FEW_BLOCKS[backbone], "heads": ("camera",)}
    dense, ours = (full_size(backbone, method, frames, **few) for method in (None, Asymmetric(**knobs)))
    assert ours.peak <= dense.peak, f"{ours}; dense {dense}"
