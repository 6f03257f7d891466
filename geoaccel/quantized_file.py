"""Makes a quantized file of a named checkpoint, layer by layer, never with the whole source in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from geoaccel.atomic import check_output_file
from geoaccel.errors import UserError
from geoaccel.linears import quantized_linears
from geoaccel.models.files import list_models, origins, read_tensors, resolve
from geoaccel.models.shards import weights_of
from geoaccel.models.weights import open_model, save_model
from geoaccel.quantization.file import DTYPES, QuantizedFile, check_range
from geoaccel.quantization.method import Quantization
from geoaccel.quantization.swap import quantize, quantized_parts
from geoaccel.version import __version__


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

    The source is memory-mapped and its layers are quantized one by one, so memory holds the result and one layer, plus
    pages of the source that the system can reclaim.

    Args:
        model: Embedded name, hub id, file or folder.
        methods: Methods for different layers.
        out: File to write, named ``*.safetensors``; it appears when it is complete.
        dtype: For everything that is not quantized: ``float16``, ``bfloat16`` or ``float32``.
        overwrite: Replace an earlier file.
        calibrate: Quantizes the float network with calibration images, in place; its result is recorded as provenance.
        report: Called with a line of text at each step.

    Raises:
        ValueError: If a method cannot work on this checkpoint, numbers do not fit into ``dtype``, or ``out`` cannot be
            the name of a new file.
        FileNotFoundError: For a path that does not exist.
        OSError: If the folder of ``out`` cannot be written to; checked before the work, as far as possible.
    """
    path = check_output_file(out, ".safetensors", overwrite=overwrite)
    source = resolve(model)
    if path.exists() and any(path.samefile(part) for part in weights_of(source)):
        raise UserError(f"output file {out} is the source checkpoint; choose another name")
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


def provenance_of(model: str, source: Path) -> dict[str, Any]:
    """Provenance of the weights: their source, and the provenance recorded in it."""
    known = model in list_models() or model in origins()
    provenance: dict[str, Any] = {
        "geoaccel": __version__,
        "source": model if known else source.name,
        "source_bytes": sum(part.stat().st_size for part in weights_of(source)),
    }
    before = json.loads(read_tensors(source)[1].get("provenance", "{}"))
    return {**provenance, "source_provenance": before} if before else provenance
