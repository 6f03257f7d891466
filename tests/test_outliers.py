"""Images that are unlike the others are named, and can be left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic_scene import exact_depth, original_intrinsics, poses
from large_tensors import LargeTensors

import geoaccel
from geoaccel.cameras import project_points, unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import sequence
from geoaccel.frame_matches import FrameMatches, evenly_spread
from geoaccel.images import ImageTransform
from geoaccel.outliers import FEWEST, agreement, name_outliers, strangeness, unlike, without_outliers
from geoaccel.reconstruction import Reconstruction
from geoaccel.reference import Order
from geoaccel.tracks import Cameras, Tracks, reprojection_errors, triangulate

SIZE = (36, 48)


def scene(frames: int = 8) -> Reconstruction:
    """What is exact, but for the first frame."""
    cameras, intrinsics = poses(frames), original_intrinsics(SIZE).float().expand(frames, 3, 3)
    depth = torch.stack([exact_depth(intrinsics[0], pose, SIZE) for pose in cameras])
    depth[0] *= 1.5
    images = torch.rand(frames, 3, *SIZE)
    return Reconstruction(
        cameras, intrinsics, depth, unproject_depth(depth, intrinsics, cameras), torch.full_like(depth, 2.0), images,
        mask=depth > 0, names=[f"{i}.png" for i in range(frames)],
        transforms=[ImageTransform(SIZE, SIZE, (1.0, 1.0), (0.0, 0.0))] * frames, paths=[None] * frames,
        read_original=lambda i: (images[i].permute(1, 2, 0) * 255).byte(),
    )  # fmt: skip


def matches(frames: int = 8, strange: Sequence[int] = (), *, value: float = 0.1, friends: bool = False) -> FrameMatches:
    """A scene seen from around, neighbours found in each other, and frames that are found in none of it."""
    turn = torch.arange(frames)
    apart = (turn[:, None] - turn).abs()
    ratios = -0.6 + 0.3 * torch.minimum(apart, frames - apart) / frames
    for frame in strange:
        ratios[frame] = ratios[:, frame] = value
    for frame in strange if friends else ():
        ratios[frame, list(strange)] = -3.0
    return FrameMatches(ratios, torch.arange(frames))


@pytest.mark.parametrize("frames", [6, 8, 16, 32])
def test_a_strange_frame_is_named_and_clean_scenes_are_left_alone(frames: int) -> None:
    assert unlike(matches(frames)) == []
    assert unlike(matches(frames, [0])) == [0]
    assert unlike(matches(frames, [frames - 2])) == [frames - 2]
    assert unlike(matches(frames, [0], value=-0.45)) == []  # seen from the other side


@pytest.mark.parametrize("friends", [False, True])
@pytest.mark.parametrize("frames", [8, 16, 32])
def test_several_are_named_also_where_they_are_found_in_each_other(frames: int, friends: bool) -> None:
    strange = list(range(1, 1 + frames // 4))
    assert unlike(matches(frames, strange, friends=friends)) == strange
    if friends:  # two scenes of as many images: nobody knows which is meant
        halves = matches(frames, list(range(frames // 2)), value=0.1, friends=True)
        assert unlike(halves) == []
    order, values = strangeness(matches(frames, strange, friends=friends))
    assert sorted(order[: frames // 4]) == strange
    assert len(values) == frames // 4


def test_where_views_are_far_from_each_other_a_frame_must_be_stranger() -> None:
    near, far = matches(8, [2], value=-0.25), matches(8, [2], value=-0.25)
    far.ratios[5, :] = far.ratios[:, 5] = -0.25
    assert unlike(near) == [2]
    assert unlike(far) == []


def test_of_many_frames_some_are_compared() -> None:
    spread = evenly_spread(60)
    found = matches(60, [0, 7])
    assert unlike(FrameMatches(found.ratios[:, spread], spread)) == [0, 7]
    assert unlike(FrameMatches(matches(60).ratios[:, spread], spread)) == []


def test_nothing_is_said_of_few_frames_or_without_features() -> None:
    assert unlike(matches(FEWEST - 1, [0])) == []
    assert unlike(None) == []


def test_a_frame_that_is_wrong_does_not_agree() -> None:
    given = scene()
    with LargeTensors(given.points_world.nbytes / 2) as made:  # points of one frame at a time
        found = agreement(given)
    assert made.count == 0
    assert int(found.argmin()) == 0
    assert found[0] < 0.1
    assert found[1:].min() > 0.7
    behind = scene().cam_from_world.clone()
    behind[1, :3, 3] += torch.tensor([0.0, 0.0, 100.0])
    assert agreement(replace(scene(), cam_from_world=behind))[1] == 0


def test_who_is_unlike_the_others_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    given = scene()
    with caplog.at_level(logging.WARNING):
        kept = name_outliers(given, Order(matches=matches(8, [0])))
    assert len(kept) == 8
    assert "1 of 8 images are unlike the others: 0.png (0 % of its points agree" in caplog.text
    assert "--drop-outliers" in caplog.text
    assert "--reference auto" in caplog.text  # it is the reference frame
    assert kept.notes["reference"] == "0.png"
    (named,) = kept.notes["outliers"]
    assert (named["image"], named["left_out"]) == ("0.png", False)
    assert named["agreement"] < 0.01
    caplog.clear()
    dropped = without_outliers(
        name_outliers(given, Order(torch.tensor([3, 0, 1, 2, 4, 5, 6, 7]), matches=matches(8, [0])))
    )
    assert dropped.names == [f"{i}.png" for i in range(1, 8)]
    assert torch.equal(dropped.depth, given.depth[1:])
    assert torch.equal(dropped.read_original(0), given.read_original(1))
    assert dropped.notes["reference"] == "3.png"
    assert dropped.notes["outliers"][0]["left_out"]
    assert "--reference" not in caplog.text
    fine = name_outliers(given, Order(matches=matches(8)))
    assert fine.notes == {"reference": "0.png", "outliers": []}
    assert without_outliers(fine) is fine


def test_tracks_follow_the_images_that_stay(tmp_path: Path) -> None:
    """Points of frame 1 as the others see them, under wrong pixels in the frame that goes."""
    given, points = scene(), scene().points_world[1, 5:-5:5, 8:-8:5].reshape(-1, 3).double()
    seen, _ = project_points(points, given.intrinsics.double(), given.cam_from_world.double())
    seen[0] += 10
    count, frames = len(points), len(given)
    tracks = Tracks(
        np.repeat(np.arange(count), frames), np.tile(np.arange(frames), count),
        seen.transpose(0, 1).reshape(-1, 2).numpy(), "truth",
    )  # fmt: skip
    given = name_outliers(replace(given, tracks=tracks), Order(matches=matches(8, [0])))
    dropped = without_outliers(given)
    assert dropped.tracks is not None
    assert (dropped.tracks.lengths() == frames - 1).all()
    cameras = Cameras.of(dropped)
    assert reprojection_errors(dropped.tracks, cameras, triangulate(dropped.tracks, cameras)).max() < 1e-3
    dropped.save(tmp_path / "scene", ["colmap-text"], tracks="auto")
    folder = tmp_path / "scene" / "sparse" / "0"
    assert (folder / "tracks.txt").read_text().startswith(f"measured: {count} tracks by truth")
    assert (given.of_frames([3, 2]).tracks or tracks).frame.tolist() == [0, 1] * count


def test_not_all_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoaccel.outliers.unlike", lambda matches: list(range(7)))
    with pytest.raises(UserError, match="leaves 1 of 8 images"):
        without_outliers(name_outliers(scene(), Order(matches=matches(8, [0]))))


@pytest.mark.parametrize("kind", ["black", "foreign"])
@pytest.mark.parametrize("frames", [6, 16])
def test_a_quarter_of_the_photographs(frames: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    images = sequence(1000, frames=frames, size=(112, 112)).images[0].clone()
    count = frames // 4
    images[:count] = 0.0
    if kind == "foreign":
        images[:count] = sequence(501000, frames=frames, size=(112, 112)).images[0][:count]
    with caplog.at_level(logging.WARNING):
        found = geoaccel.reconstruct(images, model=geoaccel.load_model("vggt-mini")).notes["outliers"]
    assert [one["image"] for one in found] == [f"frame_{i:04d}.png" for i in range(count)]
    assert f"{count} of {frames} images are unlike the others" in caplog.text


def test_a_black_first_photograph(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    images = sequence(1000, frames=8, size=(112, 112)).images[0].clone()
    images[0] = 0
    model = geoaccel.load_model("vggt-mini")
    with caplog.at_level(logging.WARNING):
        result = geoaccel.reconstruct(images, model=model, reference="auto", drop_outliers=True)
    assert result.names == [f"frame_{i:04d}.png" for i in range(1, 8)]
    assert "1 of 8 images are unlike the others: frame_0000.png" in caplog.text
    result.save(tmp_path / "scene", ["npz"])
    written = json.loads((tmp_path / "scene" / "files.json").read_text())
    assert [one["image"] for one in written["outliers"]] == ["frame_0000.png"]
    assert written["reference"] in result.names
