"""DTU's benchmark against its rules written out pair by pair: the mask, the box and its margin, the plane, the cut."""

import numpy as np
import pytest
import torch
from torch import Tensor

from geoaccel.eval.metrics.point_protocols import PROTOCOLS

pytest.importorskip("scipy")

BOX = torch.tensor([[-30.0, -30, -5], [29, 29, 24]], dtype=torch.float64)
TABLE = torch.tensor([0.0, 0, 1, -2], dtype=torch.float64)  # what lies 2 mm above z = 0 counts


def reference(pred: Tensor, scan: Tensor, mask: Tensor, box: Tensor, cell: float, plane: Tensor) -> tuple[float, float]:
    """Accuracy and completeness as the benchmark defines them; the prediction is thin already."""
    points, low, high = pred.numpy(), *box.numpy()
    inside = [p for p in points if all(p >= low - 60) and all(p < high + 2 * 60)]
    seen = []
    for p in inside:
        index = tuple(int(i) for i in np.around((p - low) / cell))
        if all(0 <= i < n for i, n in zip(index, mask.shape, strict=True)) and mask[index]:
            seen.append(p)
    above = [q for q in scan.numpy() if q @ plane[:3].numpy() + float(plane[3]) > 0]

    def mean(origins: list, others: list) -> float:
        nearest = np.linalg.norm(np.stack(origins)[:, None] - np.stack(others)[None], axis=-1).min(axis=1)
        return float(nearest[nearest < 20].mean())

    return mean(seen, list(scan.numpy())), mean(above, inside)


def lattice(x: tuple, y: tuple, z: tuple, step: float) -> Tensor:  # [N, 3], both ends included
    axes = [torch.arange(low, high + step / 2, step, dtype=torch.float64) for low, high in (x, y, z)]
    return torch.cartesian_prod(*axes)


def box_on_a_table() -> tuple[Tensor, Tensor]:  # prediction [N, 3], scan [M, 3], mm
    """A box of 16 x 16 x 10 mm on a table of 50 x 50, scanned; and as a network may see it, uneven and in part."""
    table = lattice((-25, 25), (-25, 25), (0, 0), 2.5)
    sides = lattice((-8, 8), (-8, 8), (0, 10), 2)
    sides = sides[(sides[:, :2].abs().amax(dim=-1) == 8) | (sides[:, 2] == 10)]
    scan = torch.cat([table, sides])
    generator = torch.Generator().manual_seed(0)
    uneven = scan + 0.4 * torch.randn(len(scan), 3, generator=generator, dtype=torch.float64)
    return uneven[uneven[:, 0] < 6], scan


def scored(pred: Tensor, scan: Tensor, mask: Tensor, box: Tensor = BOX, cell: float = 1.0) -> dict[str, float]:
    found = PROTOCOLS["dtu-mvs"].score(pred, scan, obs_mask=mask, box=box, resolution=cell, ground_plane=TABLE)
    accuracy, completeness = reference(pred, scan, mask, box, cell, TABLE)
    assert found["accuracy_mean"] == pytest.approx(accuracy, rel=1e-9)
    assert found["completeness_mean"] == pytest.approx(completeness, rel=1e-9)
    assert found["chamfer_mean"] == pytest.approx((accuracy + completeness) / 2, rel=1e-9)
    return found


def test_a_box_on_a_table() -> None:
    """Points on the table are near the scanned table, though the table is left out of completeness."""
    pred, scan = box_on_a_table()
    mask = torch.ones(60, 60, 30, dtype=torch.bool)
    found = scored(pred, scan, mask)
    assert found["accuracy_mean"] < 1
    assert found["num_gt"] < len(scan)
    above = scan[scan[:, 2] > 2]
    cut = PROTOCOLS["dtu-mvs"].score(pred, above, obs_mask=mask, box=BOX)
    assert cut["accuracy_mean"] > 4 * found["accuracy_mean"]  # the scan must not be cut for accuracy


@pytest.mark.parametrize("cell", [1.0, 2.5])
def test_the_mask_decides_which_predicted_points_count(cell: float) -> None:
    pred, scan = box_on_a_table()
    shape = [int(n / cell) + 1 for n in BOX[1] - BOX[0]]
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = scored(pred, scan, mask, cell=cell)
    assert 0 < found["num_pred"] < 0.7 * len(pred)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("side", "distance", "counts"),
    [("low", 59.9, True), ("low", 60.1, False), ("high", 61.0, True), ("high", 119.9, True), ("high", 120.1, False)],
)
def test_the_box_has_a_margin_that_is_twice_as_wide_above(axis: int, side: str, distance: float, counts: bool) -> None:
    """A scanned point far out, met by a predicted one that only completeness sees, and only within the margin."""
    pred, scan = box_on_a_table()
    far = torch.tensor([[0.0, 0, 12]], dtype=torch.float64)
    far[0, axis] = BOX[1, axis] + distance if side == "high" else BOX[0, axis] - distance
    mask = torch.ones(60, 60, 30, dtype=torch.bool)
    plane = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)  # all of the scan counts
    near, whole = torch.cat([pred, far + 0.3]), torch.cat([scan, far])
    near[-1, axis] = far[0, axis]
    options = {"obs_mask": mask, "box": BOX, "ground_plane": plane}
    found = PROTOCOLS["dtu-mvs"].score(near, whole, **options)
    accuracy, completeness = reference(near, whole, mask, BOX, 1.0, plane)
    assert found["completeness_mean"] == pytest.approx(completeness, rel=1e-9)
    assert found["accuracy_mean"] == pytest.approx(accuracy, rel=1e-9)
    without = PROTOCOLS["dtu-mvs"].score(pred, scan, **options)
    assert (found["num_gt"], found["num_pred"]) == (without["num_gt"] + counts, without["num_pred"])
