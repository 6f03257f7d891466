"""Loading and saving checkpoints: the package's own, unmodified upstream files, and a user's upstream object.

Loading is strict and never holds two copies of the weights: the network is built on the meta device, and the tensors of
the file (:mod:`geoaccel.models.files`) become its parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.atomic import write_tensors
from geoaccel.backbone import Backbone, require_module
from geoaccel.errors import UserError, UserTypeError
from geoaccel.linears import records, shape_from_records, stored_dtypes
from geoaccel.models import BACKBONES, shards
from geoaccel.models.files import (
    from_transformer_engine,
    json_object,
    read_tensors,
    resolve,
    weights_only,
    without_wrappers,
)
from geoaccel.precision import cast
from geoaccel.runtime import pick_device


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a checkpoint, in eval mode.

    A quantized one (``geoaccel quantize export``) loads directly: the float weights are never materialised.

    Args:
        name_or_path: A name from :func:`geoaccel.list_models`, a hub id such as ``facebook/VGGT-1B``, a
            ``.safetensors`` or ``.pt`` file, or a folder that holds one named ``model``, or several with their index
            (``model.safetensors.index.json``).
        device: Where the weights go: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``; the CPU by default.
        dtype: Precision of the weights; float32 by default. In a narrower one the heads stay in float32, as upstream
            runs them. Quantized weights keep their codes.

    Raises:
        ValueError: For an unknown name, a file without weights, tensors that are missing, unexpected or of another
            shape, or a device that this machine lacks.
        TypeError: If it is not a name or path, or ``dtype`` is not a floating-point type of torch.
        FileNotFoundError: For a path that does not exist.
    """
    device = "cpu" if device is None else pick_device(device)
    dtype = _float_dtype(dtype)
    model = open_model(name_or_path)
    return cast(model, dtype).to(device).eval()


def _float_dtype(dtype: Any) -> torch.dtype:
    """Reject unsuitable dtypes before a file is read."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    raise UserTypeError(
        f"dtype={dtype!r} is not a dtype for weights; give torch.float32, torch.bfloat16 or torch.float16 "
        "(for fewer bits: accelerate(model, quantization=...))"
    )


def open_model(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """As `load_model`, but with the tensors exactly as in the file, memory-mapped."""
    path = resolve(name_or_path)
    tensors, metadata = read_weights(path)
    backbone = recognise(tensors, metadata, path)
    tensors = dict(backbone.from_upstream(tensors))
    model = _without_memory(backbone, read_config(backbone, tensors, metadata, path), path)
    if "quantization" in metadata:
        shape_from_records(model, metadata["quantization"], str(name_or_path))
    assign(model, tensors, str(name_or_path))
    return model.eval()


def backbone_of(name_or_path: str | os.PathLike[str]) -> Backbone:
    """The backbone of a checkpoint, without building the network."""
    path = resolve(name_or_path)
    tensors, metadata = read_weights(path)
    return recognise(tensors, metadata, path)


def quantized_by(name_or_path: str | os.PathLike[str]) -> list[str]:
    """Names of the methods by which a checkpoint is quantized already, without its network."""
    _, metadata = read_tensors(resolve(name_or_path))
    return [record["name"] for record in json.loads(metadata.get("quantization", "[]"))]


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) of a file under our names, and its metadata; raises as `read_tensors`."""
    tensors, metadata = read_tensors(path)
    return from_transformer_engine(without_wrappers(tensors, path)), metadata


