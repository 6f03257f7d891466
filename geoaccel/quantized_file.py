"""Checkpoints whose linear layers are quantized: made layer by layer from a file that is never read as a whole."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geoaccel.errors import UserError
from geoaccel.linears import quantized_linears, stored_dtypes
from geoaccel.models.files import list_models, origins, read_tensors, resolve
from geoaccel.models.weights import open_model, save_model
from geoaccel.quantization.method import Quantization
from geoaccel.quantization.swap import QuantizedPart, quantize, quantized_parts

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantizedFile:
    """A checkpoint that was written.

    Attributes:
        path: The file; ``load_model`` reads it.
        file_bytes: Its size.
        numbers: Weights, biases and all other numbers of the network, quantized or not.
        parts: What each method holds.
    """

    path: Path
    file_bytes: int
    numbers: int
    parts: tuple[QuantizedPart, ...]

    def __str__(self) -> str:
        listing = "; ".join(f"{part.linears} linear layers as {part.method}" for part in self.parts)
        references = " and ".join(
            f"{width * self.numbers / 1e6:,.1f} MB in {dtype} ({width * self.numbers / self.file_bytes:.2f}x)"
            for dtype, width in (("bfloat16", 2), ("float32", 4))
        )
        return f"{self.path}: {self.file_bytes / 1e6:,.1f} MB ({listing}); all of it takes {references}"


def export_quantized(
    model: str,
    methods: Sequence[Quantization],
    out: str | Path,
    *,
    dtype: str = "float16",
    overwrite: bool = False,
    calibrate: Callable[[nn.Module], dict[str, Any]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> QuantizedFile:
    """Quantize a checkpoint and write it as one that ``load_model`` reads.

    The source is mapped into memory and its layers are quantized one after the other, so what is held at a time is the
    result and one layer, in addition to pages of the source, which the system takes back when it needs them.

    Args:
        model: Embedded name, hub id, file or folder.
        methods: Each takes layers of its own.
        out: File to write, named ``*.safetensors``; it appears when it is complete.
        dtype: Of everything that is not quantized: ``float16``, ``bfloat16`` or ``float32``.
        overwrite: Replace an earlier file.
        calibrate: Quantizes the float network for photographs, in place; what it returns goes into the provenance.
        report: Called with a line of text at each step.

    Raises:
        ValueError: If a method cannot work on this checkpoint, numbers do not fit into ``dtype``, or ``out`` is no name
            for a new file.
        FileNotFoundError: For a path that does not exist.
        OSError: If nothing can be written to the folder of ``out``; found before the work, as far as that can be.
    """
    path = check_output_file(out, ".safetensors", overwrite=overwrite)
    source = resolve(model)
    if path.exists() and path.samefile(source):
        raise UserError(f"output file {out} is the source; choose another")
    network = open_model(model)
    if quantized_linears(network):
        held = "; ".join(str(part.method) for part in quantized_parts(network))
        raise UserError(f"{model} is quantized already ({held}); start from its float checkpoint")
    provenance = provenance_of(model, source)
    numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    check_range(network, DTYPES[dtype])  # before hours of calibration
    report(f"quantizing {model}, {numbers:,} numbers")
    if calibrate is None:
        quantize(network, *methods)
    else:
        provenance |= calibrate(network)
    check_range(network, DTYPES[dtype])
    report(f"writing {path}")
    save_model(network, path, dtype=DTYPES[dtype], provenance=provenance)
    return QuantizedFile(path, path.stat().st_size, numbers, tuple(quantized_parts(network)))


def check_output_file(out: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """The path of a file that is to come, once it is known that it can be written.

    Raises:
        ValueError: If it is no name for a new file.
        OSError: If nothing can be written beside it.
    """
    path = Path(out).expanduser()
    if path.suffix != suffix:
        raise UserError(f"output file {out} must be named {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for the output file")
    if path.is_dir():
        raise UserError(f"output file {out} is a folder; name a file, in it or elsewhere")
    if path.exists() and not overwrite:
        raise UserError(f"output file {out} exists; choose another, or overwrite it (--overwrite)")
    probe(path)
    return path


def probe(path: Path) -> None:
    """Write a small file beside one that is to come, and remove it: permissions say little, and disks are full.

    Raises:
        OSError: In one line.
    """
    attempt = path.with_name(f".{path.name}.{secrets.token_hex(4)}.probe")
    try:
        try:
            attempt.write_bytes(bytes(4096))
        finally:
            attempt.unlink(missing_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot write to {path.parent} ({reason}); choose another output file, or make room") from None


def check_range(network: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to write numbers that are none, or that a narrow type cannot hold.

    Raises:
        ValueError: Naming the tensor.
    """
    stored = stored_dtypes(network)
    for name, tensor in network.state_dict().items():
        largest = float(tensor.abs().max()) if name not in stored and tensor.numel() else 0.0
        if not math.isfinite(largest):
            raise UserError(f"{name} holds NaN or infinite values; repair the checkpoint")
        if largest > torch.finfo(dtype).max:
            raise UserError(
                f"{name} holds {largest:.3g}, more than {dtype} can; write the file with --dtype bfloat16 or float32"
            )


def provenance_of(model: str, source: Path) -> dict[str, Any]:
    """Where the weights came from, and what their own file said about that."""
    from geoaccel import __version__

    known = model in list_models() or model in origins()
    provenance: dict[str, Any] = {
        "geoaccel": __version__,
        "source": model if known else source.name,
        "source_bytes": source.stat().st_size,
    }
    before = json.loads(read_tensors(source)[1].get("provenance", "{}"))
    return {**provenance, "source_provenance": before} if before else provenance
