"""The report of a ``reconstruct`` run: predicted cost, progress, what it did, and how it compares with dense."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn

from geoaccel import describe
from geoaccel.api import rates_kind
from geoaccel.checks import Job
from geoaccel.console import counted, print_json, say
from geoaccel.eval.bench.speed import peak_memory
from geoaccel.eval.metrics.fidelity import fidelity
from geoaccel.eval.report.rows import BUSY
from geoaccel.eval.tools.demo import as_geometry
from geoaccel.memory import GIB, estimate_bytes
from geoaccel.memory_plan import MemoryPlan
from geoaccel.merging.calibration import rates_for
from geoaccel.merging.gain import seconds
from geoaccel.models.layers.block import Block
from geoaccel.outliers import warned
from geoaccel.reconstruction import Reconstruction
from geoaccel.trying import accelerated

ENCODERS = ("encoder", "aggregator.patch_embed", "backbone.pretrained")
LAYERS = ("decoder", "aggregator")
TURNS, PATIENCE = 3, 20.0
"""Timed forwards of each model in a comparison, and the seconds after which no further one starts."""


def predicted(
    model: Any, frames: int, size: tuple[int, int], heads: Sequence[str], plan: MemoryPlan | None = None
) -> dict[str, Any]:
    """Predicted time of a dense forward by the rates of this machine, its memory, and the source of the rates.

    Args:
        model: On the device where it will run.
        frames: S.
        size: (H, W).
        heads: Heads that run.
        plan: Memory plan; None: everything at once.
    """
    kind = rates_kind(model)
    rates = rates_for(kind)
    return {
        "predicted_dense_seconds": seconds(model.cost(frames, size, heads=heads), rates, kind.head_dim),
        "predicted_memory_gib": estimate_bytes(model, frames=frames, size=size, heads=heads, plan=plan) / GIB,
        "rates": str(rates),
    }


@contextmanager
def watched(model: nn.Module, *, shows: bool) -> Iterator[dict[str, Any]]:
    """Show a progress bar over encoder, layers and heads during the forward in the block, and measure peak memory.

    Args:
        model: Has forward hooks on its parts within the block.
        shows: Show the bar.

    Yields:
        ``memory_gib`` once the block has ended: on a CPU the increase over the start, on CUDA the total.
    """
    found: dict[str, Any] = {}
    device = next(model.parameters()).device
    parts = stages(model) if shows else {}
    waiting = set(parts)
    hooks = []
    with counted(len(parts), "part", shown=shows, desc="reconstructing", leave=False) as bar:

        def passed(name: str) -> None:
            if name in waiting:  # a head may run block by block of frames, and one of its blocks several times
                waiting.discard(name)
                bar.set_postfix_str(parts[name])
                bar.update()

        for name in parts:
            hooks.append(model.get_submodule(name).register_forward_hook(lambda *_, name=name: passed(name)))
        try:
            with peak_memory(device) as peak:
                before = 0 if device.type == "cuda" else _resident()
                yield found
            found["memory_gib"] = max(0, peak[0] - before) / GIB
        finally:
            for hook in hooks:
                hook.remove()


def stages(model: nn.Module) -> dict[str, str]:
    """Parts of a network by name, in execution order: encoder, layers or heads."""
    blocks = [name for name, part in model.named_modules() if isinstance(part, Block)]
    whole = [name for name, _ in model.named_children() if not any(one.startswith(f"{name}.") for one in blocks)]
    found = {}
    for name in [*blocks, *whole]:
        within = next((start for start in (*ENCODERS, *LAYERS) if name.startswith(f"{start}.")), None)
        found[name] = "heads" if within is None else "encoder" if within in ENCODERS else "layers"
    return found


def done(model: Any, found: Mapping[str, Any]) -> list[str]:
    """What a run did, in lines.

    Args:
        model: After its forward.
        found: Findings of the result, with those of `predicted` and `watched`.
    """
    description = describe(model)
    lines = []
    for action in description.merging:
        name = type(action.method).__name__
        dense = [f"{count} x dense: {why}" for why, count in action.bypassed.items()]
        if action.effects and action.effective_ratio is not None and action.effective_key_ratio is not None:
            left_out = f"{action.effective_ratio:.0%} of the queries and {action.effective_key_ratio:.0%} of the keys"
            lines.append(f"{name} in {action.place}: {left_out} left out" + "".join(f"; {why}" for why in dense))
    lines += [str(part) for part in description.quantization]
    parameters = ", ".join(f"{count:,} in {dtype}" for dtype, count in description.dtypes.items())
    lines.append(f"{description.parameters:,} parameters: {parameters}")
    if "predicted_dense_seconds" in found:
        gain = description.gain
        dense = found["predicted_dense_seconds"]
        faster = "" if gain is None else f", {dense / gain:.1f} s with {gain:.2f}x"
        lines.append(
            f"time: {found['seconds']:.1f} s; predicted {dense:.1f} s dense{faster} (rates {found['rates']}); "
            f"memory: {max(0.0, found['memory_gib']):.2f} GiB of {found['predicted_memory_gib']:.2f} predicted"
        )
    return lines


def against_dense(result: Reconstruction, model: nn.Module, again: Callable[..., Reconstruction]) -> dict[str, float]:
    """Speedup and deviation: the dense model on the same images, then both alternately, warm, up to `TURNS` times.

    Args:
        result: Result of the accelerated model.
        model: The accelerated model, with its float weights kept.
        again: Reconstructs the same images with the model passed as ``model``.

    Returns:
        ``seconds`` and ``dense_seconds`` of the network, medians; ``times_varied``, the larger of their spreads over
        its median; and the values of `geoaccel.eval.metrics.fidelity`.
    """
    took: list[float] = []
    dense_took: list[float] = []
    with warned():
        with accelerated(model) as without:
            dense = again(model=without)
        while len(took) < TURNS and sum(took + dense_took) < PATIENCE:
            took.append(again(model=model).found["seconds"])
            with accelerated(model) as without:
                dense_took.append(again(model=without).found["seconds"])
    return {
        "seconds": median(took),
        "dense_seconds": median(dense_took),
        "times_varied": max((max(times) - min(times)) / median(times) for times in (took, dense_took)),
        **fidelity(as_geometry(result), as_geometry(dense)),
    }


def compared(found: Mapping[str, Any]) -> str:
    """Speedup and deviation in one line.

    Args:
        found: Result of `against_dense`.
    """
    took = f"{found['dense_seconds']:.1f} s dense, {found['seconds']:.1f} s"
    if found["fidelity_depth_abs_rel"] == 0 and found["fidelity_point_distance"] == 0:
        return f"against the dense model: outputs are identical, so times differ only by chance ({took})"
    line = f"against the dense model: {took}: {found['dense_seconds'] / found['seconds']:.2f}x"
    if found["times_varied"] > BUSY:
        line += f" (unreliable: times varied by {100 * found['times_varied']:.0f} %, the machine was busy)"
    if "fidelity_rotation_deg" in found:
        turn, move = found["fidelity_rotation_deg"], found["fidelity_translation_deg"]
        line += f"; rotations differ by {turn:.2f} deg, translation directions by {move:.2f} deg (medians over pairs)"
    return line + (
        f"; depth differs by {100 * found['fidelity_depth_abs_rel']:.2f} %, points by "
        f"{100 * found['fidelity_point_distance']:.2f} % of the scene (means)"
    )


def finished(
    args: argparse.Namespace, job: Job, formats: Sequence[str], dtype: str, device: str, made: Mapping[str, Any]
) -> None:
    """Name what was written, and print the run as a line of JSON on stdout.

    Args:
        args: Command-line options.
        job: The scene.
        formats: Formats that were written.
        dtype, device: Those of the model.
        made: Summary of the result and of the methods in the model, JSON-compatible.
    """
    for path in sorted(path for path in job.out.iterdir() if not path.name.startswith(".")):
        say(f"wrote {path}{'/' if path.is_dir() else ''}")
    how = {name: getattr(args, name) for name in ("model", "merging", "layers", "plan", "quantization", "attention")}
    summary = {"out": str(job.out), **how, "dtype": dtype, "device": device, **made, "formats": list(formats)}
    print_json(summary)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
