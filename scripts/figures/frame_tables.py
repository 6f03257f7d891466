"""Tables of the cost and savings of merging over frame counts: JSON, markdown and a figure from measured lines."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from frame_picture import picture
from geoaccel.atomic import write_bytes
from geoaccel.errors import UserError
from geoaccel.eval.metrics.effects import for_json, summary, with_interval
from geoaccel.eval.metrics.pose import auc
from geoaccel.eval.report.style import png
from geoaccel.runtime import in_words
from merging_variants import DENSE, NAMED, base

MADE = ("weights", "size")
"""Keys common to the lines of one document, besides the code."""

DISTANCES = ("pose_deg", "pose_median_deg", "rotation_deg", "translation_deg", "depth_rel", "points")
Line = dict[str, Any]
OfScenes = dict[Any, dict[str, Any]]
"""Results by seed or name of a scene."""


def write_summary(
    lines: Mapping[str, list[Line]], which: str, seeds: Collection[int | str], folder: Path, name: str
) -> list[Path]:
    """Write the measurements of each model, as files called ``NAME-MODEL-frames-SET``.

    Args:
        lines: Lines of each model.
        which: Name of the set of scenes.
        seeds: Its scenes; lines of others are ignored.
        folder: JSON goes into its ``benchmarks``, markdown and a PNG into its ``docs/results``; created if missing.
        name: Prefix of the file names.

    Raises:
        UserError: If there is nothing to show.
    """
    if not lines:
        raise UserError("no measurements yet: run `measure_frames.py measure MODEL` first, or give its --out")
    documents = {model: document(model, own, which, seeds) for model, own in lines.items()}
    numbers, shown = folder / "benchmarks", folder / "docs" / "results"
    written = []
    for place in (numbers, shown):
        place.mkdir(parents=True, exist_ok=True)
    for model, found in documents.items():
        stem = f"{name}-{model}-frames-{which}"
        if (before := numbers / f"{stem}.json").exists():
            found = together(found, json.loads(before.read_text()))
        content = {
            numbers / f"{stem}.json": (json.dumps(found, indent=1) + "\n").encode(),
            shown / f"{stem}.md": markdown(found, stem).encode(),
            shown / f"{stem}.png": png(picture(found)),
        }
        for path, data in content.items():
            write_bytes(path, data)
            written.append(path)
    print("\n".join(map(str, written)))
    return written


def document(model: str, lines: list[Line], which: str, seeds: Collection[int | str]) -> dict[str, Any]:
    """Everything about one model.

    The rows of one frame count come from one code and one kind of machine, those of its last line; another count may
    have others.
    """
    lines = [line for line in lines if line["seed"] in seeds]
    if not lines:
        raise UserError(
            f"there are no measurements of {model} on the {which} set: run `measure_frames.py measure` first"
        )
    made = {key: lines[-1][key] for key in MADE}
    of_weights = [line for line in lines if all(line[key] == made[key] for key in made)]
    made_by = {line["frames"]: line["made_by"] for line in of_weights}
    own = as_last(line for line in of_weights if line["made_by"] == made_by[line["frames"]])
    if len(own) < len(lines):
        what = "lines from other code, weights, machines or files are left out"
        print(f"{model}: {len(lines) - len(own)} {what}; measure them again to include them", file=sys.stderr)
    found = {n: rows([line for line in own if line["frames"] == n]) for n in sorted(made_by)}
    found = {n: of for n, of in found.items() if of}  # a scene counts from its dense line on
    return {
        **{"model": model, "set": which, **made, "made_by": {str(n): made_by[n] for n in found}},
        "frames": {str(n): of for n, of in found.items()},
    }


def as_last(lines: Iterable[Line]) -> list[Line]:
    """Lines of the folder of the last one, of the photographs that a scene had last, and of what a method read last."""
    given = list(lines)
    last: dict[Any, Any] = {}

    def read(line: Line) -> dict[Any, Any]:
        scene, variant = ("scene", line["frames"], line["seed"]), ("variant", line["variant"])
        return {"root": line.get("root"), scene: line.get("photographs"), variant: line.get("files")}

    for line in given:
        last |= read(line)
    return [line for line in given if all(last[key] == value for key, value in read(line).items())]


def together(found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A document with the frame counts that an earlier one of the same weights has beside it."""
    if {key: found[key] for key in MADE} != {key: before.get(key) for key in MADE}:
        return found
    counts = sorted({*before["frames"], *found["frames"]}, key=int)
    joined = {part: {**before[part], **found[part]} for part in ("made_by", "frames")}
    return {**found, **{part: {n: of[n] for n in counts} for part, of in joined.items()}}


