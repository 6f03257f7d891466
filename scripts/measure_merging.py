"""What every merging method costs in accuracy, its ablations included: one report for each model and frame count.

    python scripts/measure_merging.py model=vggt-mini frames=64 scenes=8
    python scripts/measure_merging.py model=pi3-mini frames=64 scenes=8 variants=httm

Settings are ``key=value``; ``variants`` keeps those whose name begins with it, ``first`` so many of them. Every variant
is a `geoaccel eval` on the same rendered test scenes, with bypassing off: it says what a method does to the cameras
where it acts, not whether it would have acted. Only cameras are scored. Predictions stay under ``out``, so that a run
that was killed continues.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from geoaccel.cli import USER_ERRORS, pick_device
from geoaccel.eval.command import finish, make_report
from geoaccel.eval.evaluation import Plan
from geoaccel.eval.machine import hardware, versions
from geoaccel.eval.report import Row
from geoaccel.eval.settings import compose_settings
from geoaccel.eval.source import Kept
from geoaccel.eval.store import write_text

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
    "come, random groups": ["merging=come", "merging.come.choose=random"],
    "come, most confident groups": ["merging=come", "merging.come.choose=most_confident"],
    "come+httm": ["merging=[come,httm]"],
    "httm, keys weighed": ["merging=httm", "merging.httm.log_counts=true"],
    "httm, outliers of each head": ["merging=httm", "merging.httm.adaptive=false"],
    "fastvggt, keys weighed": ["merging=fastvggt", "merging.fastvggt.log_bias=true"],
    "fastvggt, released choice": ["merging=fastvggt", "merging.fastvggt.released_code=true"],
    "come, direct": ["merging=come", "merging.come.variant=direct"],
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
    chosen = {name: VARIANTS[name] for name in kept}
    if not chosen:
        raise ValueError(f"variants={settings['variants']}: none begins so; there are {', '.join(VARIANTS)}")
    for name, changes in chosen.items():
        methods = {"come", "httm"} if name == "come+httm" else {name.partition(",")[0]} - {"dense"}
        overrides = [
            *("data=synthetic", f"model={settings['model']}", f"data.frames={settings['frames']}"),
            *(f"data.scenes={settings['scenes']}", f"device={settings['device']}", "timing.repeats=0"),
            *(f"fidelity={settings['fidelity']}", f"out={folder / folder_name(name)}"),
            *("data.protocol.points=null", "data.protocol.depth=null"),
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
    """Change of AUC@30 against the dense model on the same scenes, with bootstrapped 95 % intervals over scenes."""
    found = {}
    for name in VARIANTS:
        path = folder / folder_name(name) / "scores.json"
        if path.exists():
            document = json.loads(path.read_text())
            scenes = {scene["scene"]: scene["auc_30"] for scene in document["scenes"]}
            found[name] = (scenes, document["effective_ratio"])
    dense = found["dense"][0]
    rows = []
    for name, (scenes, ratio) in found.items():
        change = torch.tensor([scenes[scene] - dense[scene] for scene in dense if scene in scenes], dtype=torch.float64)
        draws = torch.randint(len(change), (10_000, len(change)), generator=torch.Generator().manual_seed(0))
        interval = change[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        rows.append(
            {
                "variant": name,
                "auc_30": round(sum(scenes.values()) / len(scenes), 4),
                "change": round(float(change.mean()), 4),
                "interval_95": [round(float(bound), 4) for bound in interval],
                "effective_ratio": ratio,
                "scenes": len(scenes),
            }
        )
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
