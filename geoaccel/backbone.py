"""Backbone descriptors, and the common form of predictions.

A backbone is one file: its network, its configuration, and its :class:`Backbone`, which holds every fact about it and
is registered by :func:`register`. No other file names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from geoaccel.conditions import Conditions
from geoaccel.errors import UserError, UserTypeError
from geoaccel.network_config import NetworkConfig
from geoaccel.registry import Registry

ARBITRARY, METRE, GIVEN = "arbitrary", "about a metre", "that of the given poses"
"""Units of poses, depth and points: different for each scene, learned by the network, or given."""


@dataclass(frozen=True)
class Geometry:
    """Predictions in geoaccel's conventions, the same for every backbone.

    Attributes:
        cam_from_world: Poses [B, S, 4, 4], OpenCV axes.
        intrinsics: [B, S, 3, 3] in pixels of the network input, pixel centres at half-integers.
        depth: z-depth [B, S, H, W] in the unit of the poses.
        points_world: The backbone's own points [B, S, H, W, 3] where it predicts them, else the unprojected depth.
        conf: [B, S, H, W], higher is more confident. Only its order within a scene is comparable across backbones.
    """

    cam_from_world: Tensor
    intrinsics: Tensor
    depth: Tensor
    points_world: Tensor
    conf: Tensor


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of images for a backbone.

    Attributes:
        mode: ``crop`` (width = size, centre-crop tall images), ``pad`` (long side = size, white padding to a square),
            ``budget`` (every image resized to the first one's aspect, at most ``max_pixels``), ``long`` (the same, the
            long side = size).
        size: Target width or long side in pixels, a multiple of ``patch_size``; unused by ``budget``.
        patch_size: Height and width are multiples of this.
        max_pixels: Upper bound on H * W, for ``budget`` only.
    """

    mode: Literal["crop", "pad", "budget", "long"] = "crop"
    size: int = 518
    patch_size: int = 14
    max_pixels: int = 255_000


@dataclass(frozen=True)
class Origin:
    """A checkpoint published on the Hugging Face hub, and its licence.

    Attributes:
        licence: Licence of the weights.
        commercial: Whether it allows commercial use.
        files: Names that the weights may have there, the preferred one first.
        note: How to get them, if that takes more than a download.
        config: Keywords of the configuration that differ from the defaults.
    """

    licence: str
    commercial: bool
    files: tuple[str, ...]
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CameraTokens:
    """A head in which the camera tokens of all frames attend to each other.

    It is called with the features of every layer, depth x [B, S, P, C], reads the first token of each frame in the
    last one, and returns a list of [B, S, n].

    Attributes:
        head: Name of the module.
        width: C, from the configuration.
    """

    head: str
    width: Callable[[Any], int]


