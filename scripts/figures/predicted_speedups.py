"""Predicted and measured speedups, for every row in the tables over frame counts.

    GEOACCEL_RATES=built-in python scripts/figures/predicted_speedups.py           # prints the table
    GEOACCEL_RATES=built-in python scripts/figures/predicted_speedups.py --write   # and writes it into docs/results/

Predictions are those that `describe` prints, from the rates in use: the built-in ones are of the machine on which the
tables were measured. The number of tokens left by `come` and `alike` is read from the tables; no forward is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geoaccel import restore
from geoaccel.errors import run_program
from geoaccel.eval.run.job import Job
from geoaccel.layout import TokenLayout
from geoaccel.merging import MERGING
from geoaccel.models.weights import load_model
from merging_variants import DENSE

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "results" / "predicted.md"
MODELS = ("vggt-mini", "pi3-mini")
GRID = (16, 16)
INTRO = """# Predicted speedups

What `describe` says after a forward, beside what was measured on the report set ([tables](merging.md)): dense over
accelerated time of the whole forward, and the first over the second. Made by
`GEOACCEL_RATES=built-in python scripts/figures/predicted_speedups.py --write`.

A method acts where it is predicted to gain 5 % more than it must: less than one in ten predictions were too high by
that for 4, 8 and 16 frames of validation scenes (6, 6 and 3 scenes;
`GEOACCEL_RATES=built-in python scripts/figures/measure_frames.py measure vggt-mini --frames 4:6 8:6 16:3`, the same of
`pi3-mini`, then `summary --name predicted`).
"""


def rows(name: str) -> list[dict[str, Any]]:
    """The measurements, with predictions."""
    document = json.loads((ROOT / "benchmarks" / f"merging-{name}-frames-report.json").read_text())
    model, found = load_model(name), []
    for frames, measured in document["frames"].items():
        for row in measured:
            if row["variant"] != DENSE and row["scenes"] > 1 and set(row["merging"]) <= MERGING.keys():
                speedup = row["effects"]["speedup"]["mean"]
                gains = {"decided": gain(model, name, row["merging"], int(frames))}
                gains["predicted"] = gain(model, name, row["merging"], int(frames), left=row["queries"])
                found.append({"frames": int(frames), "variant": row["variant"], "measured": speedup, **gains})
    return found


def gain(model: nn.Module, name: str, merging: Mapping[str, Any], frames: int, left: float | None = None) -> float:
    """The predicted gain of a method for a number of frames; the network is dense again afterwards.

    Args:
        model, name: A network, and its name.
        merging: Methods with their knobs.
        frames: S.
        left: Fraction of the tokens left by `come` and `alike`; None: their estimate before the forward.
    """
    Job(name, merging=dict(merging)).apply(model)
    network: Any = model
    site = network.backbone.sites(network)["global"][0]
    layout = TokenLayout(1, frames, GRID, network.trunk.special)
    mixer, width = site.mixer, site.num_heads * site.head_dim
    q = torch.empty(1, site.num_heads, layout.tokens_per_scene, site.head_dim)  # only the shape counts
    packers = [p for module in model.modules() if (p := getattr(module, "token_packer", None)) is not None]
    if packers:
        found = packers[0].predicted(layout, torch.empty(1, frames, layout.tokens_per_frame, width), left)
    elif hasattr(mixer, "decide"):
        found = mixer.decide(layout, mixer.kind(q)).gain
    elif hasattr(mixer, "why_dense") and mixer.why_dense(layout) is not None:
        found = 1.0
    else:
        found = mixer.predicted(layout, q)
    restore(model)
    return float(found)


def document(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """One table per network: methods down, frame counts across."""
    text = INTRO
    for name, own in found.items():
        counts = sorted({row["frames"] for row in own})
        cells = {(row["variant"], row["frames"]): row for row in own}
        worst = max(own, key=lambda row: abs(row["predicted"] / row["measured"] - 1))
        off = 100 * (worst["predicted"] / worst["measured"] - 1)
        text += f"\n`{name}`, farthest off: {worst['variant']} at {worst['frames']} frames, {off:+.1f} %.\n\n"
        text += f"| | {' | '.join(f'{count} frames' for count in counts)} |\n|---|{'---|' * len(counts)}\n"
        for variant in dict.fromkeys(row["variant"] for row in own):
            text += f"| {variant} | {' | '.join(_cell(cells.get((variant, count))) for count in counts)} |\n"
    return text


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    ratio = row["predicted"] / row["measured"]
    return f"{row['predicted']:.2f}x, {row['measured']:.2f}x, {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/results/predicted.md")
    write = parser.parse_args().write
    text = document({name: rows(name) for name in MODELS})
    if write:
        DOCUMENT.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    sys.exit(run_program("predicted_speedups", main))
