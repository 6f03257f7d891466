"""What a forward makes the host wait for and the device launch, against a written table.

Where a change needs fewer of either, or more for a reason: ``python tests/device/costs.py`` writes the table anew.
"""

from __future__ import annotations

import pytest
import torch
from combinations import FRAMES, METHODS, difference, photographs, prepared
from costs import complaints, measured, plain, rows, table
from device_runtime import why_not
from simulated_cuda import SimulatedCuda

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

DEPTH = 4
WAITS_A_LAYER = {
    "dense": 0,
    "alike": 0,
    "asymmetric": 0,
    "avggt": 0,
    "come": 0,
    "fastvggt": 0,
    "httm": 1,
    "litevggt": 0,
}


@pytest.mark.parametrize(("backbone", "method", "precision"), list(rows()))
def test_no_more_waits_and_launches_than_written(backbone: str, method: str, precision: str) -> None:
    found = measured(backbone, method, precision)
    said = complaints(found, table()[f"{backbone} {method} {precision}"])
    assert not said, "\n".join(said)


def test_the_table_has_every_row_and_no_other() -> None:
    assert list(table()) == [" ".join(row) for row in rows()]


@pytest.mark.parametrize("method", WAITS_A_LAYER)
def test_waits_that_methods_add_to_a_layer(method: str) -> None:
    """By two layers more."""
    row = ("vggt", method, "bfloat16")
    deeper, written = measured(*row, depth=DEPTH + 2), table()[" ".join(row)]["waits"]
    assert sum(deeper.waits.values()) - sum(written.values()) <= 2 * WAITS_A_LAYER[method]


def test_a_new_wait_is_a_complaint_with_its_line() -> None:
    """So is a kernel that is launched again and again."""
    found = measured("vggt", "httm", "bfloat16")
    written = plain(found)
    assert not complaints(found, written)
    where = next(where for where in written["waits"] if "split_outliers" in where)
    del written["waits"][where]
    most = max(written["launches"], key=written["launches"].__getitem__)
    written["launches"][most] //= 2
    waits, total, file = complaints(found, written)
    assert where in waits
    assert "launches, written are" in total
    assert file.startswith(f"{most}: ")
    assert f"{most}:" in file.partition(": ")[2]


@pytest.mark.parametrize("backbone", ["da3", "pi3", "pi3x", "vggt"])
@pytest.mark.parametrize("method", ["dense", "come", "fastvggt", "httm"])
def test_numbers_are_those_of_the_cpu(backbone: str, method: str) -> None:
    images = photographs(FRAMES, batch=2)
    with torch.no_grad():
        expected = prepared(backbone, method, "float32", "cpu")(images)
    with SimulatedCuda(), torch.no_grad():
        found = prepared(backbone, method, "float32", "cuda:0")(images.to("cuda:0"))
        assert difference(found, expected) < 1e-4, method


def test_methods_are_all_there() -> None:
    """A method that is registered has its rows."""
    from geoaccel.merging import MERGING

    assert set(MERGING) <= set(METHODS)
