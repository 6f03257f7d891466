"""Checkpoint files: resolving a name, a hub id or a folder, and reading the tensors.

Reading runs no code from the file (``weights_only``), and memory-maps its tensors instead of copying them.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoaccel.backbone import Backbone, Origin
from geoaccel.errors import UserError, UserTypeError
from geoaccel.fingerprint import of_file
from geoaccel.models import BACKBONES, shards
from geoaccel.registry import unknown

EMBEDDED = Path(__file__).parent / "checkpoints"
FILE_NAMES = ("model.safetensors", "model.pt")
# Files of training runs wrap the weights in one of these.
WRAPPERS = ("model", "state_dict", "model_state_dict")
# Prefixes that training frameworks put before all names of a network: DistributedDataParallel, torch.compile, Lightning
# and its strategies. Those of FIT_ANYWHERE also occur inside names, where a submodule was wrapped.
AROUND = ("module.", "_orig_mod.", "model.", "_forward_module.", "_fsdp_wrapped_module.")
FIT_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Transformer Engine, used for LiteVGGT's published weights, fuses a block's second norm and its MLP into one module.
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


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file behind a name, a hub id, a folder or a path."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise UserTypeError(
            f"got a {type(name_or_path).__name__} as the model; give a name such as 'vggt-mini', a hub id or a path"
        )
    text = os.fspath(name_or_path)
    if not text.strip():
        raise UserError("the model name is empty; give a name such as 'vggt-mini', a hub id or a path")
    if text in list_models():
        return EMBEDDED / f"{text}.safetensors"
    path = Path(text).expanduser()
    if path.is_dir():
        for name in (*FILE_NAMES, shards.INDEX):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"folder {text} has no {' or '.join(FILE_NAMES)}, and no {shards.INDEX}; give the path of the file itself"
        )
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or path.is_absolute() or text.startswith((".", "~")):
        raise FileNotFoundError(f"no checkpoint at {text}")
    if text.count("/") == 1:
        return download(text)
    names = [*list_models(), *origins()]
    raise UserError(unknown("model", text, names) + " (the path of a .safetensors or .pt file works too)")


def fingerprint(name_or_path: str | os.PathLike[str]) -> str:
    """Fingerprint of a checkpoint's contents, to detect other weights under the same name."""
    path = resolve(name_or_path)
    return shards.fingerprint(path) if shards.is_index(path) else of_file(path)


