"""A tuned plan: a file with the method of each layer of global attention and the linears to quantize.

``geoaccel tune`` writes it and ``accelerate(model, plan=...)`` reads it. It is YAML, to be read and edited by hand:

    geoaccel_plan: 1
    weights: {linears: 0f3c..., rest: 9a1b...}
    layers:                       # as in accelerate(layers=...)
      0: frame-only
      1-3: {asymmetric: {stride: 4}}
    quantization:                 # methods with the names of their layers
      - {name: fp8, knobs: {include: [aggregator.frame_blocks.0.attn.qkv, ...]}}
    tuned: {...}                  # for what it was made, and what was predicted and measured

A plan is made for particular weights and refuses others, since the weights determine what a layer tolerates. A plan for
float weights also applies to their quantized versions; ``linears: quantized-5d1e...`` applies to those codes alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_bytes
from geoaccel.linears import QuantizedLinear, quantized_linears, stored_dtypes
from geoaccel.merging.layers import Layers, plain
from geoaccel.quantization.calibrate.allocation import from_records, to_records
from geoaccel.quantization.method import Quantization
from geoaccel.quantization.swap import float_linears

KIND, VERSION = "geoaccel_plan", 1
PARTS = ("linears", "rest")
QUANTIZED = "quantized-"
SAMPLES = 4096  # elements of each tensor in the fingerprint: training changes all of them


@dataclass(frozen=True)
class TunedPlan:
    """Contents of a plan file.

    Attributes:
        weights: Fingerprints of :func:`of_weights`.
        layers: The method of each layer of global attention.
        quantization: Methods with the names of their layers.
        tuned: What it was made for and how it performed, for information only.

    Raises:
        ValueError: If ``weights`` is anything but the two fingerprints.
    """

    weights: Mapping[str, str]
    layers: Layers = field(default_factory=Layers)
    quantization: tuple[Quantization, ...] = ()
    tuned: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights.keys() != set(PARTS) or not all(isinstance(value, str) for value in self.weights.values()):
            raise UserError(
                f"weights={dict(self.weights)!r} does not identify the weights of the plan; give the fingerprints "
                f"{' and '.join(PARTS)}, in quotes, as geoaccel tune writes them, or tune a plan"
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str] | TunedPlan) -> TunedPlan:
        """Read a file; a plan object is returned unchanged.

        Raises:
            ValueError: If it is not a plan, is damaged, or names an unknown method or knob.
            FileNotFoundError: If the file does not exist.
        """
        if isinstance(path, TunedPlan):
            return path
        import yaml

        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"plan {path} does not exist; make one with geoaccel tune")
        if path.is_dir():
            raise UserError(f"plan {path} is a folder; give the file in it that geoaccel tune wrote")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"plan {path} is not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(content, Mapping) or content.get(KIND) != VERSION:
            raise UserError(f"{path} is not a plan for this version: the line '{KIND}: {VERSION}' is missing")
        given = {name: content.get(name) or {} for name in ("weights", "layers", "tuned")}
        for name, value in given.items():
            if not isinstance(value, Mapping):
                raise UserError(f"plan {path}: {name}={value!r} must be a mapping of names to values")
        records = content.get("quantization") or []
        if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
            raise UserError(f"plan {path}: quantization={records!r} must be a list of methods with name and knobs")
        try:
            made = from_records(records)
            return cls(given["weights"], Layers.read(given["layers"]), tuple(made), given["tuned"])
        except UserError as error:
            raise UserError(f"plan {path}: {error}") from None

    def write(self, path: str | os.PathLike[str], depth: int) -> None:
        """Write the file, complete or not at all; equal plans give identical files.

        Args:
            path: The file.
            depth: Global attentions of the network.
        """
        import yaml

        content = {
            KIND: VERSION,
            "weights": dict(self.weights),
            "layers": {layer: plain(method) for layer, method in enumerate(self.layers.each(depth))},
            "quantization": [_listed(record) for record in to_records(self.quantization)],
            "tuned": dict(self.tuned),
        }
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
        write_text(Path(path), f"# A plan of geoaccel tune: accelerate(model, plan=...), reconstruct --plan.\n{text}")

    def check_weights(self, model: nn.Module) -> None:
        """Refuse a network whose weights the plan was not made for.

        Raises:
            ValueError: If they differ.
        """
        found = of_weights(model)
        for part, fingerprint in self.weights.items():
            here = found[part]
            # Without float weights the rest must suffice: quantization, by hand or by this plan, does not matter.
            gone = here.startswith(QUANTIZED) and not fingerprint.startswith(QUANTIZED)
            if here != fingerprint and not gone:
                hint = _way_out(model)
                raise UserError(f"the plan was made for other weights ({part} {fingerprint}, here {here}); {hint}")


def of_weights(model: nn.Module) -> dict[str, str]:
    """Fingerprints of the weights of a network, the same in float32 and bfloat16.

    Returns:
        ``linears``: of the weights of linear layers, or of codes and scales (marked as such) where a layer is quantized
        and its float weights are gone; ``rest``: of everything else, which no method changes.
    """
    layers, quantized = float_linears(model), quantized_linears(model)
    linears = {name: linear.weight for name, linear in layers.items()}
    codes = {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in quantized.items()
        for key in layer.stored
        if name not in layers
    }
    rest = {
        f"{name}.{key}".removeprefix("."): tensor
        for name, module in model.named_modules()
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if not (key == "weight" and isinstance(module, nn.Linear))
        and not (isinstance(module, QuantizedLinear) and key in module.stored)
    }
    return {"linears": (QUANTIZED if codes else "") + _of_tensors(linears | codes), "rest": _of_tensors(rest)}


def _way_out(model: nn.Module) -> str:
    """What to do with weights that a plan was not made for."""
    if quantized_linears(model) and _fits_float16(model):
        return (
            "if this file was quantized from the right ones, write it again with --dtype bfloat16 (float16, the "
            "default, rounds otherwise), or tune a plan on it"
        )
    if next(model.parameters()).dtype == torch.float16:
        return "load it in float32 or bfloat16: float16 rounds otherwise"
    return "tune a plan on these"


def _fits_float16(model: nn.Module) -> bool:
    """Whether all that is not quantized may have been stored in float16, whatever it was loaded in."""
    codes = stored_dtypes(model)
    floats = [value for name, value in model.named_parameters() if name not in codes and value.is_floating_point()]
    return all(torch.equal(value, value.half().to(value.dtype)) for value in floats)


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().flatten()
        some = tensor[:: max(1, len(tensor) // SAMPLES)]
        # bfloat16 is float32 with fewer digits, so that casting a network changes nothing here.
        some = some.to(torch.bfloat16).view(torch.int16).cpu() if some.is_floating_point() else some.cpu()
        parts += [f"\n{name} {list(tensors[name].shape)}\n".encode(), some.numpy().tobytes()]
    return of_bytes(*parts)


def _listed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with lists instead of tuples, which YAML lacks."""
    return {
        "name": record["name"],
        "knobs": {knob: list(value) if isinstance(value, tuple) else value for knob, value in record["knobs"].items()},
    }
