"""The tables about the mini checkpoints that documents and their cards show, from the figures in `benchmarks/`.

    python scripts/figures/mini_tables.py            # prints them
    python scripts/figures/mini_tables.py --write    # puts them into README, `docs/` and cards

`docs/test_figures.py` holds the documents to them; the text around them is corrected by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from geoaccel.atomic import write_text
from geoaccel.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODELS = ("vggt-mini", "pi3-mini")
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
FEW, MANY = 16, 64
SHOWN = (8, FEW, 32, MANY)
"""Frame counts that are shown; the README shows two."""
FRONT = {
    **{name: f"`{name}`" for name in ("httm", "litevggt", "fastvggt", "come", "avggt")},
    **{name: f"**`{name}`**, ours" for name in ("asymmetric", "alike")},
}
"""The table of the README."""
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
MERGED = {
    "httm": "`httm`",
    "litevggt": "`litevggt`",
    "litevggt, random targets": '`litevggt` with `targets="random"`, ours',
    "fastvggt": "`fastvggt`",
    "come": "`come`",
    "alike": "`alike`, ours",
    "come+httm": "`come` + `httm`",
    "alike+httm": "`alike` + `httm`",
}
"""As published, and ours."""

ABLATED = {
    "httm, no outlier filter": "`httm` without its outlier filter",
    "httm, whole pictures": "`httm` in blocks of four whole pictures",
    "httm, no anchor": "`httm` without the first frame as anchor",
    "litevggt, random targets": '`litevggt` with random targets (`targets="random"`)',
    "litevggt, released choice": "the released code's targets (`released_code=True`), against random ones",
    "litevggt, keys weighed": "random targets with `log_bias=True`, against random ones without",
    "alike, least confident groups": "`alike`, the least confident groups instead, as `come` chooses",
    "alike, random groups": "`alike`, groups at random",
    "alike, most confident groups": "`alike`, the most confident groups",
    "alike, first frame kept": "`alike` with the first frame left as it is (`anchor=True`)",
    "alike, direct": "`alike`, merged anew in front of every step",
}


def read(what: str) -> dict[str, dict[str, Any]]:
    """The figures of both models; ``{}`` in the name stands for the model."""
    return {model: json.loads((BENCHMARKS / what.format(model)).read_text()) for model in MODELS}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of markdown."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (list(header), *map(list, rows))]
    return [lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]]


def card(model: str) -> list[str]:
    """Scores of a float network."""
    found = read("scores-{}.json")[model]["rows"]["float"]
    return table(("", "measured", "aim"), [(name, form.format(found[key]), aim) for name, key, form, aim in SCORES])


def scored() -> list[str]:
    """Scores of both float networks, over frame counts, and blind to other frames."""
    rows = {model: document["rows"] for model, document in read("scores-{}.json").items()}
    for model, variants in merging().items():
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
        return [
            "{:.{n}f} ({:.{n}f} to {:.{n}f})".format(*(x[key] * unit for key in ("mean", "low", "high")), n=digits)
            for x, unit, digits in columns
        ]

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


def merged() -> list[str]:
    """Table: the cost of merging at 64 frames."""
    found = merging()
    dense = [found[model]["dense"] for model in MODELS]
    names = [f"`{m}`, AUC@30 of {row['auc_30']:.3f}" for m, row in zip(MODELS, dense, strict=True)]
    columns = [(name, "AUC@5", f"AbsRel of {row['depth_abs_rel']:.4f}") for name, row in zip(names, dense, strict=True)]
    rows = [
        (
            title,
            f"{found['vggt-mini'][variant]['effective_ratio']:.0%}".replace("%", " %"),
            *(cell for model in MODELS for cell in cost(found[model][variant]["effects"], strictest=True)),
        )
        for variant, title in MERGED.items()
        if all(variant in found[model] for model in MODELS)
    ]
    return table(("", "tokens merged", *(name for group in columns for name in group)), rows)


def ablated() -> list[str]:
    """Table: the parts of merging methods, each method changed against what the row names."""
    found = merging()
    rows = [
        (
            title,
            str(min(found[model][variant]["scenes"] for model in MODELS)),
            *(cell for m in MODELS for cell in cost(*found[m][variant]["minus"].values())),
        )
        for variant, title in ABLATED.items()
    ]
    return table(("", "scenes", *(name for m in MODELS for name in (f"`{m}`, AUC@30", "AbsRel"))), rows)


def front() -> list[str]:
    """Table: what merging costs and saves on the first network, at few and at many frames of the report set."""
    document = read("merging-{}-frames-report.json")[MODELS[0]]
    counts = {frames: {row["variant"]: row for row in document["frames"][str(frames)]} for frames in (FEW, MANY)}
    header = [""]
    for frames, of in counts.items():
        scenes = max(row["scenes"] for row in of.values())
        header += [f"{frames} frames, {scenes} scenes: AUC@30 of {of['dense']['auc_30']:.3f}"]
        header += [f"AUC@5 of {of['dense']['auc_5']:.3f}", "speedup"]

    def cells(effects: dict[str, dict[str, float]]) -> list[str]:
        return [*cost(effects, strictest=True)[:2], f"{effects['speedup']['mean']:.2f}x"]

    def shown(name: str) -> list[str]:
        return [cell for of in counts.values() for cell in cells(of[name]["effects"])]

    return table(header, ([label, *shown(name)] for name, label in FRONT.items()))


def reported(frames: int) -> list[str]:
    """Table: what merging costs and saves at one frame count, on the report set."""
    found = read("merging-{}-frames-report.json")
    title = "{} frames, `{}`: AUC@30 of {:.3f}"
    rows: dict[str, list[str]] = {}
    header = [""]
    for model, document in found.items():
        of = {row["variant"]: row for row in document["frames"][str(frames)]}
        header += [title.format(frames, model, of["dense"]["auc_30"]), f"AUC@5 of {of['dense']['auc_5']:.3f}"]
        header += ["degrees to dense", "speedup"]
        for name, label in {**MERGED, "avggt": "`avggt`", "asymmetric": "`asymmetric`, ours"}.items():
            if name not in of:
                continue
            effects = of[name]["effects"]
            deg, speedup = effects["pose_median_deg"]["mean"], effects["speedup"]["mean"]
            cells = [*cost(effects, strictest=True)[:2], f"{deg:.2f}", f"{speedup:.2f}x"]
            rows[label] = [*rows.get(label, []), *cells]
    return table(header, ([label, *cells] for label, cells in rows.items()))


def photographs() -> list[str]:
    """Table: how far methods move the output on rendered scenes and on photographs, and their order by it."""
    sets = [read(f"merging-{{}}-frames-{name}.json") for name in ("report", "photographs")]
    header, rows = [""], {name: [label] for name, label in FRONT.items()}
    for model in MODELS:
        for effect, what, form in (("pose_median_deg", "cameras, deg", ".2f"), ("depth_rel", "depth", ".4f")):
            for kind, documents in zip(("rendered", "photographs"), sets, strict=True):
                found = {row["variant"]: row["effects"] for row in documents[model]["frames"][str(FEW)]}
                means = {name: found[name][effect]["mean"] for name in FRONT}
                ranks = {name: 1 + sum(other < mean for other in means.values()) for name, mean in means.items()}
                header.append(f"`{model}`, {kind}: {what}")
                for name, mean in means.items():
                    rows[name].append(f"{mean:{form}} ({ranks[name]})")
    return table(header, rows.values())


def merging() -> dict[str, dict[str, Any]]:
    """Model to variant to what was found."""
    return {m: {row["variant"]: row for row in d["rows"]} for m, d in read("merging-{}-64frames.json").items()}


def cost(effects: dict[str, dict[str, float]], *, strictest: bool = False) -> tuple[str, ...]:
    """Cells of AUC@30, if asked for AUC@5, and depth AbsRel: the change, with its interval."""
    losses = ["auc_30_loss", "auc_5_loss"] if strictest else ["auc_30_loss"]
    lost, risen = [effects[name] for name in losses], effects["depth_abs_rel_rise"]
    return (
        *(f"{-loss['mean']:+.3f} ({-loss['high']:+.3f} to {-loss['low']:+.3f})" for loss in lost),
        f"{risen['mean']:+.4f} ({risen['low']:+.4f} to {risen['high']:+.4f})",
    )


def filled(text: str, lines: list[str]) -> str:
    """A text with these lines in place of its table whose first row and second column are called alike.

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
        f"Merging at {frames} frames": partial(reported, frames) for frames in SHOWN
    }
    documents: dict[Path, dict[str, Callable[[], list[str]]]] = {
        ROOT / "README.md": {"Front": front},
        docs / "results" / "merging.md": {
            **counts,
            "Merging": merged,
            "Ablations of merging": ablated,
        },
        docs / "results" / "photographs.md": {"Photographs": photographs},
        docs / "quantization.md": {"Quantization": quantized, "Calibration": calibrated},
        docs / "checkpoints.md": {"Scores": scored},
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
