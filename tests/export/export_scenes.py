"""Scenes to write: one that all tests share and leave alone, and a small one for each."""

from __future__ import annotations

import pytest
import torch
from analytic_scene import (
    MODES,
    AnalyticModel,
    checked_memory,  # noqa: F401 (a fixture)
    load,
)

from geoaccel.images import ImageTransform
from geoaccel.reconstruction import reconstruct


@pytest.fixture(scope="module", params=MODES)
def scene(request, tmp_path_factory, checked_memory):
    """One scene for all tests, which leave it as it is."""
    batch, model = load(tmp_path_factory.mktemp("scene") / "photos", request.param)
    return reconstruct(batch, model=model)


@pytest.fixture
def small():
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    images = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    return reconstruct(images, model=AnalyticModel(transforms))
