"""Tables of the fastest methods at many frames, all rows from one run: ours, plans of ``geoaccel tune``, others'.

    python scripts/figures/measure_frames.py measure vggt-mini --set report --frames 32:32 64:16 128:8 256:1 \\
        --variants published ours benchmarks/tuned-vggt-mini-{0.5,1,2}-deg.yaml 'free attention'
    python scripts/figures/measure_frames.py summary --set report

`method_pages.py` and `mini_tables.py` put them into the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geoaccel.eval.metrics.effects import with_interval
from merging_tables import cost
from merging_variants import DENSE, FREE, GROUPS
from table_parts import read, table

DOCUMENTS, OURS = "merging-{}-frames-report.json", "asymmetric"
COUNTED, MORE_SCENES = "counted-{}-frames-validation.json", "more-scenes-{}-frames-report.json"
HEADER = ("network, frames (scenes)", "", "AUC@30", "AUC@5", "AbsRel", "degrees to dense", "speedup", "of limit")

FEWEST, MANY = 32, 64
"""Frames that a plan was tuned on, and the minimum that counts as many."""

PLANS, FASTEST_PLAN = "tuned-", "-2-deg"
"""Prefix of plan names, and suffix of the one with the largest budget."""

USABLE = 0.1
"""A published method that loses more AUC@30 than this is not compared with ours, however fast it is."""


def many_frames(name: str) -> list[str]:
    """Table: our method and its fastest plan against the fastest published method; empty for other methods."""
    if name != OURS:
        return []
    return _table(read(DOCUMENTS), lambda frames: frames >= MANY, lambda one: one == OURS or one.endswith(FASTEST_PLAN))


def more_scenes(name: str) -> list[str]:
    """Table: our method, its strides and its plans on scenes of another run; empty for other methods."""
    if name != OURS:
        return []
    return _table(read(MORE_SCENES), lambda frames: True, lambda one: one.startswith((OURS, PLANS)))


def counted_frames(name: str) -> list[str]:
    """Table: our method with ``counted_frames`` on validation scenes; empty for other methods."""
    if name != OURS:
        return []
    documents, header = read(COUNTED), ["frames", ""]
    for model in documents:
        header += [f"`{model}`, scenes", "AUC@30", "AUC@5", "degrees to dense"]
    rows = []
    for count, found in next(iter(documents.values()))["frames"].items():
        for variant in (one["variant"] for one in found if one["variant"] != DENSE):
            knob = variant.removeprefix(f"{OURS}, ")
            if knob == f"counted_frames={count}":  # which changes nothing
                continue
            row = [count, f"`{knob}`"]
            for document in documents.values():
                own = next(one for one in document["frames"][count] if one["variant"] == variant)
                degrees = with_interval(own["effects"]["pose_median_deg"], ".2f")
                row += [str(own["scenes"]), *cost(own["effects"], strictest=True)[:2], degrees]
            rows.append(row)
    return table(header, rows)


def plans() -> list[str]:
    """Table: plans of ``geoaccel tune`` against the method without one, and the fastest published one."""
    return _table(
        read(DOCUMENTS), lambda frames: FEWEST <= frames <= MANY, lambda one: one == OURS or one.startswith(PLANS)
    )


def _table(
    documents: dict[str, dict[str, Any]], counts: Callable[[int], bool], shown: Callable[[str], bool]
) -> list[str]:
    rows = []
    for model, document in documents.items():
        for count, found in ((count, found) for count, found in document["frames"].items() if counts(int(count))):
            fastest, limit = _fastest(found), next(_saved(one) for one in found if one["variant"] == FREE)
            for one in (one for one in found if one["variant"] == fastest or shown(one["variant"])):
                effects = one["effects"]
                changes = cost(effects, strictest=True)[:2]
                distances = [
                    with_interval(effects["depth_abs_rel_rise"], "+.4f"),
                    with_interval(effects["pose_median_deg"], ".2f"),
                ]
                share = f"{_saved(one) / limit:.0%}".replace("%", " %")
                where, cells = f"`{model}`, {count} ({one['scenes']})", [*changes, *distances]
                rows.append([where, _named(one["variant"], model), *cells, f"{_speedup(one):.2f}x", share])
    return table(HEADER, rows)


def _named(variant: str, model: str) -> str:
    """Name of a row: a variant, or a plan by its budget."""
    if not variant.startswith(PLANS):
        return f"`{variant}`"
    budget = variant.removeprefix(f"{PLANS}{model}-").removesuffix("-deg")
    return f"plan, {budget} {'degree' if budget == '1' else 'degrees'}"


def _fastest(found: list[dict[str, Any]]) -> str:
    """Name of the fastest usable published method."""
    published = [one for one in found if one["variant"] in GROUPS["published"]]
    usable = [one for one in published if one["effects"]["auc_30_loss"]["mean"] <= USABLE]
    return str(max(usable, key=_speedup)["variant"])


def _speedup(one: dict[str, Any]) -> float:
    return float(one["effects"]["speedup"]["mean"])


def _saved(one: dict[str, Any]) -> float:
    """Fraction of the dense forward's time."""
    return 1 - 1 / _speedup(one)