def history(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Provenance of the weights that these were made from, oldest first; shared ancestors of averages appear once."""
    before = provenance.get("source_provenance", [])
    found: list[dict[str, Any]] = []
    for source in [before] if isinstance(before, Mapping) else before:
        own = {key: value for key, value in source.items() if key != "source_provenance"}
        found += [made for made in (*history(source), own) if made not in found]
    return found


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file that :func:`load_model` reads without further arguments.

    Args:
        model: A network of :func:`geoaccel.models.build`, its linears quantized or not.
        path: Output file; written under a temporary name and renamed.
        dtype: Of every tensor in the file except quantized weights and the network's own constants (pi3's image mean
            and standard deviation), which stay in float32.
        provenance: How the weights were made; stored in the metadata as JSON.

    Raises:
        ValueError: If a tensor has values that the dtype cannot represent.
        OSError: If the file cannot be written; no partial file is left, and an earlier one stays.
    """
    require_module(model)
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    stored = {name: torch.float32 for name, _ in model.named_buffers(recurse=False)} | stored_dtypes(model)
    tensors = {
        name: _as_stored(name, tensor.detach().cpu(), stored.get(name, dtype))
        for name, tensor in model.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "backbone": backbone.name,
        "config": json.dumps(model.config.to_dict()),  # type: ignore[operator, union-attr]
        "provenance": json.dumps(dict(provenance or {})),
    }
    if made := records(model):
        metadata["quantization"] = json.dumps(made)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    write_tensors(path, tensors, metadata)


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if bool((tensor.isfinite() & ~found.isfinite()).any()):
        raise UserError(f"{name} has values too large for {dtype}; save in torch.bfloat16 or torch.float32")
    return found


def adopt(upstream_model: nn.Module) -> nn.Module:
    """Wrap an upstream model object in our network, sharing its parameter tensors.

    The object is recognised by the names of its class and of its children, never by import; fine-tuned models with the
    same module tree work, too. Nothing is copied: a change to one shows in the other.

    Args:
        upstream_model: Of a class that a backbone knows (``class_names``), such as ``vggt.models.vggt.VGGT``
            (LiteVGGT's, of Transformer Engine's layers, too) or ``pi3.models.pi3.Pi3``, or of a subclass. A network of
            this package is returned unchanged.

    Raises:
        ValueError: If it is another kind of object, or has parameters that our network lacks.
    """
    require_module(upstream_model)
    ours = getattr(upstream_model, "backbone", None)
    if isinstance(ours, Backbone) and type(upstream_model) is ours.network:
        return upstream_model
    own_name = type(upstream_model).__name__
    backbone = _named_like(upstream_model)
    children = {name for name, _ in upstream_model.named_children()}
    missing = [child for child in backbone.children if child not in children]
    if missing:
        raise UserError(
            f"{own_name} has the class name of {backbone.name} but no child {missing[0]!r}; its children: "
            f"{', '.join(sorted(children))}"
        )
    try:
        config = backbone.config_from_module(upstream_model)
    except AttributeError as error:
        raise UserError(f"{own_name} has the class name of {backbone.name} but another structure: {error}") from error
    with torch.device("meta"):
        model = backbone.build(**config)
    tensors = weights_only(backbone.from_upstream(upstream_model.state_dict(keep_vars=True)))
    assign(model, from_transformer_engine(tensors), own_name)
    return model.train(upstream_model.training)


def _named_like(upstream_model: nn.Module) -> Backbone:
    """The backbone whose class the object is or inherits from, nearest ancestor first."""
    for cls in type(upstream_model).__mro__:
        for backbone in BACKBONES.values():
            if cls.__name__ in backbone.class_names:
                return backbone
    known = ", ".join(name for backbone in BACKBONES.values() for name in backbone.class_names)
    raise UserError(f"cannot adopt a {type(upstream_model).__name__}; known classes: {known}, and their subclasses")


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Backbone:
    """The backbone of a checkpoint, from its metadata or else its tensor names.

    If several fit, the one with the most children: a successor often has all of its predecessor's.
    """
    if "backbone" in metadata:
        try:
            return BACKBONES[metadata["backbone"]]
        except UserError as error:
            raise UserError(f"{path} is a checkpoint of an {error}") from None
    fitting = [backbone for backbone in BACKBONES.values() if backbone.owns(backbone.from_upstream(tensors))]
    if fitting:
        return max(fitting, key=lambda backbone: len(backbone.children))
    example = next(iter(tensors), "none")
    raise UserError(
        f"{path} is not a checkpoint of a known backbone (first tensor: {example}); known: {', '.join(BACKBONES)}"
        + (shards.hint(path) or _hidden_behind_a_prefix(tensors))
    )


def _hidden_behind_a_prefix(tensors: Mapping[str, Tensor]) -> str:
    """A hint when a backbone's tensors exist under a prefix of no known framework."""
    for prefix in dict.fromkeys(name.partition(".")[0] + "." for name in tensors):
        inner = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if any(backbone.owns(inner) for backbone in BACKBONES.values()):
            return f"; the tensors under {prefix} are one of them: save only those, without that prefix"
    return ""


def read_config(
    backbone: Backbone, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> dict[str, Any]:
    """Configuration from the file's metadata, a config.json next to it, or the published size."""
    try:
        config = backbone.config_from_names(tensors)
    except KeyError as error:
        raise UserError(
            f"{path} lacks the tensor {error.args[0]} of {backbone.name}: it is incomplete; download it again, or save "
            f"the whole network{shards.hint(path)}"
        ) from None
    known = backbone.config.names()
    if "config" in metadata:
        return {**config, **json_object(metadata["config"], f"the configuration in {path}")}
    beside = path.with_name("config.json")
    if beside.is_file():
        given = json_object(beside.read_text(encoding="utf-8-sig", errors="replace"), str(beside))
        # The hub's config.json also has upstream constructor arguments that we express differently.
        config |= {name: value for name, value in given.items() if name in known}
    return config


def _without_memory(backbone: Backbone, config: Mapping[str, Any], path: Path) -> nn.Module:
    """Build the network on the meta device, from a configuration that came with a file and may be invalid."""
    try:
        with torch.device("meta"):
            return backbone.build(**config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the configuration of {path} is not valid for {backbone.name}: {reason}") from error


def assign(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Make the tensors the model's parameters, strictly.

    Raises:
        ValueError: If any is missing, unexpected or of another shape; the message has the count and an example of each.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shaped = [name for name in expected if name in tensors and expected[name].shape != tensors[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors missing (first: {missing[0]})")
    if extra:
        problems.append(f"{len(extra)} unexpected (first: {extra[0]})")
    if shaped:
        name = shaped[0]
        problems.append(
            f"{len(shaped)} of another shape (first: {name} is {list(tensors[name].shape)}, "
            f"expected {list(expected[name].shape)})"
        )
    retyped = [name for name, dtype in stored_dtypes(model).items() if name in tensors and tensors[name].dtype != dtype]
    if retyped:
        name = retyped[0]
        problems.append(
            f"{len(retyped)} of another type (first: {name} is {tensors[name].dtype}, expected {expected[name].dtype})"
        )
    if problems:
        backbone: Backbone = model.backbone  # type: ignore[assignment]
        raise UserError(
            f"{what} does not fit {backbone.name}: {'; '.join(problems)}. A network of another size needs its "
            "configuration in the file's metadata, where geoaccel.models.weights.save_model writes it, or in a "
            f"config.json next to it{shards.hint(Path(what))}"
        )
    for name, parameter in model.named_parameters():
        given = tensors[name]
        if isinstance(given, nn.Parameter):  # of an object that its owner may have frozen in part
            parameter.requires_grad_(given.requires_grad)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
