"""Checkpoints in and out: the package's own, upstream's files as they are, and a user's upstream object.

Loading is strict, needs no code from the checkpoint (``weights_only``), and never holds two copies of the weights: the
network is built without memory and each tensor of the file becomes its parameter.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from geoaccel.backbone import Backbone, Origin
from geoaccel.linears import records, shape_from_records, stored_dtypes
from geoaccel.models import BACKBONES
from geoaccel.registry import unknown

EMBEDDED = Path(__file__).parent / "checkpoints"
FILE_NAMES = ("model.safetensors", "model.pt")
# Files of training runs wrap the weights in one of these.
WRAPPERS = ("model", "state_dict", "model_state_dict")
# Transformer Engine, in which LiteVGGT publishes its weights, joins a block's second norm and its MLP in one module.
TRANSFORMER_ENGINE = {
    "normMlp.layer_norm_weight": "norm2.weight",
    "normMlp.layer_norm_bias": "norm2.bias",
    "normMlp.fc1_weight": "mlp.fc1.weight",
    "normMlp.fc1_bias": "mlp.fc1.bias",
    "normMlp.fc2_weight": "mlp.fc2.weight",
    "normMlp.fc2_bias": "mlp.fc2.bias",
}


def list_models() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.stem for path in EMBEDDED.glob("*.safetensors"))


def origins() -> dict[str, tuple[Backbone, Origin]]:
    """Published checkpoints by hub id."""
    return {
        hub_id: (backbone, origin) for backbone in BACKBONES.values() for hub_id, origin in backbone.origins.items()
    }


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a checkpoint, in eval mode.

    A quantized one (``geoaccel quantize export``) comes as it is: the float weights are never made.

    Args:
        name_or_path: A name from :func:`list_models`, a hub id such as ``facebook/VGGT-1B``, a ``.safetensors`` or
            ``.pt`` file, or a folder that holds one named ``model``.
        device: Where the weights go; the CPU by default.
        dtype: Of the weights; float32 by default. In a narrower one the heads stay in float32, as upstream runs them.
            Quantized weights stay in their codes.

    Raises:
        ValueError: For an unknown name, a file that is not weights, or tensors that are missing, unexpected or of
            another shape.
        FileNotFoundError: For a path that does not exist.
    """
    model = open_model(name_or_path)
    return cast(model, dtype or torch.float32).to(device or "cpu").eval()


