"""Images that disagree with the others are named, and can be left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analytic_scene import exact_depth, original_intrinsics, poses

import geoaccel
from geoaccel.agreement import Rule, agreement, measured, name_outliers, outliers
from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import sequence
from geoaccel.images import ImageTransform
from geoaccel.reconstruction import Reconstruction
from geoaccel.reference import Order

SIZE = (36, 48)
RULE = Rule(alike=1.0, agreement=-1.0, confidence=-1.0, bias=-0.5)


def scene(frames: int = 6) -> Reconstruction:
    """What is exact."""
    cameras, intrinsics = poses(frames), original_intrinsics(SIZE).float().expand(frames, 3, 3)
    depth = torch.stack([exact_depth(intrinsics[0], pose, SIZE) for pose in cameras])
    images = torch.rand(frames, 3, *SIZE)
    return Reconstruction(
        cameras, intrinsics, depth, unproject_depth(depth, intrinsics, cameras), torch.full_like(depth, 2.0), images,
        mask=depth > 0, names=[f"{i}.png" for i in range(frames)],
        transforms=[ImageTransform(SIZE, SIZE, (1.0, 1.0), (0.0, 0.0))] * frames, paths=[None] * frames,
        read_original=lambda i: (images[i].permute(1, 2, 0) * 255).byte(),
    )  # fmt: skip


def test_exact_frames_agree_and_one_that_is_elsewhere_does_not() -> None:
    exact = scene()
    assert agreement(exact).min() > 0.9
    depth = exact.depth.clone()
    depth[2] *= 1.5
    found = agreement(replace(exact, depth=depth))
    assert int(found.argmin()) == 2
    assert found[2] < 0.1
    behind = exact.cam_from_world.clone()
    behind[1, :3, 3] += torch.tensor([0.0, 0.0, 100.0])
    assert agreement(replace(exact, cam_from_world=behind))[1] == 0


def test_numbers_are_relative_to_the_others() -> None:
    conf = scene().conf.clone()
    conf[3] = 1.0
    alike = torch.full((6,), 0.5)
    alike[4] = 0.25
    found = measured(replace(scene(), conf=conf), alike)
    assert found[3].tolist() == pytest.approx([0, 0, -torch.tensor(2.0).log().item()], abs=0.05)
    assert found[4, 0] == pytest.approx(torch.tensor(1.5).log().item())


def test_who_disagrees_is_named_and_left_out(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoaccel.agreement.outliers.__defaults__", (RULE,))
    conf = scene().conf.clone()
    conf[0] = 0.5
    given = replace(scene(), conf=conf)
    with caplog.at_level(logging.WARNING):
        kept = name_outliers(given, Order(None, torch.full((6,), 0.5)))
    assert len(kept) == 6
    assert "1 of 6 images disagree with the others: 0.png (the model is much less sure of it)" in caplog.text
    assert "--reference auto" in caplog.text
    assert kept.notes["outliers"][0]["image"] == "0.png"
    caplog.clear()
    dropped = name_outliers(given, Order(torch.tensor([3, 0, 1, 2, 4, 5]), torch.full((6,), 0.5)), drop=True)
    assert dropped.names == [f"{i}.png" for i in range(1, 6)]
    assert torch.equal(dropped.depth, given.depth[1:])
    assert torch.equal(dropped.read_original(0), given.read_original(1))
    assert dropped.notes["reference"] == "3.png"
    assert dropped.notes["left_out"]
    assert "--reference" not in caplog.text
    assert name_outliers(scene(), Order(None, torch.full((6,), 0.5))).notes["outliers"] == []


def test_nothing_is_said_of_few_frames_or_without_features() -> None:
    conf = scene(3).conf.clone()
    conf[0] = 0.01
    assert outliers(replace(scene(3), conf=conf), torch.full((3,), 0.5), RULE) == []
    assert outliers(scene(), None, RULE) == []


def test_not_all_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = Rule(0.0, 0.0, 0.0, bias=1.0)
    monkeypatch.setattr("geoaccel.agreement.outliers.__defaults__", (everything,))
    with pytest.raises(UserError, match="leaves 0 of 6 images"):
        name_outliers(scene(), Order(None, torch.full((6,), 0.5)), drop=True)


def test_a_black_first_photograph(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    images = sequence(1000, frames=8, size=(112, 112)).images[0].clone()
    images[0] = 0
    model = geoaccel.load_model("vggt-mini")
    with caplog.at_level(logging.WARNING):
        result = geoaccel.reconstruct(images, model=model, reference="auto", drop_outliers=True)
    black = "frame_0000.png"
    assert len(result) == 7
    assert "1 of 8 images disagree with the others" in caplog.text
    result.save(tmp_path / "scene", ["npz"])
    written = json.loads((tmp_path / "scene" / "files.json").read_text())
    assert [one["image"] for one in written["outliers"]] == [name for name in [black] if black not in result.names]
    assert written["left_out"] is True
    assert written["reference"] in result.names
