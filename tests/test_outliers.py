"""Images that are unlike the others are named, and can be left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analytic_scene import exact_depth, original_intrinsics, poses

import geoaccel
from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import sequence
from geoaccel.images import ImageTransform
from geoaccel.outliers import FEWEST, agreement, name_outliers, unlike, without_outliers
from geoaccel.reconstruction import Reconstruction
from geoaccel.reference import Order

SIZE = (36, 48)
ALIKE = torch.tensor([0.30, 0.62, 0.60, 0.61, 0.60, 0.63, 0.61, 0.62])


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


def test_a_jump_parts_one_frame_and_a_larger_one_several() -> None:
    assert unlike(ALIKE) == [0]
    assert unlike(ALIKE.roll(5)) == [5]
    assert unlike(ALIKE[1:]) == []
    crowd = torch.linspace(0.5, 0.6, 12)
    assert unlike(crowd) == []
    two = torch.cat([crowd, torch.tensor([0.2, 0.21])])
    assert unlike(two) == [12, 13]
    assert unlike(torch.cat([crowd, torch.tensor([0.46, 0.461])])) == []  # views from the other side jump less
    half = torch.tensor([0.2] * 6 + [0.6] * 6)
    assert unlike(half) == []  # nobody knows which half is the scene


def test_nothing_is_said_of_few_frames_or_without_features() -> None:
    assert unlike(ALIKE[: FEWEST - 1]) == []
    assert unlike(None) == []


def test_a_frame_that_is_wrong_does_not_agree() -> None:
    found = agreement(scene())
    assert int(found.argmin()) == 0
    assert found[0] < 0.1
    assert found[1:].min() > 0.7
    behind = scene().cam_from_world.clone()
    behind[1, :3, 3] += torch.tensor([0.0, 0.0, 100.0])
    assert agreement(replace(scene(), cam_from_world=behind))[1] == 0


def test_who_is_unlike_the_others_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    given = scene()
    with caplog.at_level(logging.WARNING):
        kept = name_outliers(given, Order(None, ALIKE))
    assert len(kept) == 8
    assert "1 of 8 images are unlike the others: 0.png (0 % of its points agree" in caplog.text
    assert "--drop-outliers" in caplog.text
    assert "--reference auto" in caplog.text  # it is the reference frame
    assert kept.notes["reference"] == "0.png"
    (named,) = kept.notes["outliers"]
    assert (named["image"], named["left_out"]) == ("0.png", False)
    assert named["agreement"] < 0.01
    caplog.clear()
    dropped = without_outliers(name_outliers(given, Order(torch.tensor([3, 0, 1, 2, 4, 5, 6, 7]), ALIKE)))
    assert dropped.names == [f"{i}.png" for i in range(1, 8)]
    assert torch.equal(dropped.depth, given.depth[1:])
    assert torch.equal(dropped.read_original(0), given.read_original(1))
    assert dropped.notes["reference"] == "3.png"
    assert dropped.notes["outliers"][0]["left_out"]
    assert "--reference" not in caplog.text
    fine = name_outliers(given, Order(None, ALIKE.clamp(min=0.6)))
    assert fine.notes == {"reference": "0.png", "outliers": []}
    assert without_outliers(fine) is fine


def test_not_all_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoaccel.outliers.unlike", lambda alike: list(range(7)))
    with pytest.raises(UserError, match="leaves 1 of 8 images"):
        without_outliers(name_outliers(scene(), Order(None, ALIKE)))


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
