"""VGGT's camera compensation token: the formula, what the head sees, the file, and that it must help to stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from references import Golden, relative_error
from torch import Tensor, nn

from geoaccel.models.vggt import VGGT
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization import W4A16, add_token, mean_camera_token, quantize
from geoaccel.quantization.calibrate import calibration
from geoaccel.quantization.calibrate.calibration import try_token

METHOD = W4A16(group_size=16)


def random_images(seed: int, frames: int = 3) -> Tensor:
    return torch.rand(1, frames, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vggt(tiny: nn.Module) -> nn.Module:
    if not isinstance(tiny, VGGT):
        pytest.skip("VGGT's camera head only")
    return tiny


@torch.no_grad()
def poses(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)["pose_enc"]


@torch.no_grad()
def test_the_mean_is_the_papers_formula(vggt: Any) -> None:
    """Mean plus the mean coordinates along principal directions about it: whatever the directions, the mean."""
    batches = [lambda seed=seed: random_images(seed) for seed in range(4)]
    tokens = torch.cat([vggt.aggregator(load())[0][-1][:, :, 0].flatten(0, 1) for load in batches])
    mean = tokens.mean(dim=0)
    for directions in (1, 4):
        basis = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:directions].T
        literal = mean + basis @ ((tokens - mean) @ basis).mean(dim=0)
        assert relative_error(mean_camera_token(vggt, batches), literal) < 1e-5
    assert not vggt.camera_head._forward_pre_hooks


def test_the_head_sees_one_more_frame_and_gives_poses_for_the_rest(vggt: Any) -> None:
    images, token = random_images(0), mean_camera_token(vggt, [lambda: random_images(1)])
    before = poses(vggt, images)
    with torch.no_grad():
        features = list(vggt.aggregator(images)[0])
        longer = torch.cat([features[-1][:, :, :1], token.expand(1, 1, 1, -1)], dim=1)
        expected = vggt.camera_head([*features[:-1], longer])[-1][:, :-1]
    add_token(vggt, token)
    found = poses(vggt, images)
    assert found.shape == before.shape
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
    with pytest.raises(ValueError, match="already has a compensation token"):
        add_token(vggt, token)


def test_a_copy_has_a_token_of_its_own(vggt: Any) -> None:
    changed = copy.deepcopy(vggt)
    add_token(changed, torch.ones(64))
    assert not hasattr(vggt.camera_head, "compensation_token")
    other = copy.deepcopy(changed)
    assert torch.equal(poses(other, random_images(0)), poses(changed, random_images(0)))
    assert not torch.equal(poses(vggt, random_images(0)), poses(changed, random_images(0)))


def test_the_token_is_in_the_file_of_a_float_network_too(vggt: Any, tmp_path: Path) -> None:
    add_token(vggt, mean_camera_token(vggt, [lambda: random_images(1)]))
    save_model(vggt, tmp_path / "a.safetensors", dtype=torch.float32)
    assert torch.equal(poses(load_model(tmp_path / "a.safetensors"), random_images(0)), poses(vggt, random_images(0)))


def test_the_token_is_in_the_file(vggt: Any, tmp_path: Path) -> None:
    add_token(vggt, mean_camera_token(vggt, [lambda: random_images(1)]))
    quantize(vggt, METHOD)
    save_model(vggt, tmp_path / "a.safetensors", dtype=torch.float32)
    loaded = load_model(tmp_path / "a.safetensors")
    assert torch.equal(poses(loaded, random_images(0)), poses(vggt, random_images(0)))
    # And in the file of what was loaded.
    save_model(loaded, tmp_path / "b.safetensors", dtype=torch.float32)
    assert torch.equal(poses(load_model(tmp_path / "b.safetensors"), random_images(0)), poses(vggt, random_images(0)))


def test_networks_without_such_a_head(tiny: nn.Module, golden: Golden) -> None:
    if isinstance(tiny, VGGT):
        pytest.skip("has one")
    for action in (lambda: add_token(tiny, torch.ones(4)), lambda: mean_camera_token(tiny, [])):
        with pytest.raises(ValueError, match=f"a {type(tiny).__name__} has no camera head that attends across frames"):
            action()


@pytest.mark.parametrize("better", [True, False])
def test_it_stays_only_if_it_helps(vggt: Any, monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    terms = iter([2.0, 1.0] if better else [1.0, 1.0])
    monkeypatch.setattr(calibration, "task_terms", lambda *_: {"camera": next(terms)})
    reported: list[str] = []
    found = try_token(vggt, copy.deepcopy(vggt), [lambda: random_images(0)] * 2, report=reported.append)
    assert found["kept"] == better == hasattr(vggt.camera_head, "compensation_token")
    assert reported[0].endswith("kept" if better else "left out")


def test_it_is_judged_on_what_it_was_not_made_of(vggt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(calibration, "mean_camera_token", lambda _, b: made.extend(b) or torch.ones(64))
    seen: list[int] = []
    batches = [lambda i=i: seen.append(i) or random_images(i) for i in range(4)]
    found = try_token(vggt, copy.deepcopy(vggt), batches)
    assert made == batches[::2]
    assert set(seen) == {1, 3}
    assert found["with"] != found["without"]
