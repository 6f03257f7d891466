"""What every merging method costs in accuracy, its ablations included: one report for each model and frame count.

    python scripts/figures/measure_merging.py model=vggt-mini frames=64 scenes=8
    python scripts/figures/measure_merging.py model=pi3-mini frames=64 scenes=8 variants=httm

Settings are ``key=value``; ``variants`` keeps those whose name begins with it, ``first`` so many of them, and the dense
model always. Every variant is a `geoaccel eval` on the same validation scenes, with bypassing off: it says what a
method does where it acts, not whether it would have acted. Cameras and depth are scored against the truth; cameras,
depth and points are compared with the dense model's, which tells even a small change. A run that was killed continues;
what other code or another machine measured is measured anew.
Predictions of the dense model stay under ``out`` (60 MB for a scene of 64 frames), those of a variant only until all of
its scenes are measured; more scenes are then predicted anew. The differences are of everything that was measured there,
each variant on its own scenes; the report, whose picture sets them side by side, is of those on the dense model's.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from command_settings import run_with_settings
from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.eval.metrics.effects import effects, summary
from geoaccel.eval.report import Row
from geoaccel.eval.run.made_by import SCORES, made_by, read_record, write_record
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.run.source import Kept
from geoaccel.eval.run.store import Store
from geoaccel.eval.tools.command import finish, make_report
from geoaccel.eval.tools.evaluation import run_plan
from geoaccel.runtime import hardware, pick_device

MEASURED = "measured.json"
CODE = (*SCORES, "eval.tools.evaluation")

# What tells most comes first.
VARIANTS: dict[str, list[str]] = {
    "dense": [],
    "asymmetric": ["merging=asymmetric"],
    "httm": ["merging=httm"],
    "litevggt": ["merging=litevggt"],
    "fastvggt": ["merging=fastvggt"],
    "come": ["merging=come"],
    "alike": ["merging=alike"],
    "litevggt, random targets": ["merging=litevggt", "merging.litevggt.targets=random"],
    "come+httm": ["merging=[come,httm]"],
    "alike+httm": ["merging=[alike,httm]"],
    "litevggt, released choice": ["merging=litevggt", "merging.litevggt.released_code=true"],
    "alike, random groups": ["merging=come", "merging.come.choose=random", "merging.come.group=null"],
    "alike, most confident groups": ["merging=come", "merging.come.choose=most_confident", "merging.come.group=null"],
    "httm, no outlier filter": ["merging=httm", "merging.httm.outliers=0"],
    "alike, least confident groups": ["merging=come", "merging.come.group=null"],
    "alike, first frame kept": ["merging=alike", "merging.alike.anchor=true"],
    "httm, whole pictures": ["merging=httm", "merging.httm.block=spatial-first"],
    "httm, no anchor": ["merging=httm", "merging.httm.anchor=false"],
    "litevggt, keys weighed": ["merging=litevggt", "merging.litevggt.targets=random", "merging.litevggt.log_bias=true"],
    "alike, direct": ["merging=alike", "merging.alike.variant=direct"],
    "httm, keys weighed": ["merging=httm", "merging.httm.log_bias=true"],
    "httm, outliers of each head": ["merging=httm", "merging.httm.adaptive=false"],
    "fastvggt, keys weighed": ["merging=fastvggt", "merging.fastvggt.log_bias=true"],
    "fastvggt, released choice": ["merging=fastvggt", "merging.fastvggt.released_code=true"],
    "avggt": ["merging=avggt"],
}
BASES = dict.fromkeys(["litevggt, released choice", "litevggt, keys weighed"], "litevggt, random targets")
"""What a variant is set against where that is not the method in front of its comma."""

SETTINGS = {
    **{"model": "vggt-mini", "frames": "64", "scenes": "8", "variants": "", "first": "99"},
    **{"out": "runs/merging", "device": "auto", "fidelity": "false"},
}


@dataclass(frozen=True)
class Measured:
    """A variant, and what it does to each scene: names as in `geoaccel.eval.metrics.effects`, and what it costs.

    ``auc_30_loss`` and ``auc_5_loss`` are against the truth, ``depth_abs_rel_rise`` too; larger is worse. What was
    measured by other code or on another machine does not count.
    """

    row: Row
    effects: dict[str, dict[str, float]]

    @classmethod
    def read(cls, folder: Path, device: str) -> Measured | None:
        """What was written; None where nothing was that counts."""
        document = read_record(folder / MEASURED, made_by(device, CODE))
        return None if document is None else cls(Row(**document["row"]), document["effects"])

    def write(self, folder: Path, device: str) -> None:
        write_record(folder / MEASURED, made_by(device, CODE), asdict(self))

    @property
    def scores(self) -> dict[str, Any]:
        """Scene to its scores."""
        return {str(scene["scene"]): scene for scene in self.row.per_scene if "failed" not in scene}

    def mean(self, key: str) -> float:
        """A score over the scenes that were compared."""
        scores = self.scores
        return sum(scores[scene][key] for scene in self.effects) / len(self.effects)


def measure(settings: dict[str, str], command: str) -> list[Row]:
    """One row for each variant that was measured on all scenes of the dense model."""
    rows = []
    scenes: Any = None
    dense: Measured | None = None
    folder = Path(settings["out"]) / f"{Path(settings['model']).stem}-{settings['frames']}frames"
    kept = [name for name in VARIANTS if name.startswith(settings["variants"])][: int(settings["first"])]
    if not kept:
        raise UserError(f"variants={settings['variants']}: none begins so; there are {', '.join(VARIANTS)}")
    for name in dict.fromkeys(["dense", *kept]):
        plan = Plan.from_settings(compose_settings("eval", overrides(name, folder, settings)))
        scenes = scenes or Kept(plan.source)
        found = measured(name, replace(plan, source=scenes), dense, command)
        dense = dense or found
        if found.effects.keys() == dense.effects.keys():
            rows.append(found.row)
        print(f"{name}: AUC@30 {found.mean('auc_30'):.3f} on {len(found.effects)} scenes", file=sys.stderr)
    compared = differences(folder, settings["model"], pick_device(settings["device"]))
    write_text(folder / "differences.json", json.dumps(compared, indent=1) + "\n")
    finish(folder, make_report(f"{settings['model']}, {settings['frames']} frames", rows, "vggt-co3d"))
    return rows


def overrides(name: str, folder: Path, settings: dict[str, str]) -> list[str]:
    """Of `geoaccel eval`."""
    return [
        *("data=synthetic", f"model={settings['model']}", f"data.frames={settings['frames']}"),
        *(f"data.scenes={settings['scenes']}", f"device={settings['device']}", "timing.repeats=0"),
        *(f"fidelity={settings['fidelity']}", f"out={folder / folder_name(name)}"),
        "data.protocol.points=null",
        *VARIANTS[name],
        *(f"merging.{method}.bypass=false" for method in sorted(methods(name))),
    ]


def measured(name: str, plan: Plan, dense: Measured | None, command: str) -> Measured:
    """What was measured on as many scenes, or measured now.

    Args:
        name: Of the variant.
        plan: Its evaluation, in a folder beside the dense model's.
        dense: What was found of the dense model; None while that is the variant, whose predictions must be there.
        command: For the report.
    """
    store = plan.store()  # refuses a folder of other weights or knobs
    before = Measured.read(plan.folder, plan.job.device)
    enough = before is not None and len(before.effects) >= len(plan.source)
    if before is not None and enough and (dense is not None or all(scene in store for scene in before.effects)):
        return before
    (row,) = run_plan(plan, command)
    own = Measured(replace(row, merging="none" if dense is None else name), {})
    reference = own if dense is None else dense
    dense_store = Store.open(plan.folder.parent / "dense")
    for scene, now in own.scores.items():
        was = reference.scores.get(scene)
        if was is None:
            continue
        own.effects[scene] = {
            **effects(store.read(scene).geometry, dense_store.read(scene).geometry, None),
            **{f"{key}_loss": was[key] - now[key] for key in ("auc_30", "auc_5")},
            "depth_abs_rel_rise": now["depth_abs_rel"] - was["depth_abs_rel"],
        }
    own.write(plan.folder, plan.job.device)
    if dense is not None:
        for scene in own.effects:
            store.remove(scene)
    return own


def differences(folder: Path, model: str, device: str) -> dict[str, Any]:
    """What every variant does against the dense model, and each ablation against its method on the scenes of both.

    Means with bootstrapped 95 % intervals over scenes.
    """
    found = {name: one for name in VARIANTS if (one := Measured.read(folder / folder_name(name), device))}
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        row: dict[str, Any] = {
            "variant": name,
            **{key: round(one.mean(key), 4) for key in ("auc_30", "depth_abs_rel")},
            "effective_ratio": one.row.effective_ratio,
            "scenes": len(one.effects),
            "effects": summary(list(one.effects.values())),
        }
        method = found.get(BASES.get(name, name.partition(",")[0]))
        if method is not None and method is not one:
            shared = sorted(one.effects.keys() & method.effects.keys())
            changes = [{key: one.effects[s][key] - method.effects[s][key] for key in one.effects[s]} for s in shared]
            row["minus"] = {method.row.merging: summary(changes)}
        rows.append(row)
    return {
        "model": model,
        "folder": folder.name,
        "hardware": hardware(device),
        **made_by(device, CODE),
        "rows": rows,
    }


def methods(variant: str) -> set[str]:
    """Names of those that act."""
    chosen = [setting for setting in VARIANTS[variant] if setting.startswith("merging=")]
    return {name for setting in chosen for name in setting.removeprefix("merging=").strip("[]").split(",")}


def folder_name(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-")


def main() -> None:
    command = shlex.join(["python", *sys.argv])
    sys.exit(run_with_settings("measure_merging", SETTINGS, lambda settings: measure(settings, command)))


if __name__ == "__main__":
    main()
