"""Conditions: what cannot be true is refused in a line, in frames that are known alone; what is told arrives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.conditions import Conditions
from geoaccel.testing import tiny_network

SIZE = (28, 42)


def rigid(frames: int = 3) -> Tensor:  # [S, 4, 4]
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(frames, 3, 3, generator=generator))[0]
    rotation = rotation * torch.linalg.det(rotation).sign()[:, None, None]
    return to_homogeneous(torch.cat([rotation, torch.randn(frames, 3, 1, generator=generator)], dim=-1))


def pinhole(frames: int = 3) -> Tensor:  # [S, 3, 3]
    return torch.tensor([[30.0, 0, 21], [0, 31, 14], [0, 0, 1]]).repeat(frames, 1, 1)


GOOD = Conditions(rigid(), pinhole(), torch.ones(3, *SIZE))


def spoiled(values: Tensor, place: tuple[Any, ...], value: float) -> Tensor:
    values = values.clone()
    values[place] = value
    return values


def test_what_can_be_true_is_taken() -> None:
    GOOD.check(3, SIZE)
    assert GOOD.given == ("poses", "intrinsics", "depths")
    assert Conditions().given == ()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("poses", rigid(2), r"poses are torch.float32 \[2, 4, 4\]; expected floats \[3, 4, 4\]"),
        ("poses", spoiled(rigid(), (1, 0, 0), torch.nan), "poses of frame 1 are NaN or infinite"),
        ("poses", spoiled(rigid(), (2, 0), 1.0), "poses of frame 2 contain no rotation"),
        ("poses", -rigid(), "poses of frame 0 contain no rotation"),
        ("poses", spoiled(rigid(), (1, 3, 0), 0.5), "poses of frame 1 must have the last row"),
        ("intrinsics", pinhole()[:, :2], "intrinsics are torch.float32"),
        ("intrinsics", spoiled(pinhole(), (1, 0, 0), 0.0), "intrinsics of frame 1 are singular"),
        ("intrinsics", spoiled(pinhole(), (1, 2, 2), 2.0), "intrinsics of frame 1 must have the last row"),
        ("intrinsics", spoiled(pinhole(), (0, 0, 2), torch.inf), "intrinsics of frame 0 are NaN or infinite"),
        ("depths", torch.ones(3, 28, 28), "depths are torch.float32"),
        ("depths", torch.ones(3, *SIZE, dtype=torch.int32), "depths are torch.int32"),
        ("depths", spoiled(torch.ones(3, *SIZE), (2, 5, 5), torch.nan), "depths of frame 2 contain NaN or infinity"),
        ("depths", spoiled(torch.ones(3, *SIZE), (1, 5, 5), -1.0), "depths of frame 1 are negative"),
        ("has_depth", torch.ones(3), r"mask of depths is torch.float32 \[3\]; give bool \[3\]"),
    ],
)
def test_what_cannot_is_one_line(kind: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(GOOD, **{kind: value}).check(3, SIZE)
    assert "\n" not in str(caught.value)


def test_frames_that_are_not_known_are_not_looked_at() -> None:
    bad = replace(GOOD, poses=spoiled(rigid(), (1,), torch.nan), depths=spoiled(GOOD.depths, (1,), torch.nan))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frame 1"):
        bad.check(3, SIZE)
    known = torch.tensor([True, False, True])
    replace(bad, has_pose=known, has_depth=known).check(3, SIZE)


# ----------------------------------------------------------------------------------------------- reconstruct


def images(frames: int = 3) -> Tensor:
    return torch.rand(frames, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pi3x() -> nn.Module:
    return tiny_network("pi3x")


@pytest.mark.parametrize("kind", ["poses", "intrinsics", "depths"])
def test_what_is_told_changes_the_scene(pi3x: nn.Module, kind: str) -> None:
    plain = geoaccel.reconstruct(images(), model=pi3x)
    # A random network listens to depths and rays through few channels; poses are added where they are injected.
    told = geoaccel.reconstruct(images(), model=pi3x, conditions=Conditions(**{kind: getattr(GOOD, kind)}))
    assert not torch.equal(told.depth, plain.depth)
    assert plain.unit == told.unit == "about a metre"


def test_poses_reach_the_network_in_their_direction(pi3x: nn.Module) -> None:
    with torch.no_grad():
        raw = pi3x(images()[None], poses=invert_rigid(rigid())[None])
    geometry = pi3x.backbone.geometry(raw, SIZE)  # type: ignore[union-attr, operator]
    told = geoaccel.reconstruct(images(), model=pi3x, conditions=Conditions(rigid()))
    torch.testing.assert_close(told.depth, geometry.depth[0])


def test_given_cameras_are_those_of_the_scene() -> None:
    told = geoaccel.reconstruct(images(), model=tiny_network("da3"), conditions=Conditions(rigid(), pinhole()))
    torch.testing.assert_close(told.cam_from_world, rigid(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.intrinsics, pinhole())
    assert told.unit == "that of the given poses"
    assert geoaccel.reconstruct(images(), model=tiny_network("da3")).unit == "arbitrary"


@pytest.mark.parametrize(
    ("backbone", "conditions", "message"),
    [
        ("vggt", Conditions(rigid()), "vggt does not accept poses"),
        ("pi3", {"depths": "folder"}, "pi3 does not accept depths"),
        (
            "da3",
            Conditions(rigid(), pinhole(), torch.ones(3, *SIZE)),
            r"da3 does not accept depths \(.* poses, intrinsics",
        ),
        ("pi3x", {"pose": "file"}, "unknown condition 'pose'; known: .*Did you mean 'poses'"),
        ("pi3x", Conditions(rigid(2)), "poses are"),
    ],
)
def test_refused_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, backbone: str, conditions: Any, message: str
) -> None:
    model = tiny_network(backbone)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message) as caught:
        geoaccel.reconstruct(images(), model=model, conditions=conditions)
    assert "\n" not in str(caught.value)
