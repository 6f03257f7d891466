"""pi3 against the released code's outputs, and what makes it pi3."""

from __future__ import annotations

import pytest
import torch
from references import Golden, relative_error

from geoaccel.cameras import unproject_depth
from geoaccel.models.layers.pi3_heads import nearest_rotation
from geoaccel.models.pi3 import Pi3
from geoaccel.models.robust import recover_focal

PARITY = 1e-5


@pytest.fixture(scope="module")
def model(pi3_golden: Golden) -> Pi3:
    return pi3_golden.network()


@pytest.mark.parametrize("key", ["points", "local_points", "conf", "camera_poses"])
def test_outputs(model: Pi3, pi3_golden: Golden, key: str) -> None:
    with torch.no_grad():
        predictions = model(pi3_golden["inputs.images"])
    assert relative_error(predictions[key], pi3_golden[f"outputs.{key}"]) < PARITY


def test_features_and_patch_tokens(model: Pi3, pi3_golden: Golden) -> None:
    images = pi3_golden["inputs.images"]
    with torch.no_grad():
        features = model.features(images)
        patches = model.encoder((images - model.image_mean) / model.image_std).state.patches.flatten(0, 1)
    assert relative_error(features.flatten(0, 1), pi3_golden["outputs.decoder"]) < PARITY
    assert relative_error(patches, pi3_golden["outputs.patch_tokens"]) < PARITY


def test_permuting_the_frames_permutes_the_outputs(model: Pi3, pi3_golden: Golden) -> None:
    order = [2, 0, 1]
    with torch.no_grad():
        straight = model(pi3_golden["inputs.images"])
        permuted = model(pi3_golden["inputs.images"][:, order])
    for key, value in straight.items():
        assert relative_error(permuted[key], value[:, order]) < PARITY, key


def test_focal_length_is_recovered_exactly_and_survives_outliers() -> None:
    depth = 1 + torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(0))
    intrinsics = torch.tensor([[37.0, 0, 20], [0, 37.0, 15], [0, 0, 1]]).expand(2, 3, 3)
    points = unproject_depth(depth, intrinsics)
    conf = torch.ones_like(depth)
    assert torch.allclose(recover_focal(points, conf), torch.tensor([37.0, 37.0]), rtol=1e-5)
    points[:, :6] = torch.randn(2, 6, 40, 3, generator=torch.Generator().manual_seed(1)).abs()
    assert torch.allclose(recover_focal(points, conf), torch.tensor([37.0, 37.0]), rtol=0.05)


def test_nearest_rotation_is_a_rotation() -> None:
    matrices = torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0))
    rotations = nearest_rotation(matrices)
    assert torch.allclose(rotations @ rotations.transpose(1, 2), torch.eye(3).expand(50, 3, 3), atol=1e-5)
    assert torch.allclose(torch.det(rotations), torch.ones(50), atol=1e-5)