def open_model(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """The network around the tensors of a checkpoint as they are in the file, memory-mapped; else as `load_model`."""
    path = resolve(name_or_path)
    tensors, metadata = read_tensors(path)
    tensors = from_transformer_engine(tensors)
    backbone = recognise(tensors, path)
    config = read_config(backbone, tensors, metadata, path)
    with torch.device("meta"):
        model = backbone.network(**config)
    if "quantization" in metadata:
        shape_from_records(model, metadata["quantization"], str(name_or_path))
    assign(model, tensors, str(name_or_path))
    return model.eval()


def history(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What made the weights that these were made from, oldest first; each once, though means share their ancestors."""
    before = provenance.get("source_provenance", [])
    found: list[dict[str, Any]] = []
    for source in [before] if isinstance(before, Mapping) else before:
        own = {key: value for key, value in source.items() if key != "source_provenance"}
        found += [made for made in (*history(source), own) if made not in found]
    return found


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file that :func:`load_model` reads without being told anything.

    Args:
        model: A network of :func:`geoaccel.models.build`, its linears quantized or not.
        path: The file; written under a temporary name and renamed.
        dtype: Of every tensor in the file but quantized weights, and the network's own constants (pi3's mean and
            standard deviation of images), which stay in float32.
        provenance: How the weights came about; kept in the metadata as JSON.

    Raises:
        OSError: If the file cannot be written; nothing is left of it, and an earlier one stays.
    """
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    stored = {name: torch.float32 for name, _ in model.named_buffers(recurse=False)} | stored_dtypes(model)
    tensors = {
        name: tensor.detach().cpu().to(stored.get(name, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "backbone": backbone.name,
        "config": json.dumps(model.config),
        "provenance": json.dumps(dict(provenance or {})),
    }
    if made := records(model):
        metadata["quantization"] = json.dumps(made)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        reason = (getattr(error, "strerror", None) or " ".join(str(error).split())).lower()
        raise OSError(f"cannot write {path} ({reason}); make room, or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def adopt(upstream_model: nn.Module) -> nn.Module:
    """Wrap an upstream object in our network, around the very same parameter tensors.

    The object is recognised by the names of its class and of its children, never by import; fine-tuned descendants with
    the same tree work too. Nothing is copied: a change to one shows in the other.

    Args:
        upstream_model: ``vggt.models.vggt.VGGT``, ``pi3.models.pi3.Pi3`` or a subclass.

    Raises:
        ValueError: If it is another kind of object, or has parameters that our network does not.
    """
    ancestry = [cls.__name__ for cls in type(upstream_model).__mro__]
    children = {name for name, _ in upstream_model.named_children()}
    for backbone in BACKBONES.values():
        if not set(backbone.class_names) & set(ancestry):
            continue
        missing = [child for child in backbone.children if child not in children]
        if missing:
            raise ValueError(
                f"{ancestry[0]} is named like {backbone.name} but has no child {missing[0]!r}; its children: "
                f"{', '.join(sorted(children))}"
            )
        try:
            config = backbone.config_from_module(upstream_model)
        except AttributeError as error:
            raise ValueError(f"{ancestry[0]} is named like {backbone.name} but built otherwise: {error}") from error
        with torch.device("meta"):
            model = backbone.network(**config)
        assign(model, upstream_model.state_dict(keep_vars=True), ancestry[0])
        return model.train(upstream_model.training)
    known = ", ".join(name for backbone in BACKBONES.values() for name in backbone.class_names)
    raise ValueError(f"cannot adopt a {ancestry[0]}; known classes: {known}, and their subclasses")


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file behind a name, a hub id, a folder or a path."""
    text = os.fspath(name_or_path)
    if text in list_models():
        return EMBEDDED / f"{text}.safetensors"
    path = Path(text).expanduser()
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"folder {text} holds no {' or '.join(FILE_NAMES)}; name the file itself")
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or path.is_absolute() or text.startswith((".", "~")):
        raise FileNotFoundError(f"no checkpoint at {text}")
    if text.count("/") == 1:
        return download(text)
    names = [*list_models(), *origins()]
    raise ValueError(unknown("model", text, names) + " (the path of a .safetensors or .pt file works too)")


def download(hub_id: str) -> Path:
    """Find a checkpoint in the hub's local cache, or fetch it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import logging

    known = origins().get(hub_id)
    files = known[1].files if known else FILE_NAMES
    for name in files:
        cached = try_to_load_from_cache(hub_id, name)
        if isinstance(cached, str):
            return Path(cached)
    if known is None and hub_id.casefold() in (name.casefold() for name in origins()):
        raise ValueError(unknown("hub id", hub_id, list(origins())))
    # The hub's warnings about retries would bury the one line that says what is wrong.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for name in files:
            path = _fetch(hub_id, name)
            if path is not None:
                return path
    finally:
        logging.set_verbosity(verbosity)
    raise ValueError(f"{hub_id} holds none of {', '.join(files)}; pass the path of the file")


def _meant(hub_id: str) -> str:
    """A hint for an id that is like a known one."""
    close = difflib.get_close_matches(hub_id, origins(), n=1) if hub_id not in origins() else []
    return f". Did you mean {close[0]!r}?" if close else ""


def _fetch(hub_id: str, name: str) -> Path | None:
    """One file of a hub repository; None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{hub_id} is not in the local cache and the hub cannot be reached: download it once where there is a "
            f"network, or pass the path of the file{_meant(hub_id)}"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then `hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        known = f"known hub ids: {', '.join(origins())}"
        raise ValueError(f"cannot download {hub_id}: {reason}; {known}{_meant(hub_id)}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata of a file.

    Raises:
        ValueError: If it is neither safetensors nor a pickle of plain tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); download it again") from error
    if _begins_as_zip(path) and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a complete checkpoint (its end is missing); download it again")
    try:
        # Only the zip format, torch's own since 1.6, can be mapped into memory.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of plain tensors (torch cannot read it without running code from the file); "
            "expected a state dict saved with torch.save, or a .safetensors file"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if isinstance(content, Mapping):
        # Scales of Transformer Engine's FP8, in a format of its own; not weights.
        content = {name: value for name, value in content.items() if not str(name).endswith("_extra_state")}
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, {}


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def from_transformer_engine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a Transformer Engine checkpoint (LiteVGGT's ``te_dict.pt``) to ours; others stay as they are.

    Its network differs from ours in two ways that no weight shows: the GELU is the tanh approximation (off by 5e-4 at
    most) and every norm's epsilon is 1e-5, the encoder's too. To be read with ``merging="litevggt"``.

    Raises:
        ValueError: If two tensors get one name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, dot, last = name.rpartition(".normMlp.")
        ours = (
            f"{block}.{TRANSFORMER_ENGINE['normMlp.' + last]}"
            if dot and f"normMlp.{last}" in TRANSFORMER_ENGINE
            else name
        )
        if ours in renamed:
            raise ValueError(f"the checkpoint holds {ours} twice, under that name and as {name}; keep one of them")
        renamed[ours] = tensor
    return renamed


def recognise(tensors: Mapping[str, Tensor], path: Path) -> Backbone:
    """The backbone that a checkpoint belongs to, by its tensor names."""
    for backbone in BACKBONES.values():
        if backbone.owns(tensors):
            return backbone
    example = next(iter(tensors), "none at all")
    raise ValueError(
        f"{path} is a checkpoint of no known backbone (first tensor: {example}); known: {', '.join(BACKBONES)}"
    )


def read_config(
    backbone: Backbone, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> dict[str, Any]:
    """Construction arguments: from the file's metadata, a config.json beside it, or the published size."""
    config = backbone.config_from_names(tensors)
    known = set(signature(backbone.network).parameters)
    if "config" in metadata:
        return {**config, **json.loads(metadata["config"])}
    beside = path.with_name("config.json")
    if beside.is_file():
        # The hub's config.json also has fields of upstream's constructor that we express otherwise.
        config |= {name: value for name, value in json.loads(beside.read_text()).items() if name in known}
    return config


def assign(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Make the tensors the model's parameters, strictly.

    Raises:
        ValueError: If any is missing, unexpected or of another shape; the message counts them and names one of each.
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
        raise ValueError(
            f"{what} does not fit {backbone.name}: {'; '.join(problems)}. A network of another size needs its "
            "configuration in the file's metadata or in a config.json beside it"
        )
    for name, parameter in model.named_parameters():
        given = tensors[name]
        if isinstance(given, nn.Parameter):  # of an object that its owner may have frozen in part
            parameter.requires_grad_(given.requires_grad)
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast in place, tensor by tensor; with a narrow dtype the heads and the network's own buffers keep float32."""
    for name, child in model.named_children():
        child.to(torch.float32 if name.endswith("_head") else dtype)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers(recurse=False):
        buffer.data = buffer.data.to(torch.promote_types(dtype, torch.float32))
    return model
