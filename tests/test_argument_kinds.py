"""Arguments of a wrong kind are one line, before anything is read or predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import geoaccel
from geoaccel.errors import UserError, UserTypeError
from geoaccel.images.calibration import read_intrinsics

IMAGES = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def refused(model: nn.Module, **options: Any) -> str:
    def never(*_: Any) -> None:
        raise AssertionError("the network ran")

    handle = model.register_forward_pre_hook(never)
    with pytest.raises(UserError) as caught:
        geoaccel.reconstruct(options.pop("images", IMAGES), model=model, **options)
    handle.remove()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["masks", "poses", "depths", "positions"])
def test_what_is_read_from_files_is_a_path(tiny: nn.Module, name: str) -> None:
    assert refused(tiny, **{name: np.zeros((2, 3))}) == f"{name} is a ndarray; give the path of a file or folder"


def test_numbers_as_text(tiny: nn.Module) -> None:
    assert "edge_filter='0.25' is not allowed; give the relative jump" in refused(tiny, edge_filter="0.25")
    assert "max_frames='3' must be a whole number, at least 1" in refused(tiny, max_frames="3")
    assert "size='28' (--size)" in refused(tiny, images=[np.zeros((28, 42, 3), np.uint8)], size="28")


def test_no_formats(tiny: nn.Module, tmp_path: Path) -> None:
    scene = geoaccel.reconstruct(IMAGES, model=tiny)
    with pytest.raises(UserTypeError, match="formats is None; give names, as 'ply,colmap', or 'all'"):
        scene.save(tmp_path / "out", formats=None)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy(tiny: nn.Module) -> None:
    expected = geoaccel.reconstruct(IMAGES, model=tiny, reference=1)
    found = geoaccel.reconstruct(IMAGES, model=tiny, reference=np.int64(1))  # type: ignore[arg-type]
    assert torch.equal(found.points_world, expected.points_world)
    edges = [geoaccel.reconstruct(IMAGES, model=tiny, edge_filter=jump).mask for jump in (8.0, np.float32(8))]  # type: ignore[arg-type]
    assert torch.equal(*edges)
    matrix = np.array([[30.0, 0, 21], [0, 30, 14], [0, 0, 1]])
    given = [read_intrinsics(kind, ["a", "b"], [(28, 42)] * 2) for kind in (matrix, torch.from_numpy(matrix))]
    assert all(torch.equal(own, other) for own, other in zip(*given, strict=True))  # type: ignore[arg-type]
    turned = read_intrinsics(np.stack([matrix, 2 * matrix])[::-1], ["a", "b"], [(28, 42)] * 2)
    assert turned[0] is not None
    assert turned[0][0, 0] == 60
    for numbers in (np.array(30.0), np.array([30.0]), np.array([30.0, 30, 21, 14])):
        (found_there,) = read_intrinsics(numbers, ["a"], [(28, 42)])
        assert found_there is not None
        assert torch.equal(found_there, given[0][0])  # type: ignore[arg-type]


def test_masks_that_keep_nothing_are_refused_before_the_forward(tiny: nn.Module, tmp_path: Path) -> None:
    photographs, masks = tmp_path / "photographs", tmp_path / "masks"
    for folder in (photographs, masks):
        folder.mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (42, 28), (90, 80, 70) if folder is photographs else (0, 0, 0)).save(folder / name)
    options: dict[str, Any] = {"images": photographs, "masks": masks, "size": 42}
    assert "keep no pixel of any image; white keeps a pixel, so invert them" in refused(tiny, **options)
    Image.new("RGB", (42, 28), (255, 255, 255)).save(masks / "b.png")
    del options["images"]
    assert geoaccel.reconstruct(photographs, model=tiny, **options).selected is not None


@pytest.mark.parametrize("name", ["reconstruct", "reconstruct_windows", "describe"])
def test_a_network_of_somebody_else_says_what_to_do(name: str, tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    calls: dict[str, Callable[[], object]] = {
        "reconstruct": lambda: geoaccel.reconstruct(IMAGES, model=model),
        "reconstruct_windows": lambda: geoaccel.reconstruct_windows(IMAGES, model=model, out=tmp_path / "out"),
        "describe": lambda: geoaccel.describe(model),
    }
    with pytest.raises(
        UserError, match=r"^a Linear is not a geoaccel model; wrap it with geoaccel.adopt\(model\) first"
    ):
        calls[name]()


def test_what_restore_advises_works(tiny: nn.Module) -> None:
    geoaccel.accelerate(tiny, merging="httm", quantization="fp8")
    with pytest.raises(UserError, match=r"or accelerate\(model\), which removes everything else$"):
        geoaccel.restore(tiny)
    geoaccel.accelerate(tiny)
    assert not geoaccel.describe(tiny).merging
    assert geoaccel.describe(tiny).quantization
