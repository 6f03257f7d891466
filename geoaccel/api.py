"""The verbs: put methods into a model's slots, take them out again, describe what is there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from geoaccel.attention import DENSE, DenseMixer, Mixer
from geoaccel.attention_kernels import KERNELS, ROUNDING
from geoaccel.backbone import Backbone, descriptor_of, require_module
from geoaccel.cost import HEADS
from geoaccel.description import Action, Description
from geoaccel.errors import UserError, UserTypeError
from geoaccel.linears import quantized_linears
from geoaccel.merging.calibration import rates_for
from geoaccel.merging.gain import Setting
from geoaccel.merging.layers import Layers
from geoaccel.merging.method import (
    MERGING,
    AttentionMerging,
    Effect,
    Merging,
    MergingMixer,
    MergingPacker,
    SpanMerging,
)
from geoaccel.merging.rates import Kind
from geoaccel.models.weights import adopt
from geoaccel.quantization.method import QUANTIZATION, Quantization
from geoaccel.quantization.swap import check_replaceable, prepare, quantized_parts, restore_linears
from geoaccel.registry import Registry
from geoaccel.runtime import auto_dtype
from geoaccel.tuned import TunedPlan


def list_merging() -> list[str]:
    """Names of the merging methods in this version."""
    return sorted(MERGING)


def list_quantization() -> list[str]:
    """Names of the quantization methods in this version."""
    return sorted(QUANTIZATION)


def accelerate(
    model: nn.Module,
    *,
    merging: str | Merging | Sequence[str | Merging] | None = None,
    quantization: str | Quantization | Sequence[str | Quantization] | None = None,
    attention: str | None = None,
    layers: Mapping[Any, Any] | str | Layers | None = None,
    plan: str | os.PathLike[str] | TunedPlan | None = None,
    keep_original: bool = False,
) -> nn.Module:
    """Return the model with other attention kernels, merged tokens or quantized weights.

    Works in place: the returned model is the one given; :func:`geoaccel.accelerated` undoes it at the end of a block.
    Replaces what an earlier call put in. Parameters and state-dict keys stay as they are, except in quantized layers:
    their ``weight`` becomes ``weight_q`` and its scales, and the float weights are freed.

    Example:
        >>> model = geoaccel.load_model("vggt-mini")
        >>> model = geoaccel.accelerate(model, merging="fastvggt")
        >>> model = geoaccel.accelerate(model, merging=geoaccel.merging.LiteVGGT(ratio=0.5))
        >>> model = geoaccel.accelerate(model, merging="fastvggt", quantization="w4a16")
        >>> model = geoaccel.accelerate(model, merging="httm", layers={0: None, "2-3": "frame-only"})

    Args:
        model: A geoaccel model, or an upstream model object, which is adopted first.
        merging: A name from :func:`list_merging`, a method object with its knobs, or a list of methods that act in
            different places.
        quantization: A name from :func:`list_quantization`, a method object with its knobs, or a list of methods for
            different layers. A model without its float weights stays quantized if this is None or the same method
            again.
        attention: Kernel of every attention: ``sdpa`` (torch's fused kernels, the default), ``xformers`` (on CUDA),
            ``matmul`` (unfused reference; for comparisons, and for training short sequences on a CPU) or ``fp8`` (both
            products in e4m3, NVIDIA from compute capability 8.9 on; emulated and slower on a CPU; no gradients; the
            attentions of the heads keep ``sdpa``).
        layers: A method, or None, for single layers of global attention, instead of ``merging`` there; see
            :mod:`geoaccel.merging.layers`.
        plan: A plan file from ``geoaccel tune``, instead of ``merging``, ``layers`` and ``quantization``; refused for
            weights other than those it was made for.
        keep_original: Keep the float weights beside the quantized ones, so that the model can be quantized differently
            or restored.

    Raises:
        ValueError: For an unknown name or layer, two methods that act in the same place, a method that cannot work on
            this model, a plan for other weights, or a model that would have to be quantized twice.
        TypeError: If ``model``, ``merging`` or ``quantization`` is something else.
    """
    require_module(model)
    kernel = "sdpa" if attention is None else _known_kernel(attention)
    methods = _methods(merging)
    quantizations = _quantizations(quantization)
    chosen = Layers.read(layers)
    for method in chosen.methods:  # each beside what acts on the token stream
        _methods([*(span for span in methods if isinstance(span, SpanMerging)), method])
    _check_kernel([*methods, *chosen.methods], kernel)
    if not isinstance(getattr(model, "backbone", None), Backbone):
        model = adopt(model)
    if plan is not None:
        if methods or quantizations or chosen:
            raise UserError("a plan already sets merging, layers and quantization; leave them out, or leave out plan")
        tuned = TunedPlan.read(plan)
        tuned.check_weights(model)
        chosen, quantizations = tuned.layers, list(tuned.quantization)
    if getattr(model, "sharing", None) is not None:
        raise UserError("this model is split over several processes; call restore, then accelerate, then parallel")
    # Everything that can fail comes before the first slot changes.
    spans = [method.packer(model) for method in methods if isinstance(method, SpanMerging)]
    own = descriptor_of(model).sites(model)
    sites = own["global"]
    everywhere = next((method for method in methods if isinstance(method, AttentionMerging)), None)
    mixers = chosen.mixers(kernel, len(sites), everywhere) if chosen or everywhere is not None else []
    if methods or chosen.methods:
        _put_in_setting(model, spans, [mixer for mixer in mixers if isinstance(mixer, MergingMixer)])
        rates_for(rates_kind(model, kernel))  # measured here rather than within the first forward
    put_linears = prepare(model, quantizations, keep_original=keep_original)
    _clear_slots(model)
    put_linears()
    trunk = {id(site) for kind in own for site in own[kind]}
    for site in _attentions(model):
        rounded = kernel in ROUNDING and id(site) not in trunk
        site.mixer = DENSE if rounded or kernel == DENSE.kernel else DenseMixer(kernel)
    for packer in spans:
        for owner in _with_packer(model):
            owner.token_packer = packer
    for site, mixer in zip(sites, mixers, strict=True) if mixers else ():
        site.mixer = mixer  # type: ignore[assignment]
    return model


def check_methods(
    *,
    merging: str | Merging | Sequence[str | Merging] | None = None,
    quantization: str | Quantization | Sequence[str | Quantization] | None = None,
    attention: str | None = None,
) -> None:
    """Raise what :func:`accelerate` would raise for these on any model."""
    methods = _methods(merging)
    _quantizations(quantization)
    if attention is not None:
        _check_kernel(methods, _known_kernel(attention))


def restore(model: nn.Module) -> nn.Module:
    """Make the model dense again, bit for bit; in place.

    Raises:
        ValueError: If its linears were quantized without ``keep_original``; ``accelerate(model)`` then removes
            everything else.
    """
    require_module(model)
    if (sharing := getattr(model, "sharing", None)) is not None:
        sharing.undo()  # first: accelerate, which is the remedy for what is refused, takes no model of a group
    check_replaceable(model, "accelerate(model), which removes everything else")
    _clear_slots(model)
    restore_linears(model)
    return model


def _clear_slots(model: nn.Module) -> None:
    for site in _attentions(model):
        site.mixer = DENSE
    for owner in _with_packer(model):
        owner.token_packer = None


def place_mixer(model: nn.Module, mixer: Mixer, kind: str = "global") -> nn.Module:
    """Put one mixer into every attention of a kind; for experiments.

    Args:
        model: A geoaccel model.
        mixer: Used by all sites.
        kind: ``encoder``, ``frame`` or ``global``.

    Raises:
        ValueError: For an unknown kind.
    """
    for site in Registry("kind of attention", descriptor_of(model).sites(model))[kind]:
        site.mixer = mixer  # type: ignore[assignment]
    return model


def describe(model: nn.Module) -> Description:
    """Report which methods act where, and what they did in the last forward."""
    backbone = descriptor_of(model)
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    parts = quantized_parts(model)
    for part in parts:
        dtypes[part.method.name] += part.weights
    for layer in quantized_linears(model).values():
        if layer.bias is not None:
            dtypes[str(layer.bias.dtype).removeprefix("torch.")] += layer.bias.numel()
    sites = backbone.sites(model)
    placed = {id(site) for kind in sites for site in sites[kind]}
    heads = [site for site in _attentions(model) if id(site) not in placed]
    groups = {**sites, **({"head": heads} if heads else {})}
    mixers = {kind: dict(Counter(_name(site.mixer) for site in group)) for kind, group in groups.items()}
    acting = [site.mixer for kind in sites for site in sites[kind]]
    acting += [owner.token_packer for owner in _with_packer(model)]
    actions = tuple(_actions(acting, sites["global"]))
    kernels = [mixer.kernel for mixer in acting if isinstance(mixer, MergingMixer)]
    device = next(model.parameters(), torch.empty(0)).device
    return Description(
        backbone=backbone.name,
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        device=str(device),
        heads=tuple(model.heads),  # type: ignore[arg-type]
        mixers=mixers,
        merging=actions,
        quantization=tuple(parts),
        rates=str(rates_for(rates_kind(model, kernels[0] if kernels else "sdpa"))) if actions else None,
        auto="{} ({})".format(*auto_dtype(str(device), ask=False)) if device.type in ("cpu", "cuda") else None,
    )


def _listed(given: Any) -> Sequence[Any]:
    """None, one thing, or a list or tuple of things, as a sequence of them."""
    if given is None:
        return ()
    return given if isinstance(given, list | tuple) else (given,)


def _methods(merging: str | Merging | Sequence[str | Merging] | None) -> list[Merging]:
    """The requested methods, each acting in a different place."""
    methods: list[Merging] = []
    for item in _listed(merging):
        method = MERGING[item]() if isinstance(item, str) else item
        if not isinstance(method, AttentionMerging | SpanMerging):
            given = (
                f"the class {item.__name__}; call it" if isinstance(item, type) else f"{type(item).__name__} {item!r}"
            )
            raise UserTypeError(f"merging takes a name, a method such as FastVGGT(), or a list of them, got {given}")
        for other in methods:
            if other.place == method.place:
                raise UserError(f"{other.name} and {method.name} both merge in the {method.place}; choose one")
            inner = method if isinstance(method, AttentionMerging) else other
            if isinstance(inner, AttentionMerging) and not inner.takes_packed:
                outer = other if inner is method else method
                raise UserError(
                    f"{inner.name} needs dense tokens, which {outer.name} packs, so the two cannot be combined; "
                    "choose one"
                )
        methods.append(method)
    return methods


def _check_kernel(methods: Sequence[Merging], kernel: str) -> None:
    """Refuse a kernel that cannot do what a method needs."""
    for method in methods:
        if isinstance(method, AttentionMerging) and method.own_keys and kernel in ROUNDING:
            raise UserError(
                f"{method.name} gives every query a key of its own, which attention={kernel!r} cannot do; "
                "choose attention='sdpa' or another method"
            )


def _quantizations(
    quantization: str | Quantization | Sequence[str | Quantization] | None,
) -> list[Quantization]:
    """The requested methods; the layers of each are chosen on the model."""
    methods = []
    for item in _listed(quantization):
        method = QUANTIZATION[item]() if isinstance(item, str) else item
        if not isinstance(method, Quantization):
            raise UserTypeError(f"quantization takes a name, a method such as W4A16(), or a list of them, got {item!r}")
        methods.append(method)
    return methods


def _actions(acting: Iterable[Any], sites: Sequence[Any]) -> Iterator[Action]:
    """The mixers and packers that merge, grouped by method; ``sites`` are the global attentions."""
    groups: dict[Merging, list[Effect]] = {}
    for thing in acting:
        if isinstance(thing, MergingMixer | MergingPacker):
            groups.setdefault(thing.method, []).extend([] if thing.effect is None else [thing.effect])
    for method, effects in groups.items():
        layers = tuple(i for i, site in enumerate(sites) if getattr(site.mixer, "method", None) == method)
        everywhere = isinstance(method, SpanMerging) or len(layers) == len(sites)
        yield Action(method.place, method, tuple(effects), None if everywhere else layers)


def _name(mixer: Any) -> str:
    """A mixer in one word: a method's registered name, or the mixer itself."""
    return mixer.method.name if isinstance(mixer, MergingMixer) else repr(mixer)


def _attentions(model: nn.Module) -> Iterator[Any]:
    """Every module with a mixer slot, those of the heads included."""
    return (module for module in model.modules() if hasattr(module, "mixer"))


def _with_packer(model: nn.Module) -> Iterator[Any]:
    """Every module with a slot for a token packer."""
    return (module for module in model.modules() if hasattr(module, "token_packer"))


def _put_in_setting(model: nn.Module, packers: Sequence[MergingPacker], mixers: Sequence[MergingMixer]) -> None:
    """Give merging mixers and packers the setting of their network, with which they predict the speedup."""
    network: Any = model
    patch = network.trunk.patch_size
    side = max(1, network.preprocess.size // patch)
    heads = network.cost(1, (side * patch, side * patch)).parts[HEADS] / side**2
    setting = Setting(network.trunk, heads)
    for packer in packers:
        setting = replace(setting, packed_from=(packer.layer + 1) / network.trunk.encoder_blocks)
        packer.setting = setting
    for mixer in mixers:
        mixer.setting = setting


def rates_kind(model: nn.Module, kernel: str = "sdpa") -> Kind:
    """The kind of rates that apply to a model in its present state."""
    backbone = descriptor_of(model)
    site: Any = backbone.sites(model)["global"][0]
    weight: Any = model.get_submodule(backbone.patch_embedding).weight
    return Kind(weight.device, weight.dtype, site.num_heads * site.head_dim, site.head_dim, kernel)


def _known_kernel(name: str) -> str:
    KERNELS[name]
    return name