def download(hub_id: str) -> Path:
    """Find a checkpoint in the hub's local cache, or fetch it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import logging

    known = origins().get(hub_id)
    files = known[1].files if known else (*FILE_NAMES, shards.INDEX)
    for name in files:
        cached = try_to_load_from_cache(hub_id, name)
        if isinstance(cached, str) and (not shards.is_index(Path(cached)) or shards.is_whole(Path(cached))):
            return Path(cached)
    if known is None and hub_id.casefold() in (name.casefold() for name in origins()):
        raise UserError(unknown("hub id", hub_id, list(origins())))
    # The hub's warnings about retries would bury our one-line error.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if known is None:
            _fetch(hub_id, "config.json")  # sizes; before the weights, as cached weights end the search
        for name in files:
            path = _fetch(hub_id, name)
            if path is None:
                continue
            if shards.is_index(path):
                shards.fetch_files(path, functools.partial(_fetch, hub_id))
            return path
    finally:
        logging.set_verbosity(verbosity)
    raise UserError(f"{hub_id} has none of {', '.join(files)}; give the path of a downloaded file")


def _meant(hub_id: str) -> str:
    """A hint if the id resembles a known one."""
    close = difflib.get_close_matches(hub_id, origins(), n=1) if hub_id not in origins() else []
    return f". Did you mean {close[0]!r}?" if close else ""


def _fetch(hub_id: str, name: str) -> Path | None:
    """One file of a hub repository; None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{hub_id} is not in the local cache and the hub cannot be reached: download it once with network access, "
            f"or give the path of the file; for trials, vggt-mini is part of the package{_meant(hub_id)}"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then `hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        known = f"known hub ids: {', '.join(origins())}"
        raise UserError(f"cannot download {hub_id}: {reason}; {known}{_meant(hub_id)}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata of a file.

    Raises:
        ValueError: If it is neither safetensors nor a pickle of plain tensors.
    """
    if shards.is_index(path):
        return _joined(shards.check_files(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _begins_as_zip(path) and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a complete checkpoint (its end is missing); download it again")
    try:
        # Only the zip format, torch's own since 1.6, can be mapped into memory.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{path} is not a checkpoint of plain tensors (torch cannot read it without running code from the file); "
            "give a state dict saved with torch.save, or a .safetensors file"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if isinstance(content, Mapping):
        content = weights_only(content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} contains a {type(content).__name__}; expected a state dict of tensors")
    return dict(content), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def _joined(files: Iterable[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of several files."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        own, said = _read_safetensors(path)
        if twice := tensors.keys() & own.keys():
            raise UserError(f"{path} contains {min(twice)}, and so does another file of the checkpoint; save it again")
        tensors |= own
        metadata |= said
    return tensors, metadata


def without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Strip the prefixes of training frameworks from the names (`AROUND`, nested in any order).

    Names that a backbone itself uses are kept.

    Raises:
        ValueError: If only some names have such a prefix, or two tensors get the same name.
    """
    names = {name: name for name in tensors}
    if any(backbone.owns(names) for backbone in BACKBONES.values()) and not _wrapped_within(names):
        return dict(tensors)
    for name in names:
        for prefix in FIT_ANYWHERE:
            names[name] = names[name].replace("." + prefix, ".")
    while names and not any(backbone.owns(names.values()) for backbone in BACKBONES.values()):
        counts = {prefix: sum(name.startswith(prefix) for name in names.values()) for prefix in AROUND}
        prefix = max(counts, key=counts.__getitem__)
        if not counts[prefix]:
            break
        if counts[prefix] < len(names):
            other = next(given for given, name in names.items() if not name.startswith(prefix))
            raise UserError(
                f"{path} mixes names: {counts[prefix]} of {len(names)} tensors begin with {prefix}, others do not "
                f"(first: {other}); save only the state_dict of the network"
            )
        names = {given: name.removeprefix(prefix) for given, name in names.items()}
    found: dict[str, Tensor] = {}
    for given, name in names.items():
        if name in found:
            raise UserError(f"{path} contains {name} twice, the second time as {given}; keep one of them")
        found[name] = tensors[given]
    return found


def _wrapped_within(names: Iterable[str]) -> bool:
    """Whether a part of the network was wrapped."""
    return any("." + prefix in name for name in names for prefix in FIT_ANYWHERE)


def json_object(text: str, what: str) -> dict[str, Any]:
    """Read a JSON object from a file's metadata.

    Args:
        text: JSON.
        what: What it is, for the message.

    Raises:
        ValueError: If it is anything but one object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{what} is not JSON ({error}); repair the file, or download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{what} is a JSON {type(found).__name__}, not an object; repair or download it again")
    return found


def weights_only(content: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without Transformer Engine's FP8 scales, which have a private format."""
    return {name: value for name, value in content.items() if not str(name).endswith("_extra_state")}


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def from_transformer_engine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the names of a Transformer Engine checkpoint (LiteVGGT's ``te_dict.pt``) to ours; others are unchanged.

    Its network differs from ours in two ways that the weights do not show: the GELU is the tanh approximation (off by
    5e-4 at most) and every norm's epsilon is 1e-5, the encoder's too. Use it with ``merging="litevggt"``.

    Raises:
        ValueError: If two tensors get the same name.
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
            raise UserError(f"the checkpoint contains {ours} twice, under that name and as {name}; keep one of them")
        renamed[ours] = tensor
    return renamed