def rows(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """One row for each variant at one frame count, in the order in which they are listed; the dense model is first."""
    found: dict[str, OfScenes] = {}
    for line in lines:
        found.setdefault(line["variant"], {})[line["seed"]] = line  # the last line of a scene counts
    dense = found.get(DENSE, {})
    order = [*(name for name in NAMED if name in found), *(name for name in found if name not in NAMED)]
    changes = {name: {s: change(line, dense[s]) for s, line in found[name].items() if s in dense} for name in order}
    return [row(name, found[name], changes) for name in order if changes[name]]


def row(name: str, lines: OfScenes, changes: dict[str, OfScenes]) -> dict[str, Any]:
    """One variant: scores of all its scenes together, and its change against the dense model on each of them."""
    own = [lines[seed] for seed in changes[name]]
    pairs = torch.tensor([error for line in own for error in line["pairs_deg"]], dtype=torch.float64)
    averaged = [key for key in ("queries", "keys", "depth_abs_rel") if all(key in line for line in own)]
    means = {key: statistics.fmean(line[key] for line in own) for key in averaged}
    result: dict[str, Any] = {
        **{"variant": name, "merging": own[-1]["merging"], "scenes": len(own)},
        # The evaluation pools the pairs of all scenes into one curve.
        **{f"auc_{degrees}": round(auc(pairs, degrees), 4) for degrees in (30, 5, 3)},
        **{key: round(value, 5) for key, value in means.items()},
        "effective_ratio": None if name == DENSE else round(1 - means["queries"], 4),
        "bypassed": own[-1]["bypassed"],
        "predicted_speedup": own[-1].get("predicted_speedup"),
        "cpu_s": round(statistics.median(line["cpu_s"] for line in own), 3),
        "effects": rounded(summary(list(changes[name].values()))),
    }
    method = changes.get(base(name), {})
    shared = sorted(changes[name].keys() & method.keys())
    if shared and base(name) != name:
        against = [{key: changes[name][s][key] - method[s][key] for key in method[s]} for s in shared]
        result["minus"] = {base(name): rounded(summary(against))}
    return result


def change(line: Line, dense: Line) -> dict[str, float]:
    """One scene against the dense model's output for it; larger is worse, except for the speedup."""
    return {
        **{f"auc_{degrees}_loss": dense[f"auc_{degrees}"] - line[f"auc_{degrees}"] for degrees in (30, 5, 3)},
        **({"depth_abs_rel_rise": line["depth_abs_rel"] - dense["depth_abs_rel"]} if "depth_abs_rel" in dense else {}),
        **{key: line[key] for key in DISTANCES},
        "speedup": line["dense_cpu_s"] / line["cpu_s"],
    }


def rounded(effects: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Round to six decimals: people read the files, too."""
    return {name: for_json(found, 6) for name, found in effects.items()}


def markdown(found: dict[str, Any], picture_name: str) -> str:
    """A table for each frame count, changes against the dense model with 95 % intervals over scenes."""
    size, shown = found["size"], "photographs"
    if size:
        shown = f"{size[1]} x {size[0]} pixels"
    parts = [
        f"# What merging costs and saves: {found['model']}, {found['set']} set",
        f"![Accuracy kept against speedup]({picture_name}.png)",
        f"Changes against the dense model on the same scenes of {shown}, with 95 % intervals over "
        "scenes; bypassing off. Distances from the dense model's output: cameras (median over pairs, degrees), depth "
        "and points (relative). Queries and keys: what is left of them where the method acts. Speedup: processor "
        "seconds of the forward, dense over merged; and the predicted one, from 1.15 on which a method acts.",
    ]
    for frames, own in found["frames"].items():
        least, most = (pick(row["scenes"] for row in own) for pick in (min, max))
        dense = next(row for row in own if row["variant"] == DENSE)
        parts.append(f"## {frames} frames, scenes: {most if least == most else f'{least} to {most}'}")
        made_by = found["made_by"][frames]
        parts.append(f"{in_words(made_by)}, code {made_by['code']}.")
        header = [
            *("", f"AUC@30 of {dense['auc_30']:.3f}", f"AUC@5 of {dense['auc_5']:.3f}"),
            *(f"AUC@3 of {dense['auc_3']:.3f}", "AbsRel" + of_dense(dense), "cameras", "depth"),
            *("points", "queries", "keys", f"speedup over {dense['cpu_s']:.1f} s"),
        ]
        lines = [header, ["---"] * len(header), *(cells(row) for row in own if row is not dense)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |"))
    return "\n\n".join(parts) + "\n"


def of_dense(dense: dict[str, Any]) -> str:
    """The dense model's depth error, if every scene has depth."""
    return f" of {dense['depth_abs_rel']:.4f}" if "depth_abs_rel" in dense else ""


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    effects = row["effects"]
    losses = [effects[f"auc_{degrees}_loss"] for degrees in (30, 5, 3)]
    predicted = row.get("predicted_speedup")
    return [
        f"`{row['variant']}`",
        *(with_interval(loss, "+.3f", scale=-1) for loss in losses),
        with_interval(effects["depth_abs_rel_rise"], "+.4f") if "depth_abs_rel_rise" in effects else "not known",
        with_interval(effects["pose_median_deg"], ".2f"),
        with_interval(effects["depth_rel"], ".4f"),
        with_interval(effects["points"], ".4f"),
        *(f"{row[key]:.0%}".replace("%", " %") for key in ("queries", "keys")),
        with_interval(effects["speedup"], ".2f") + (f", predicted {predicted:.2f}" if predicted else ""),
    ]
