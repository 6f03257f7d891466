"""Tracks of a network's own tracker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import write_images
from references import Golden
from torch import nn

from geoaccel.cameras import project_points
from geoaccel.errors import UserError
from geoaccel.memory import Limit
from geoaccel.memory_plan import MemoryPlan
from geoaccel.reconstruction import reconstruct
from geoaccel.refine import with_tracks
from geoaccel.tracks import Cameras, measure_tracks, reprojection_errors, triangulate
from geoaccel.tracks.follow import check_tracker, tracker_of
from geoaccel.tracks.predicted import lift
from measure_refinement import rendered

pytest.importorskip("pycolmap")


@pytest.fixture(scope="module")
def truth():
    return rendered(1003, frames=4, size=224)


def test_what_a_tracker_gets_wrong_is_left_out(truth):
    """It follows points exactly, a fifth of them to somewhere else, and says of a tenth that they are hidden."""
    generator = torch.Generator().manual_seed(0)

    def follow(frame, pixels):
        points = lift(truth, frame, pixels.numpy())
        places = torch.stack(
            [
                project_points(points, truth.intrinsics[i].double(), truth.cam_from_world[i].double())[0]
                for i in range(len(truth))
            ]
        )
        sure = torch.ones(places.shape[:2])
        sure[:, ::10] = 0.0
        off = torch.arange(len(pixels)) % 5 == 1
        places[:, off] += 60 * torch.rand(len(truth), int(off.sum()), 2, generator=generator, dtype=torch.float64) + 20
        return places, sure

    tracks = measure_tracks(truth, follow=follow)
    assert tracks.source == "the track head"
    assert len(tracks) > 150
    assert (tracks.lengths() >= 3).mean() > 0.5
    cameras = Cameras.of(truth)
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    assert np.median(errors) < 0.5
    assert (errors < 5).mean() > 0.95


def test_the_head_of_a_tiny_network_follows_features(tmp_path: Path):
    golden = Golden("vggt_tiny", "vggt")
    network = golden.network()
    images = torch.rand(3, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([[20.5, 30.5], [50.5, 10.5]], dtype=torch.float64)
    places, sure = tracker_of(network, images)(1, queries)
    order = [1, 0, 2]
    with torch.inference_mode():
        expected = network(images[order][None], query_points=(queries - 0.5).float()[None], heads=("track",))
    torch.testing.assert_close(places[order], expected["track"][0].double() + 0.5)
    torch.testing.assert_close(sure[order], (expected["vis"] * expected["conf"])[0])
    torch.testing.assert_close(places[1], queries, rtol=0, atol=1e-4)
    scene = reconstruct(write_images(tmp_path / "photos", 3), model=network, size=56, tracks="head")
    assert scene.tracks is not None
    assert scene.tracks.source == "the track head"


def test_tracks_keep_to_the_plan_that_counts_their_head(monkeypatch: pytest.MonkeyPatch) -> None:
    network, asked, ran = Golden("vggt_tiny", "vggt").network(), [], []
    images = torch.rand(4, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    whole = reconstruct(images, model=network, tracks="head").tracks
    plan = MemoryPlan(tokens=50, frames=2)

    def check(model: nn.Module, *, limit: Limit, **_: object) -> MemoryPlan:
        asked.append(limit.heads)
        return plan

    monkeypatch.setattr("geoaccel.memory.check_memory", check)
    (encoder,) = (module for module in network.modules() if hasattr(module, "memory_plan"))
    network.register_forward_pre_hook(
        lambda _, args, given: ran.append((given["heads"], encoder.memory_plan)), with_kwargs=True
    )
    found = reconstruct(images, model=network, tracks="head").tracks
    assert asked == [("camera", "depth", "track")]
    assert ran == [(["camera", "depth"], plan), *[(("track",), plan)] * (len(ran) - 1)]
    assert len(ran) > 1
    assert found is not None
    assert whole is not None
    np.testing.assert_array_equal(found.pixels, whole.pixels)
    assert encoder.memory_plan is None


def test_a_network_without_a_tracker_and_a_scene_that_nobody_followed(truth):
    with pytest.raises(UserError, match=r"needs a track head; this model has .*; use 'measure'"):
        check_tracker(Golden("pi3_tiny", "pi3").network())
    with pytest.raises(UserError, match=r"needs the network: pass it to geoaccel.reconstruct"):
        with_tracks(truth, "head")
