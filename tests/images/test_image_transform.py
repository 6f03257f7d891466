"""The way back from the network's pixels to those of the images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pictures import SMALL, noise, one_line_of
from references import REAL_SCENES

from geoaccel import cameras
from geoaccel.backbone import Preprocess
from geoaccel.images import ImageTransform, load_images

CASES = [
    pytest.param((300, 400), Preprocess("crop", 112), id="landscape"),
    pytest.param((400, 300), Preprocess("crop", 112), id="portrait-cropped"),
    pytest.param((77, 91), Preprocess("crop", 224), id="enlarged"),
    pytest.param((300, 401), Preprocess("pad", 112), id="pad-rows"),
    pytest.param((401, 300), Preprocess("pad", 112), id="pad-columns"),
    pytest.param((300, 400), Preprocess("budget", max_pixels=20_000), id="budget"),
]


def transform_of(size: tuple[int, int], preprocess: Preprocess) -> ImageTransform:
    return load_images([noise(*size)], preprocess).transforms[0]


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_a_checker_corner_lands_where_the_transform_says(size: tuple[int, int], preprocess: Preprocess) -> None:
    height, width = size
    corner_u, corner_v = int(width * 0.45), int(height * 0.55)
    array = np.zeros((height, width, 3), np.uint8)
    array[:, corner_u:, 0] = 255
    array[corner_v:, :, 1] = 255
    batch = load_images([array], preprocess)
    transform = batch.transforms[0]
    u, v = transform.pixels_to_network(torch.tensor([corner_u, corner_v], dtype=torch.float64)).tolist()
    left, top, right, bottom = transform.content_box
    # An edge at u covers right - u pixels of every row.
    middle_row = batch.images[0, 0, (top + bottom) // 2, left:right].double().sum().item()
    middle_column = batch.images[0, 1, top:bottom, (left + right) // 2].double().sum().item()
    assert right - middle_row == pytest.approx(u, abs=0.05)
    assert bottom - middle_column == pytest.approx(v, abs=0.05)


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_pixels_and_intrinsics_agree_both_ways(size: tuple[int, int], preprocess: Preprocess) -> None:
    transform = transform_of(size, preprocess)
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[310.0, 0.7, 205.0], [0.0, 305.0, 140.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.0, 6.0])

    def project(matrix: torch.Tensor) -> torch.Tensor:
        pixels = points @ matrix.T
        return pixels[:, :2] / pixels[:, 2:]

    network = transform.intrinsics_to_network(intrinsics)
    torch.testing.assert_close(project(network), transform.pixels_to_network(project(intrinsics)))
    torch.testing.assert_close(project(intrinsics), transform.pixels_to_original(project(network)))
    torch.testing.assert_close(transform.intrinsics_to_original(network), intrinsics)
    batched = transform.intrinsics_to_original(network.expand(2, 5, 3, 3))
    torch.testing.assert_close(batched, intrinsics.expand(2, 5, 3, 3))


def plane_depth(
    size: tuple[int, int],
    intrinsics: torch.Tensor,  # [3, 3]
) -> torch.Tensor:  # [H, W]
    """z-depth of the slanted plane n.x = 2."""
    pixels = cameras.pixel_grid(*size, dtype=torch.float64)
    rays = cameras.unproject_depth(torch.ones(size, dtype=torch.float64), intrinsics)
    assert rays.shape[:2] == pixels.shape[:2]
    return 2.0 / (rays @ torch.tensor([0.25, -0.2, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("size", "preprocess"), CASES)
def test_depth_of_a_plane_at_original_resolution(size: tuple[int, int], preprocess: Preprocess) -> None:
    transform = transform_of(size, preprocess)
    intrinsics = torch.tensor(
        [[350.0, 0.0, size[1] / 2 + 3], [0.0, 350.0, size[0] / 2 - 5], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    predicted = plane_depth(transform.network_size, transform.intrinsics_to_network(intrinsics))
    # Nonsense at padding must not reach the image.
    predicted = predicted.where(transform.valid_mask(), 1e6)
    depth = transform.depth_to_original(predicted)
    seen = transform.seen_mask()
    assert depth.shape == size == seen.shape
    assert (depth[~seen] == 0).all()
    # Half a network pixel at the border is held constant; inside, only the plane's curvature in 1/z is left.
    step = max(1 / scale for scale in transform.scale)
    expected = plane_depth(size, intrinsics)
    assert ((depth - expected).abs()[seen] < 0.002 * step * expected[seen]).all()
    points = cameras.unproject_depth(depth, intrinsics)[seen]
    on_plane = points @ torch.tensor([0.25, -0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(on_plane, torch.full_like(on_plane, 2.0), rtol=0.002 * step, atol=0)
    assert torch.equal(
        transform.conf_to_original(predicted.float()[None])[0], transform.depth_to_original(predicted.float())
    )


def test_cropped_rows_are_unknown() -> None:
    transform = transform_of((400, 300), Preprocess("crop", 112))
    # 400 * 112/300 = 149.3 -> 154 rows, of which 21 go above and below: 54.5 original rows.
    assert transform.offset == (0.0, -21.0)
    seen = transform.seen_mask()
    assert seen.all(dim=1).nonzero().flatten()[[0, -1]].tolist() == [55, 344]
    assert transform.valid_mask().all()


def test_a_smaller_original_than_network_input() -> None:
    transform = transform_of((30, 40), Preprocess("pad", 112))
    assert transform.seen_mask().all()
    depth = torch.full((112, 112), 9.0)
    depth[transform.valid_mask()] = 2.0
    assert (transform.depth_to_original(depth) == 2.0).all()


@pytest.mark.parametrize("times", [1, 3])
def test_a_hole_grows_no_farther_than_interpolation_reaches(times: int) -> None:
    """Where a pixel of the image has the centre of one of the network's, the others have no part in it."""
    scale, depth = 1 / times, torch.full((9, 11), 2.0)
    depth[4, 5] = torch.nan
    transform = ImageTransform((9 * times, 11 * times), (9, 11), (scale, scale), (0.0, 0.0))
    hole = transform.depth_to_original(depth).isnan().nonzero()
    reach = times - 1
    assert hole.min(dim=0).values.tolist() == [4 * times + times // 2 - reach, 5 * times + times // 2 - reach]
    assert hole.max(dim=0).values.tolist() == [4 * times + times // 2 + reach, 5 * times + times // 2 + reach]
    assert len(hole) == (2 * reach + 1) ** 2
    whole = transform.depth_to_original(torch.arange(99.0).view(9, 11))[times // 2 :: times, times // 2 :: times]
    assert torch.equal(whole, torch.arange(99.0).view(9, 11))


def test_depth_of_another_size_is_refused() -> None:
    transform = transform_of((30, 40), SMALL)
    with pytest.raises(ValueError, match=r"\[84, 111\].*\[\.\.\., 84, 112\]") as error:
        transform.depth_to_original(torch.ones(84, 111))
    one_line_of(error)


@pytest.mark.skipif(not REAL_SCENES.is_dir(), reason="the shared images are not here")
@pytest.mark.parametrize("scene", ["co3d_apple", "alicevision_buddha", "7scenes_redkitchen"])
def test_real_images(scene: str) -> None:
    folder = REAL_SCENES / scene
    batch = load_images(folder, max_frames=3)
    assert batch.images.shape[0] == 3
    assert batch.images.shape[-1] == 518
    assert batch.images.shape[-2] % 14 == 0
    assert json.loads((folder / "poses.json").read_text())
    for i, transform in enumerate(batch.transforms):
        original = batch.original(i).permute(2, 0, 1).float() / 255
        # The image, mapped to the network and back, is the image up to the resampling.
        back = transform.depth_to_original(batch.images[i])
        assert (back - original).abs()[:, transform.seen_mask()].mean() < 0.03
