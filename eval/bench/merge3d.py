"""``geoaccel bench suite=merge3d``: what fewer visual tokens save in a 3D multimodal LLM, and what they cannot save.

Random weights at real sizes: times depend only on shapes. Before the first token a host runs a 2D encoder, a geometry
encoder and the prefill of its language model. Merging shortens the prefill, and every later step a little; it adds a
saliency, a plan and a rewritten prompt. Each part is timed separately, alternating with the others, and a reported time
is the sum of its parts' medians.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.api import accelerate
from geoaccel.console import counted, say
from geoaccel.errors import UserError
from geoaccel.eval.bench.bench import DENSE, Timed, check_size, frame_size, listed
from geoaccel.eval.bench.merge3d_hosts import HOSTS, SCALES, Host, frame_prompt
from geoaccel.eval.bench.random_weights import random_full_size
from geoaccel.eval.bench.speed import compare, peak_memory
from geoaccel.eval.data.synthetic import sequence
from geoaccel.eval.report import Row
from geoaccel.eval.run.made_by import sitting
from geoaccel.eval.run.settings import out_folder, refuse_given, section, usual_settings, whole_number
from geoaccel.memory import GIB
from geoaccel.merging.method import MERGING
from geoaccel.mllm import BASELINES, GeometryTokens, Merge3DConfig, geometry_features
from geoaccel.mllm.handed import returned_cache
from geoaccel.mllm.hosts import GenerateArguments, ReducedInputs, reduce_inputs
from geoaccel.mllm.hosts.streams import Method
from geoaccel.models import BACKBONES
from geoaccel.models.weights import load_model
from geoaccel.registry import Registry
from geoaccel.runtime import hardware, versions

METHODS: Registry[Callable[..., Method]] = Registry("token reduction", {"merge3d": Merge3DConfig, **BASELINES})
NEED_POINTS = ("voxel",)
OF_SPEED = ("model", "methods", "knobs", "ratio", "layers", "plan", "attention", "heads")
"""Settings that only the other suite uses."""


@dataclass(frozen=True, kw_only=True)
class Merge3DBench(Timed):
    """A benchmark of a host, checked.

    Attributes:
        host: Family and size of the multimodal LLM.
        method: Name of the token reduction method.
        ratios: Fractions of the visual tokens to keep.
        geometry: Backbone with random weights, or a checkpoint; None: no geometry encoder.
        geometry_merging: Token merging inside the geometry encoder.
        text_tokens, new_tokens: Tokens of the question, and of the answer.
        size: (H, W) of a frame.
    """

    host: Host
    method: str
    ratios: tuple[float, ...]
    geometry: str | None
    geometry_merging: str | None
    text_tokens: int
    new_tokens: int
    size: tuple[int, int]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Merge3DBench:
        """Check settings of ``configs/bench.yaml``.

        Raises:
            ValueError: For an invalid setting; one line says which, and what is allowed.
        """
        own = section(settings, "merge3d")
        usual = usual_settings("bench")
        why = "is only for suite=speed; suite=merge3d has its own settings, merge3d.NAME=VALUE"
        refuse_given(settings, {name: usual[name] for name in OF_SPEED}, why)
        by_scale = section(own, "geometry_by_scale")
        shared = cls.shared(settings)
        scale = own["scale"] if own["scale"] != "auto" else ("full" if shared["device"].startswith("cuda") else "tiny")
        host = HOSTS[own["host"]][SCALES[scale]]
        METHODS[own["method"]]
        ratios = tuple(listed(own["ratios"]))
        for ratio in ratios:
            METHODS[own["method"]](ratio=ratio)
        if not ratios:
            raise UserError("merge3d.ratios=[]: give fractions of the tokens to keep, such as merge3d.ratios=[0.3]")
        if own["geometry_merging"] is not None:
            MERGING[own["geometry_merging"]]
        height, width = frame_size(settings) or (392, 504)
        if min(height, width) < 2 * host.cell:
            raise UserError(f"size={[height, width]}: give at least {2 * host.cell}, which is two visual tokens")
        for name, least in (("text_tokens", 1), ("new_tokens", 2)):
            whole_number(own, name, least, "merge3d.")
        default = f"merge3d-{host.name}-{height}x{width}-{shared['dtype']}"
        return cls(
            host=host,
            method=own["method"],
            ratios=ratios,
            geometry=by_scale[scale] if own["geometry"] == "auto" else own["geometry"],
            geometry_merging=own["geometry_merging"],
            text_tokens=own["text_tokens"],
            new_tokens=own["new_tokens"],
            size=(height, width),
            folder=out_folder(settings, Path("runs") / "bench" / default),
            **shared,
        )

    @property
    def checkpoint(self) -> str | None:
        """What is loaded; None for random weights, or nothing."""
        return None if self.geometry in BACKBONES else self.geometry

    @property
    def title(self) -> str:
        """Title of the report."""
        return f"{self.host.name}, time and memory with fewer visual tokens"

    @property
    def scored(self) -> str:
        """What was measured, in words."""
        geometry = "no geometry encoder" if self.geometry is None else f"geometry from {self.geometry}"
        return (
            f"an answer of {self.new_tokens} tokens, encoders included ({geometry}, "
            f"{self.geometry_merging or 'dense'}); sums of medians of {self.repeats} alternating runs; random weights, "
            "so time and memory only; the encoders cost the same at every ratio, so no speedup exceeds dense time over "
            "encoder time"
        )

    @torch.inference_mode()
    def run(self, command: str) -> list[Row]:
        """Measure; one row per frame count and ratio, the dense host first."""
        dtype = getattr(torch, self.dtype)
        host = self.host.build(self.device, dtype)
        encoder = self._geometry_encoder(dtype)
        rows = []
        with counted(len(self.frames), "frame count") as bar:
            for count in self.frames:
                bar.set_postfix_str(f"{count} frames")
                found = self.measure(host, encoder, count, command)
                say(sentence(found))
                rows += found
                bar.update()
        return rows

    def _geometry_encoder(self, dtype: torch.dtype) -> nn.Module | None:
        if self.geometry is None:
            return None
        if self.geometry in BACKBONES:
            model = random_full_size(self.geometry, self.device, dtype)
        else:
            model = load_model(self.geometry, device=self.device, dtype=dtype)
        check_size(self.size, model)
        return accelerate(model, merging=self.geometry_merging)

    def measure(self, host: Any, encoder: nn.Module | None, count: int, command: str) -> list[Row]:
        """All ratios at one frame count."""
        grid = (self.size[0] // self.host.cell, self.size[1] // self.host.cell)
        dtype = getattr(torch, self.dtype)
        inputs = frame_prompt(self.host, count, grid, self.text_tokens, self.device, dtype)
        images = sequence(self.scene, frames=max(2, count), size=self.size).images[:, :count].to(self.device, dtype)

        def look() -> GeometryTokens | None:
            points = self.method in NEED_POINTS
            return None if encoder is None else geometry_features(encoder, images, grid=grid, points=points)

        tokens = look()

        def reduce(ratio: float) -> ReducedInputs:
            return reduce_inputs(host, inputs, self._method(ratio, tokens), geometry=tokens)

        variants = {DENSE: reduce_inputs(host, inputs, Merge3DConfig(ratio=1.0, tau_geo=float("inf")))}
        variants |= {str(ratio): reduce(ratio) for ratio in self.ratios}
        calls: dict[str, Callable[[], Any]] = {
            "geometry": look,
            "encoder": lambda: host.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
        }
        calls |= {f"reduce {ratio}": partial(reduce, ratio) for ratio in self.ratios}
        for name, found in variants.items():
            calls[f"prefill {name}"] = partial(prefill, host, found.arguments)
            calls[f"answer {name}"] = partial(self._answer, host, found.arguments)
        timings = compare(calls, repeats=self.repeats, warmup=self.warmup, device=self.device)
        times = {name: timing.latency_ms for name, timing in timings.items()}
        rows = [self._row(host, name, found, times, count, command) for name, found in variants.items()]
        return [replace(row, dense_peak_memory_gib=rows[0].peak_memory_gib) for row in rows]

    def _row(
        self, host: Any, name: str, found: ReducedInputs, times: Mapping[str, float], count: int, command: str
    ) -> Row:
        total, scores = parts(times, name, self.new_tokens)
        dense, _ = parts(times, DENSE, self.new_tokens)
        cache = returned_cache(prefill(host, found.arguments))
        scores |= {
            "prompt_tokens": float(found.arguments["input_ids"].shape[1]),
            "visual_tokens": float(found.plan.num_kept),
            "kv_cache_mib": cache_bytes(cache) / 2**20,
        }
        del cache
        gc.collect()
        with peak_memory(self.device) as peak:
            self._answer(host, found.arguments)
        return Row(
            model=self.host.name,
            merging=DENSE if name == DENSE else self.method,
            quantization="none",
            attention="sdpa",
            dtype=self.dtype,
            device=self.device,
            ratio=None if name == DENSE else 1 - float(name),
            effective_ratio=None if name == DENSE else found.plan.effective_ratio,
            frames=count,
            scenes=0,
            scores=scores,
            latency_ms=total,
            dense_latency_ms=dense,
            speedup=dense / total,
            peak_memory_gib=peak[0] / GIB,
            sitting=sitting(),
            hardware=hardware(self.device),
            versions=versions() | {"transformers": metadata.version("transformers")},
            command=command,
        )

    def _method(self, ratio: float, tokens: GeometryTokens | None) -> Method:
        knobs: dict[str, float] = {"ratio": ratio}
        if tokens is None and self.method == "merge3d":
            knobs["tau_geo"] = float("inf")
        return METHODS[self.method](**knobs)

    def _answer(self, host: Any, arguments: GenerateArguments) -> Tensor:
        length = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        answer: Tensor = host.generate(**arguments, **length, do_sample=False)
        return answer


def prefill(host: Any, arguments: GenerateArguments) -> Any:
    """The language model on the whole prompt, up to the logits of the first token."""
    return host(**arguments, use_cache=True, logits_to_keep=1)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def parts(times: Mapping[str, float], name: str, new_tokens: int) -> tuple[float, dict[str, float]]:
    """Time in ms of one variant from pixels to the last token, and its parts.

    Args:
        times: Medians of ``geometry``, ``encoder``, ``reduce R``, ``prefill R`` and ``answer R``.
        name: R, or ``none``.
        new_tokens: Tokens of the answer.
    """
    encoders = times["geometry"] + times["encoder"]
    reduction = 0.0 if name == DENSE else times[f"reduce {name}"] - times["encoder"]
    first = encoders + reduction + times[f"prefill {name}"]
    total = encoders + reduction + times[f"answer {name}"]
    return total, {
        "geometry_ms": times["geometry"],
        "encoder_ms": times["encoder"],
        "reduction_ms": reduction,
        "prefill_ms": times[f"prefill {name}"],
        "first_token_ms": first,
        "decode_ms_per_token": (times[f"answer {name}"] - times[f"prefill {name}"]) / (new_tokens - 1),
        "encoder_share": encoders / total,
        "first_token_limit": (encoders + times[f"prefill {DENSE}"]) / encoders,
    }


def sentence(rows: Sequence[Row]) -> str:
    """Possible and achieved speedup at one frame count."""
    dense, best = rows[0], min(rows[1:], key=lambda row: row.scores["first_token_ms"])
    scores, kept = dense.scores, 1 - (best.ratio or 0)
    encoders = scores["geometry_ms"] + scores["encoder_ms"]
    gained = scores["first_token_ms"] / best.scores["first_token_ms"]
    return (
        f"{dense.frames} frames, {scores['visual_tokens']:.0f} visual tokens: the encoders, which no ratio shortens, "
        f"are {encoders / scores['first_token_ms']:.0%} of the dense time to the first token and "
        f"{scores['encoder_share']:.0%} of the whole answer. With a free prefill, the first token would be "
        f"{scores['first_token_limit']:.2f}x as fast, the upper limit for any ratio; keeping {kept:.2g} of the tokens "
        f"gave {gained:.2f}x for the first token and {best.speedup:.2f}x for the answer."
    )
