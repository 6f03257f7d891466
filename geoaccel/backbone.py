"""What the rest of the package knows about a backbone, and the one shape in which predictions leave it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from geoaccel.registry import Registry


@dataclass(frozen=True)
class Geometry:
    """Predictions in house conventions; here the differences between backbones end.

    Attributes:
        cam_from_world: Poses [B, S, 4, 4], OpenCV axes.
        intrinsics: [B, S, 3, 3] in pixels of the network input, pixel centres at half-integers.
        depth: z-depth [B, S, H, W] in the unit of the poses.
        points_world: The backbone's own points [B, S, H, W, 3] where it predicts them, else the unprojected depth.
        conf: [B, S, H, W], higher is surer. Only its order within a scene means the same for every backbone.
    """

    cam_from_world: Tensor
    intrinsics: Tensor
    depth: Tensor
    points_world: Tensor
    conf: Tensor


@dataclass(frozen=True)
class Preprocess:
    """How a backbone wants its photographs.

    Attributes:
        mode: ``crop`` (width = size, centre-crop tall images), ``pad`` (long side = size, white padding to a square),
            ``budget`` (pi3: every image resized to the first one's aspect, at most ``max_pixels``).
        size: Target width or long side in pixels, a multiple of ``patch_size``; unused by ``budget``.
        patch_size: Height and width are multiples of this.
        max_pixels: Upper bound on H * W, for ``budget`` only.
    """

    mode: Literal["crop", "pad", "budget"] = "crop"
    size: int = 518
    patch_size: int = 14
    max_pixels: int = 255_000


@dataclass(frozen=True)
class Origin:
    """Where a published checkpoint comes from and what its licence allows."""

    licence: str
    commercial: bool
    url: str
    files: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Backbone:
    """Descriptor of one backbone: every rule that holds for it alone, kept beside its network.

    Attributes:
        name: Registered name.
        network: Class of the network; its keyword arguments are the configuration.
        class_names: Names of upstream's classes that :func:`geoaccel.adopt` takes.
        children: Submodules that such an object must have.
        config_from_names: Configuration that a checkpoint without one must have been made with, from its tensor names.
        config_from_module: Configuration read off an upstream object.
        geometry: Raw predictions and (H, W) to house conventions.
        sites: Names of the attention modules where tokens of a whole forward are mixed, by kind.
        origins: Hub ids of published checkpoints.
    """

    name: str
    network: Callable[..., nn.Module]
    class_names: tuple[str, ...]
    children: tuple[str, ...]
    config_from_names: Callable[[Collection[str]], dict[str, Any]]
    config_from_module: Callable[[nn.Module], dict[str, Any]]
    geometry: Callable[[Mapping[str, Tensor], tuple[int, int]], Geometry]
    sites: Callable[[nn.Module], dict[str, list[nn.Module]]]
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def owns(self, names: Collection[str]) -> bool:
        """True if a checkpoint with these tensor names is one of this backbone."""
        return all(any(name.startswith(child + ".") for name in names) for child in self.children)


BACKBONES: Registry[Backbone] = Registry("backbone", group="geoaccel.backbones")
"""Names to descriptors; one registers itself beside its network."""
