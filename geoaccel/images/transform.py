"""Mapping from an original image's pixels to the network's and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.cameras import pixel_grid

_SAME_PLACE = 1e-6
"""Tolerance for rounding of pixel coordinates, in pixels."""


@dataclass(frozen=True)
class ImageTransform:
    """Transform from one image to the network input: an axis-aligned scale and shift.

    Pixels are counted as everywhere in the package: the centre of the top-left pixel lies at (0.5, 0.5).
    ``u_network = scale[0] * u_original + offset[0]``, and likewise for v. A positive offset is padding, a negative one
    a crop. The two scales differ slightly, because height and width are rounded to whole patches.

    Attributes:
        original_size: (H, W) of the original image, after its EXIF orientation.
        network_size: (H, W) of the network input, padding included.
        scale: (x, y).
        offset: (x, y), in pixels of the network input.
    """

    original_size: tuple[int, int]
    network_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    @property
    def content_box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part of the network input that is image, not padding."""
        (height, width), (net_height, net_width) = self.original_size, self.network_size
        left, top = (max(0, round(start)) for start in self.offset)
        right = min(net_width, round(self.offset[0] + self.scale[0] * width))
        bottom = min(net_height, round(self.offset[1] + self.scale[1] * height))
        return left, top, right, bottom

    def valid_mask(self, device: torch.device | str | None = None) -> Tensor:  # [H, W] bool
        """True where the network input shows the original image, False at padding."""
        left, top, right, bottom = self.content_box
        mask = torch.zeros(self.network_size, dtype=torch.bool, device=device)
        mask[top:bottom, left:right] = True
        return mask

    def nearest(
        self,
        values: Tensor,  # [H0, W0]
    ) -> Tensor:  # [H, W]
        """The value at the original pixel under the centre of every pixel of the network input; 0 at padding."""
        height, width = self.original_size
        pixels = self.pixels_to_original(pixel_grid(*self.network_size, dtype=torch.float64))
        column = pixels[..., 0].floor().long().clamp(0, width - 1)
        row = pixels[..., 1].floor().long().clamp(0, height - 1)
        return values[row, column].masked_fill(~self.valid_mask(), 0)

    def seen_mask(self, device: torch.device | str | None = None) -> Tensor:  # [H0, W0] bool
        """True at the original pixels that the network saw, False at those that were cropped away."""
        (_, _, _, seen_y), (_, _, _, seen_x) = self._axes(device)
        return seen_y[:, None] & seen_x[None, :]

    def pixels_to_network(
        self,
        pixels: Tensor,  # [..., 2]
    ) -> Tensor:  # [..., 2]
        """Map (u, v) in the original image to (u, v) in the network input."""
        return pixels * pixels.new_tensor(self.scale) + pixels.new_tensor(self.offset)

    def pixels_to_original(
        self,
        pixels: Tensor,  # [..., 2]
    ) -> Tensor:  # [..., 2]
        """Map (u, v) in the network input to (u, v) in the original image."""
        return (pixels - pixels.new_tensor(self.offset)) / pixels.new_tensor(self.scale)

    def intrinsics_to_network(
        self,
        intrinsics: Tensor,  # [..., 3, 3]
    ) -> Tensor:  # [..., 3, 3]
        """Convert the original image's intrinsics to those of the network input."""
        (scale_x, scale_y), (offset_x, offset_y) = self.scale, self.offset
        matrix = [[scale_x, 0.0, offset_x], [0.0, scale_y, offset_y], [0.0, 0.0, 1.0]]
        return intrinsics.new_tensor(matrix) @ intrinsics

    def intrinsics_to_original(
        self,
        intrinsics: Tensor,  # [..., 3, 3]
    ) -> Tensor:  # [..., 3, 3]
        """Convert intrinsics of the network input to those of the original image."""
        (scale_x, scale_y), (offset_x, offset_y) = self.scale, self.offset
        matrix = [[1 / scale_x, 0.0, -offset_x / scale_x], [0.0, 1 / scale_y, -offset_y / scale_y], [0.0, 0.0, 1.0]]
        return intrinsics.new_tensor(matrix) @ intrinsics

    def depth_to_original(
        self,
        depth: Tensor,  # [..., H, W]
    ) -> Tensor:  # [..., H0, W0]
        """Resample a depth map to the original image's resolution, bilinearly, without padding.

        Padding never mixes with the original image. Pixels that the network did not see (crop) are 0: depth unknown.
        World points at original resolution come from ``cameras.unproject_depth`` with ``intrinsics_to_original``;
        they must not be interpolated themselves.

        Example:
            >>> transform = ImageTransform((4, 4), (2, 2), (0.5, 0.5), (0.0, 0.0))
            >>> transform.depth_to_original(torch.full((2, 2), 3.0)).shape
            torch.Size([4, 4])
        """
        if tuple(depth.shape[-2:]) != self.network_size:
            raise ValueError(
                f"got a map of {list(depth.shape)}; the network input of this image is [..., {self.network_size[0]}, "
                f"{self.network_size[1]}]; pass the prediction unchanged"
            )
        (top, bottom, weight_y, seen_y), (left, right, weight_x, seen_x) = self._axes(depth.device)
        weight_y, weight_x = weight_y.to(depth.dtype)[:, None], weight_x.to(depth.dtype)
        rows = torch.lerp(depth[..., top, :], depth[..., bottom, :], weight_y)
        values = torch.lerp(rows[..., left], rows[..., right], weight_x)
        return values.masked_fill(~(seen_y[:, None] & seen_x[None, :]), 0.0)

    def nearest_to_original(
        self,
        values: Tensor,  # [H, W]
    ) -> Tensor:  # [H0, W0]
        """The value of the pixel of the network input that shows each original pixel; 0 where none does."""
        height, width = self.original_size
        (left, top, right, bottom), pixels = self.content_box, pixel_grid(height, width, dtype=torch.float64)
        network = self.pixels_to_network(pixels)
        column = network[..., 0].floor().long().clamp(left, right - 1)
        row = network[..., 1].floor().long().clamp(top, bottom - 1)
        return values[row, column].masked_fill(~self.seen_mask(), 0)

    def conf_to_original(
        self,
        conf: Tensor,  # [..., H, W]
    ) -> Tensor:  # [..., H0, W0]
        """Resample a confidence map like a depth map; 0 where the network did not see the original image."""
        return self.depth_to_original(conf)

    def _axes(self, device: torch.device | str | None) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
        """For rows, then columns: both neighbours of every original pixel, their weight, and whether it was seen."""
        left, top, right, bottom = self.content_box
        (height, width), (scale_x, scale_y), (offset_x, offset_y) = self.original_size, self.scale, self.offset
        return (
            _interpolation(height, scale_y, offset_y, top, bottom, device),
            _interpolation(width, scale_x, offset_x, left, right, device),
        )


def _interpolation(
    size: int, scale: float, offset: float, low: int, high: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [size]
    """Linear interpolation along one axis inside [low, high): lower and upper index, weight of the upper, seen."""
    position = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * scale + offset
    seen = (position >= low) & (position <= high)
    index = (position - 0.5).clamp(low, high - 1)
    # At the centre of a pixel, up to rounding, its neighbour is ignored: NaN times 0 would be NaN.
    centre = index.round()
    index = torch.where((index - centre).abs() < _SAME_PLACE, centre, index)
    lower = index.floor()
    weight = index - lower
    return lower.long(), (lower + (weight > 0)).long(), weight, seen
