"""The tables of the mini checkpoints in documents and model cards, from the results in `benchmarks/`.

    python scripts/figures/mini_tables.py            # prints them
    python scripts/figures/mini_tables.py --write    # puts them into README, `docs/` and cards

`docs/test_figures.py` checks the documents against them; the text around them is edited by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import many_frames_tables
import merging_tables
from geoaccel.atomic import write_text
from geoaccel.errors import UserError, run_program
from geoaccel.eval.metrics.effects import with_interval
from table_parts import MODELS, ROOT, read, table

SCORES = (
    ("pose AUC@30", "auc_30", "{:.3f}", ">= 0.80"),
    ("AUC@15", "auc_15", "{:.3f}", ""),
    ("AUC@5", "auc_5", "{:.3f}", ">= 0.30"),
    ("AUC@3", "auc_3", "{:.3f}", ""),
    ("median rotation error", "rotation_median_deg", "{:.1f} deg", ""),
    ("depth AbsRel", "depth_abs_rel", "{:.3f}", "<= 0.06"),
    ("depth within 25 %", "depth_delta_1_25", "{:.3f}", ""),
    ("chamfer over scene size", "chamfer", "{:.3f}", "<= 0.03"),
    ("Spearman of confidence", "conf_spearman", "{:.2f}", ">= 0.4"),
)
QUANTIZED = {"fp8": "`fp8`", "w4a16": "`w4a16`, not calibrated", "w4a16, calibrated": "`w4a16`, calibrated"}
STEPS = {
    "rtn": "rounded to nearest",
    "awq": "AWQ",
    "filter": "+ special tokens left out",
    "task": "+ task-aware search",
    "rounding": "+ compensated rounding",
    "mixed": "+ sensitive blocks in FP8",
    "default": "AWQ, special tokens left out, compensated rounding: the default",
    "rounding-only": "compensated rounding, no scales",
    "rtn-32": "rounded to nearest, groups of 32",
}


def card(model: str) -> list[str]:
    """Scores of a float network."""
    found = read("scores-{}.json")[model]["rows"]["float"]
    return table(("", "measured", "aim"), [(name, form.format(found[key]), aim) for name, key, form, aim in SCORES])


def scored() -> list[str]:
    """Scores of both float networks, over frame counts, and without attention between frames."""
    rows = {model: document["rows"] for model, document in read("scores-{}.json").items()}
    for model, variants in merging_tables.merging().items():
        rows[model]["64 frames"] = variants["dense"]

    def auc_30(*names: str) -> list[str]:
        return [" / ".join(f"{found[name]['auc_30']:.3f}" for name in names) for found in rows.values()]

    lines = [
        (name, *(form.format(found["float"][key]) for found in rows.values()), aim) for name, key, form, aim in SCORES
    ]
    frames = ("AUC@30 at 32 / 64 frames", *auc_30("32 frames", "64 frames"), "within 0.05 of 8 frames")
    blind = ("AUC@30 where frames cannot see each other", *auc_30("frame-only"), "a fall of 0.3")
    return table(("", *(f"`{model}`" for model in MODELS), "aim"), [*lines, frames, blind])


def quantized() -> list[str]:
    """Table: the cost of quantization on the validation scenes of seeds 0 to 63."""
    rows = []
    for model, document in read("scores-{}.json").items():
        dense = document["rows"]["float"]
        for name, title in QUANTIZED.items():
            own = document["rows"][name]
            worse = f"{(own['depth_abs_rel'] / dense['depth_abs_rel'] - 1) * 100:+.1f} %"
            changes = [f"{own[key] - dense[key]:+.3f}" for key in ("auc_30", "auc_5")]
            rows.append((f"`{model}`, {title}", *changes, worse))
    return table(("", "AUC@30", "AUC@5", "depth AbsRel"), rows)


def calibrated() -> list[str]:
    """Table: each step of calibration."""
    found = {m: {row["row"]: row for row in d["rows"]} for m, d in read("quantization-{}.json").items()}

    def cells(model: str, row: str) -> list[str]:
        effects = found[model][row]["effects"]
        columns = ((effects["pose_deg"], 1, 2), (effects["depth_rel"], 1000, 1))
        return [with_interval(x, f".{digits}f", scale=unit) for x, unit, digits in columns]

    header = (
        "",
        "MB (pi3)",
        "`vggt-mini` cameras, deg",
        "depth, per mille",
        "`pi3-mini` cameras, deg",
        "depth, per mille",
    )
    rows = [
        (
            title,
            f"{found['pi3-mini'][row]['stored_bytes'] / 1e6:.1f}",
            *cells("vggt-mini", row),
            *cells("pi3-mini", row),
        )
        for row, title in STEPS.items()
    ]
    return table(header, rows)


def filled(text: str, lines: list[str]) -> str:
    """A text with these lines in place of its table with the same names of first row and second column.

    Raises:
        ValueError: If it has no such table, or several.
    """

    def name(table: list[str]) -> tuple[str, str]:
        return table[0].split("|")[2], table[2].split("|")[1]

    old = text.splitlines()
    before = ["", *old]
    starts = [i for i, line in enumerate(old) if line.startswith("|") and not before[i].startswith("|")]
    found = [i for i in starts if name(old[i : i + 3]) == name(lines)]
    if len(found) != 1:
        raise UserError(f"{len(found)} tables with the column{name(lines)[0]}and the row{name(lines)[1]}, not one")
    end = found[0]
    while end < len(old) and old[end].startswith("|"):
        end += 1
    return "\n".join([*old[: found[0]], *lines, *old[end:]]) + "\n"


def places() -> dict[Path, dict[str, Callable[[], list[str]]]]:
    """Tables by the file that shows them."""
    cards = ROOT / "models" / "checkpoints"
    docs = ROOT / "docs"
    counts: dict[str, Callable[[], list[str]]] = {
        f"Merging at {frames} frames": partial(merging_tables.reported, frames) for frames in merging_tables.SHOWN
    }
    documents: dict[Path, dict[str, Callable[[], list[str]]]] = {
        ROOT / "README.md": {"Front": merging_tables.front},
        docs / "results" / "merging.md": {
            **counts,
            "Merging": merging_tables.merged,
            "Ablations of merging": merging_tables.ablated,
        },
        docs / "results" / "photographs.md": {"Photographs": merging_tables.photographs},
        docs / "results" / "asymmetric-keys.md": {"Keys": merging_tables.keys, "Layers": merging_tables.profiles},
        docs / "quantization.md": {"Quantization": quantized, "Calibration": calibrated},
        docs / "checkpoints.md": {"Scores": scored},
        docs / "tune.md": {"Plans": many_frames_tables.plans},
    }
    return documents | {cards / f"{model}.md": {f"Card of {model}": partial(card, model)} for model in MODELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into the documents")
    write = parser.parse_args().write
    for path, tables in places().items():
        text = path.read_text()
        for title, make in tables.items():
            try:
                lines = make()
            except FileNotFoundError as error:
                print(f"{title}: {error.filename} is missing: python scripts/figures/measure_mini.py", file=sys.stderr)
                continue
            print(f"## {title}\n", *lines, "", sep="\n")
            text = filled(text, lines)
        if write:
            write_text(path, text)


if __name__ == "__main__":
    sys.exit(run_program("mini_tables", main))
