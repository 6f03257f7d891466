"""Backbone descriptors, and the one form in which predictions leave a backbone.

A backbone is one file: its network, its configuration, and its :class:`Backbone`, which owns every fact about it and is
made known by :func:`register`. No other file names it.
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
"""Units of poses, depth and points: of each scene another, one that the network has learned, or one from outside."""


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
    """A checkpoint published on the Hugging Face hub, and what its licence allows.

    Attributes:
        licence: Of the weights.
        commercial: Whether it allows commercial use.
        files: Names that the weights may have there, the preferred one first.
        note: What one has to know to get them.
        config: Keywords of the configuration that are not the defaults.
    """

    licence: str
    commercial: bool
    files: tuple[str, ...]
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CameraTokens:
    """A head in which the camera tokens of all frames attend to each other.

    It is called with the features of every layer, depth x [B, S, P, C], reads the first token of each frame of the last
    one, and returns a list of [B, S, n].

    Attributes:
        head: Name of the module.
        width: C, from the configuration.
    """

    head: str
    width: Callable[[Any], int]


@dataclass(frozen=True)
class FeatureStream:
    """The features that a multimodal host reads of a backbone, from the output of one layer of its trunk.

    Attributes:
        layer: The model and a layer, counted from 0 or from the end, to its index among the global attentions; None is
            the one that hosts read by default. Raises a ValueError for one that cannot be read.
        read: The model, images [B, S, 3, H, W], that index, and whether to predict as well, to features [B, S, P, C],
            special tokens first, and the predictions of one and the same forward (none unless asked for).
    """

    layer: Callable[[Any, int | None], int]
    read: Callable[[Any, Tensor, int, bool], tuple[Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class Conditioning:
    """Conditions that a backbone accepts besides images.

    Attributes:
        takes: Kinds of conditions, of ``poses``, ``intrinsics``, ``depths``.
        arguments: Conditions of one scene, checked, to keywords of the network's forward. Raises a UserError for a mix
            that the backbone does not take.
        settle: Adjusts the predictions if conditions were given.
        unit: Of the predictions then; None: the backbone's.
        together: It takes all of them or none.
    """

    takes: tuple[str, ...]
    arguments: Callable[[Conditions], dict[str, Tensor]]
    settle: Callable[[Geometry, Conditions], Geometry] = lambda geometry, conditions: geometry
    unit: str | None = None
    together: bool = False


@dataclass(frozen=True)
class Split:
    """How the frames of one scene can be split over several processes (:func:`geoaccel.parallel`).

    Attention over the whole scene (``sites``) exchanges keys and values; everything else must see one frame at a time,
    but for what is named here.

    Attributes:
        over_frames: Patterns of the attentions outside of ``sites`` whose sequence is one token of each frame.
        reference: Module that treats the first frame of a scene in another way, where its flag ``holds_reference`` is
            true; None: there is none.
    """

    over_frames: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Descriptor of one backbone: every rule that holds for it alone, kept beside its network.

    Names of modules are dotted paths from the network; patterns have ``*`` for any text, dots too.

    Attributes:
        name: Registered name; its golden file is ``tests/data/<name>_tiny.safetensors``.
        network: Class of the network, a :class:`geoaccel.models.network.Network`; takes the configuration.
        config: Class of the configuration.
        tiny: A configuration that is built and run in a moment, for tests with random weights.
        class_names: Names of upstream's classes that :func:`geoaccel.adopt` takes.
        children: Submodules that such an object, and a checkpoint, must have.
        config_from_names: Keywords of the configuration that a checkpoint without one must have been made with, from
            its tensors by name.
        config_from_module: Keywords read off an upstream object.
        from_upstream: Tensors of a published file to ours; others stay as they are.
        geometry: Raw predictions and (H, W) to geoaccel's conventions.
        sites: The attention modules where tokens of a whole forward are mixed, by kind: ``encoder`` and ``frame``
            within one frame, before and between those that see the whole scene, which are ``global``.
        patch_embedding: Name of the convolution that makes patches of an image.
        quantizable: Patterns of the linear layers that quantization takes by default: the transformers, also
            those inside heads. The layers that make numbers of features stay as they are.
        heads_in_float32: Names of the children that keep float32 where the network is cast to a narrower dtype.
        features: What a multimodal host reads.
        camera_tokens: Head that a compensation token can be added to; None where there is none of that kind.
        conditions: Conditions that it accepts; None: none.
        splitting: How to split a scene over several processes; None: not possible.
        unit: Of poses, depth and points that it predicts.
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
        """A network with random weights.

        Raises:
            ValueError: For an unknown keyword, or sizes that do not fit.
        """
        return self.network(self.config.read(config, self.name))

    def owns(self, names: Collection[str]) -> bool:
        """True if a checkpoint with these tensor names has all children of this backbone."""
        return all(any(name.startswith(child + ".") for name in names) for child in self.children)


def require_module(model: Any) -> None:
    """Refuse what is no network, such as the name of a checkpoint.

    Raises:
        TypeError: In one line.
    """
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str | os.PathLike) else f"a {type(model).__name__}"
        raise UserTypeError(f"model is {given}; load it first: geoaccel.load_model(...)")


def descriptor_of(model: Any) -> Backbone:
    """The descriptor of one of our networks.

    Raises:
        TypeError: If it is no network.
        ValueError: If it is somebody else's.
    """
    require_module(model)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise _somebody_elses(model)
    return backbone


def require_network(model: Any) -> None:
    """Refuse what cannot be given photographs as our networks are.

    Raises:
        TypeError: If it is no network.
        ValueError: If it is somebody else's.
    """
    require_module(model)
    if not (hasattr(model, "backbone") and hasattr(model, "preprocess")):  # some of others' have a `backbone`
        raise _somebody_elses(model)


def _somebody_elses(model: nn.Module) -> UserError:
    return UserError(f"a {type(model).__name__} is no geoaccel model; wrap it with geoaccel.adopt(model) first")


BACKBONES: Registry[Backbone] = Registry("backbone", group="backbones")
"""Names to descriptors; one registers itself beside its network."""


def register(backbone: Backbone) -> Backbone:
    """Make a backbone known, and its network know it.

    Raises:
        ValueError: If its name is taken.
    """
    BACKBONES.register(backbone.name, backbone)
    setattr(backbone.network, "backbone", backbone)  # noqa: B010  # to type checkers any class of torch
    return backbone
