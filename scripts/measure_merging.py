"""What every merging method costs in accuracy, its ablations included: one report for each model and frame count.

    python scripts/measure_merging.py model=vggt-mini frames=64 scenes=8
    python scripts/measure_merging.py model=pi3-mini frames=64 scenes=8 variants=httm

Settings are ``key=value``; ``variants`` keeps those whose name begins with it, ``first`` so many of them, and the dense
model always. Every variant is a `geoaccel eval` on the same rendered test scenes, with bypassing off: it says what a
method does where it acts, not whether it would have acted. Cameras and depth are scored against the truth; cameras,
depth and points are compared with the dense model's, which tells even a small change. Predictions stay under ``out``,
so that a run that was killed continues.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geoaccel.cli import USER_ERRORS, pick_device
from geoaccel.eval.answer_effects import effects, summary
from geoaccel.eval.command import finish, make_report
from geoaccel.eval.evaluation import Plan
from geoaccel.eval.machine import hardware, versions
from geoaccel.eval.report import Row
from geoaccel.eval.settings import compose_settings
from geoaccel.eval.source import Kept
from geoaccel.eval.store import Store, write_text

# What tells most comes first.
VARIANTS: dict[str, list[str]] = {
    "dense": [],
    "httm": ["merging=httm"],
    "httm, whole pictures": ["merging=httm", "merging.httm.block=spatial-first"],
    "httm, no outlier filter": ["merging=httm", "merging.httm.outliers=0"],
    "httm, no anchor": ["merging=httm", "merging.httm.anchor=false"],
    "litevggt": ["merging=litevggt"],
    "litevggt, released choice": ["merging=litevggt", "merging.litevggt.released_code=true"],
    "litevggt, keys weighed": ["merging=litevggt", "merging.litevggt.log_bias=true"],
    "fastvggt": ["merging=fastvggt"],
    "come": ["merging=come"],
    "come, least confident groups": ["merging=come", "merging.come.choose=least_confident"],
    "come, random groups": ["merging=come", "merging.come.choose=random"],
    "come, most confident groups": ["merging=come", "merging.come.choose=most_confident"],
    "come, first frame kept": ["merging=come", "merging.come.anchor=true"],
    "come, direct": ["merging=come", "merging.come.variant=direct"],
    "come+httm": ["merging=[come,httm]"],
    "httm, keys weighed": ["merging=httm", "merging.httm.log_counts=true"],
    "httm, outliers of each head": ["merging=httm", "merging.httm.adaptive=false"],
    "fastvggt, keys weighed": ["merging=fastvggt", "merging.fastvggt.log_bias=true"],
    "fastvggt, released choice": ["merging=fastvggt", "merging.fastvggt.released_code=true"],
}
SETTINGS = {
    **{"model": "vggt-mini", "frames": "64", "scenes": "8", "variants": "", "first": "99"},
    **{"out": "runs/merging", "device": "auto", "fidelity": "false"},
}


def measure(settings: dict[str, str], command: str) -> list[Row]:
    """One row for each variant."""
    rows = []
    scenes: Any = None
    folder = Path(settings["out"]) / f"{Path(settings['model']).stem}-{settings['frames']}frames"
    kept = [name for name in VARIANTS if name.startswith(settings["variants"])][: int(settings["first"])]
    chosen = {name: VARIANTS[name] for name in dict.fromkeys(["dense", *kept])}
    if not kept:
        raise ValueError(f"variants={settings['variants']}: none begins so; there are {', '.join(VARIANTS)}")
    for name, changes in chosen.items():
        methods = {"come", "httm"} if name == "come+httm" else {name.partition(",")[0]} - {"dense"}
        overrides = [
            *("data=synthetic", f"model={settings['model']}", f"data.frames={settings['frames']}"),
            *(f"data.scenes={settings['scenes']}", f"device={settings['device']}", "timing.repeats=0"),
            *(f"fidelity={settings['fidelity']}", f"out={folder / folder_name(name)}"),
            "data.protocol.points=null",
            *changes,
            *(f"merging.{method}.bypass=false" for method in sorted(methods)),
        ]
        plan = Plan.from_settings(compose_settings("eval", overrides), pick_device)
        scenes = scenes or Kept(plan.source)
        (row,) = dataclasses.replace(plan, source=scenes).run(command)
        rows.append(dataclasses.replace(row, merging="none" if name == "dense" else name))
        print(f"{name}: AUC@30 {row.scores['auc_30']:.3f}", file=sys.stderr)
    write_text(folder / "differences.json", json.dumps(differences(folder, settings["model"]), indent=1) + "\n")
    finish(folder, make_report(f"{settings['model']}, {settings['frames']} frames", rows, "vggt-co3d"))
    return rows


def differences(folder: Path, model: str) -> dict[str, Any]:
    """What every variant does on the same scenes, against the dense model, and each ablation against its method.

    Means with bootstrapped 95 % intervals over scenes, larger is worse; names as in `geoaccel.eval.answer_effects`, and
    ``depth_abs_rel_rise`` against the truth.
    """
    documents = {name: folder / folder_name(name) / "scores.json" for name in VARIANTS}
    measured = {name: json.loads(path.read_text()) for name, path in documents.items() if path.exists()}
    scores = {name: {scene["scene"]: scene for scene in found["scenes"]} for name, found in measured.items()}
    shared = [scene for scene in scores["dense"] if all(scene in found for found in scores.values())]
    dense = Store.open(folder / "dense")
    rows: list[dict[str, Any]] = []
    found: dict[str, list[dict[str, float]]] = {}
    for name in tqdm(measured, unit="variant", desc="differences"):
        answers = Store.open(folder / folder_name(name))
        found[name] = [
            effects(answers.read(scene).geometry, dense.read(scene).geometry, None)
            | {f"{key}_loss": scores["dense"][scene][key] - scores[name][scene][key] for key in ("auc_30", "auc_5")}
            | {"depth_abs_rel_rise": scores[name][scene]["depth_abs_rel"] - scores["dense"][scene]["depth_abs_rel"]}
            for scene in shared
        ]
        row = {
            "variant": name,
            **{
                key: round(sum(scores[name][scene][key] for scene in shared) / len(shared), 4)
                for key in ("auc_30", "depth_abs_rel")
            },
            "effective_ratio": measured[name]["effective_ratio"],
            "scenes": len(shared),
            "effects": summary(found[name]),
        }
        method = name.partition(",")[0]
        if method != name and method in found:
            pairs = zip(found[name], found[method], strict=True)
            row["minus"] = {method: summary([{key: a[key] - b[key] for key in a} for a, b in pairs])}
        rows.append(row)
    return {
        "model": model,
        "folder": folder.name,
        "hardware": hardware(pick_device("auto")),
        **versions(),
        "rows": rows,
    }


def folder_name(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-")


def main() -> None:
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    try:
        unknown = given.keys() - SETTINGS.keys()
        if unknown:
            raise ValueError(f"unknown setting {sorted(unknown)[0]!r}; known: {', '.join(SETTINGS)}")
        measure({**SETTINGS, **given}, shlex.join(["python", *sys.argv]))
    except USER_ERRORS as error:
        print(f"measure_merging: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