@dataclass(frozen=True)
class FeatureStream:
    """The features that a multimodal host reads from a backbone: the output of one layer of its trunk.

    Attributes:
        layer: Maps the model and a layer, counted from 0 or from the end, to its index among the global attentions;
            None is the default of the hosts. Raises a ValueError for one that cannot be read.
        read: Maps the model, images [B, S, 3, H, W], that index, and whether to predict as well, to features
            [B, S, P, C], special tokens first, and the predictions of the same forward (if requested).
    """

    layer: Callable[[Any, int | None], int]
    read: Callable[[Any, Tensor, int, bool], tuple[Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class Conditioning:
    """Conditions that a backbone accepts besides images.

    Attributes:
        takes: Kinds of conditions, of ``poses``, ``intrinsics``, ``depths``.
        arguments: Maps checked conditions of one scene to keywords of the network's forward. Raises a UserError for a
            combination that the backbone does not take.
        settle: Adjusts the predictions if conditions were given.
        unit: Unit of the predictions then; None: the backbone's.
        together: All conditions or none must be given.
    """

    takes: tuple[str, ...]
    arguments: Callable[[Conditions], dict[str, Tensor]]
    settle: Callable[[Geometry, Conditions], Geometry] = lambda geometry, conditions: geometry
    unit: str | None = None
    together: bool = False


@dataclass(frozen=True)
class Split:
    """How the frames of one scene can be split over several processes (:func:`geoaccel.parallel`).

    Attention over the whole scene (``sites``) exchanges keys and values; everything else must process one frame at a
    time, with the exceptions named here.

    Attributes:
        over_frames: Patterns of the attentions outside of ``sites`` whose sequence is one token of each frame.
        reference: Module that treats the first frame of a scene differently if its flag ``holds_reference`` is true;
            None: there is none.
    """

    over_frames: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Descriptor of one backbone: everything specific to it, defined next to its network.

    Names of modules are dotted paths from the network; patterns have ``*`` for any text, dots too.

    Attributes:
        name: Registered name; its golden file is ``tests/data/<name>_tiny.safetensors``.
        network: Class of the network, a :class:`geoaccel.models.network.Network`; takes the configuration.
        config: Class of the configuration.
        tiny: A very small configuration, for tests with random weights.
        class_names: Names of upstream's classes that :func:`geoaccel.adopt` takes.
        children: Submodules that such an object, and a checkpoint, must have.
        config_from_names: Infers keywords of the configuration from the tensors of a checkpoint that stores none.
        config_from_module: Keywords read from an upstream object.
        from_upstream: Maps tensors of a published file to ours; others stay as they are.
        geometry: Converts raw predictions and (H, W) to geoaccel's conventions.
        sites: The attention modules where tokens of a whole forward are mixed, by kind: ``encoder`` and ``frame``
            within one frame, before and between those that see the whole scene, which are ``global``.
        patch_embedding: Name of the convolution that embeds patches.
        quantizable: Patterns of the linear layers that quantization takes by default: the transformers, also
            those inside heads. Final layers, which map features to predictions, are not quantized.
        heads_in_float32: Names of the children that keep float32 when the network is cast to a narrower dtype.
        features: Features for a multimodal host.
        camera_tokens: Head that a compensation token can be added to; None if there is none.
        conditions: Conditions that it accepts; None: none.
        splitting: How to split a scene over several processes; None: not possible.
        unit: Unit of predicted poses, depth and points.
        origins: Hub ids of published checkpoints.
    """

    name: str
    network: type[nn.Module]
    config: type[NetworkConfig]
    tiny: NetworkConfig
    class_names: tuple[str, ...]
    children: tuple[str, ...]
    config_from_names: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    config_from_module: Callable[[nn.Module], dict[str, Any]]
    geometry: Callable[[Mapping[str, Tensor], tuple[int, int]], Geometry]
    sites: Callable[[nn.Module], dict[str, list[nn.Module]]]
    patch_embedding: str
    quantizable: tuple[str, ...]
    heads_in_float32: tuple[str, ...]
    features: FeatureStream
    from_upstream: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors
    camera_tokens: CameraTokens | None = None
    conditions: Conditioning | None = None
    splitting: Split | None = None
    unit: str = ARBITRARY
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def build(self, **config: Any) -> nn.Module:
        """Build a network with random weights.

        Raises:
            ValueError: For an unknown keyword, or sizes that do not fit.
        """
        return self.network(self.config.read(config, self.name))

    def owns(self, names: Collection[str]) -> bool:
        """Whether a checkpoint with these tensor names has all children of this backbone."""
        return all(any(name.startswith(child + ".") for name in names) for child in self.children)


def require_module(model: Any) -> None:
    """Refuse anything but a network, such as the name of a checkpoint.

    Raises:
        TypeError: In one line.
    """
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str | os.PathLike) else f"a {type(model).__name__}"
        raise UserTypeError(f"model is {given}; load it first: geoaccel.load_model(...)")


def descriptor_of(model: Any) -> Backbone:
    """The descriptor of a geoaccel network.

    Raises:
        TypeError: If it is not a network.
        ValueError: If it is not a geoaccel network.
    """
    require_module(model)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise _somebody_elses(model)
    return backbone


def require_network(model: Any) -> None:
    """Refuse anything but a geoaccel network.

    Raises:
        TypeError: If it is not a network.
        ValueError: If it is not a geoaccel network.
    """
    require_module(model)
    if not (hasattr(model, "backbone") and hasattr(model, "preprocess")):  # some foreign models have a `backbone`
        raise _somebody_elses(model)


def _somebody_elses(model: nn.Module) -> UserError:
    return UserError(f"a {type(model).__name__} is not a geoaccel model; wrap it with geoaccel.adopt(model) first")


BACKBONES: Registry[Backbone] = Registry("backbone", group="backbones")
"""Names to descriptors; each backbone registers itself."""


def register(backbone: Backbone) -> Backbone:
    """Register a backbone, and attach it to its network.

    Raises:
        ValueError: If its name is taken.
    """
    BACKBONES.register(backbone.name, backbone)
    setattr(backbone.network, "backbone", backbone)  # noqa: B010  # to type checkers any class of torch
    return backbone
