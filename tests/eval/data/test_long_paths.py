"""Long paths: exact, the same however they are rendered, and shaped as their names say."""

from __future__ import annotations

import pytest
import torch

from geoaccel.cameras import invert_rigid, project_points
from geoaccel.errors import UserError
from geoaccel.eval.data.long_paths import long_path

SIZE = (28, 28)


def centres(path: str, frames: int = 60, seed: int = 1000) -> torch.Tensor:
    return invert_rigid(long_path(seed, path, frames=frames, size=SIZE).cameras.cam_from_world[0])[:, :3, 3]


def test_a_frame_is_the_same_in_any_range() -> None:
    path = long_path(1000, "loop", frames=40, size=SIZE)
    whole, part = path.render(0, 12), path.render(7, 9)
    assert torch.equal(whole.images[:, 7:9], part.images)
    assert torch.equal(whole.depth[:, 7:9], part.depth)
    assert len(path) == 40


@pytest.mark.parametrize("name", ["loop", "two-loops", "corridor"])
def test_points_lie_where_depth_and_cameras_say(name: str) -> None:
    batch = long_path(1001, name, frames=20, size=SIZE).render(9, 11)
    for frame in range(2):
        seen = batch.valid[0, frame]
        points = batch.points_world[0, frame][seen]
        pixels, z = project_points(points, batch.intrinsics[0, frame], batch.cam_from_world[0, frame])
        torch.testing.assert_close(z, batch.depth[0, frame][seen], rtol=1e-4, atol=1e-4)
        at = seen.nonzero().flip(-1) + 0.5
        torch.testing.assert_close(pixels, at.to(pixels), rtol=0, atol=0.02)


def test_loops_come_back_and_a_corridor_does_not() -> None:
    loop = centres("loop", 420)
    step = (loop[1:] - loop[:-1]).norm(dim=-1)
    assert float(step.max()) < 0.2
    again = (loop[400:] - loop[:20]).norm(dim=-1)  # 1.05 turns: the last twentieth is the first again
    assert float(again.max()) < 0.2 * float((loop.amax(0) - loop.amin(0)).max())
    two = centres("two-loops", 60)
    angle = torch.atan2(two[:, 1], two[:, 0])
    turned = (angle[1:] - angle[:-1] + 3 * torch.pi) % (2 * torch.pi) - torch.pi
    assert abs(float(turned.sum()) / (2 * torch.pi) - 2.05) < 0.05
    assert float(two[45:, 2].mean()) > float(two[:15, 2].mean())
    corridor = centres("corridor", 60)
    assert float(corridor[-1, 0] - corridor[0, 0]) == pytest.approx(18.0, abs=0.1)
    assert bool((corridor[1:, 0] > corridor[:-1, 0]).all())


def test_a_corridor_is_free_to_walk() -> None:
    batch = long_path(1000, "corridor", frames=60, size=SIZE).render(0, 60)
    seen = batch.depth[batch.valid]
    assert float(seen.min()) > 0.2
    assert len(torch.unique(batch.images[0, 30])) > 200  # there is something to see


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(UserError, match="two-loops"):
        long_path(1000, "twoloops")
