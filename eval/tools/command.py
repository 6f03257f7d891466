"""``geoaccel eval`` and ``geoaccel bench``: from overrides to measurements and a report."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeAlias

import yaml

from geoaccel.claims import cannot_write
from geoaccel.console import say
from geoaccel.errors import UserError
from geoaccel.eval.bench.bench import Bench
from geoaccel.eval.bench.merge3d import Merge3DBench
from geoaccel.eval.report import Report, Row, json_line, terminal_table, write_report
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.room import Room
from geoaccel.eval.run.settings import combinations, compose_settings, sweep
from geoaccel.eval.run.source import Source
from geoaccel.eval.tools.evaluation import of_one_sitting, run_plan
from geoaccel.fingerprint import of_json
from geoaccel.models.weights import backbone_of
from geoaccel.registry import Registry

ONE_TABLE = "they cannot share a table, as no column distinguishes their rows; run the command once for each"
OF_FRAMES = ("data.frames", "data.rule", "data.stride")
MAX_NAME = 80  # characters that a run adds to its folder's name

AnyPlan: TypeAlias = Plan | Bench | Merge3DBench
SUITES: Registry[type[Bench] | type[Merge3DBench]] = Registry("benchmark", {"speed": Bench, "merge3d": Merge3DBench})


def run_command(
    name: str,
    overrides: Sequence[str],
    *,
    config: str | None = None,
    multirun: bool = False,
    show: bool = False,
) -> str:
    """Run ``eval`` or ``bench``.

    Args:
        name: Which of the two.
        overrides: ``key=value`` as given.
        config: File in ``configs`` in place of the one of that name; its ``sweep`` runs without ``multirun``.
        multirun: Run every combination of overrides with several values.
        show: Only show the settings.

    Returns:
        Text for stdout: one line of JSON for the last row, or the settings as YAML.

    Raises:
        ValueError: For any user error.
    """
    config = config or name
    if show:
        return yaml.safe_dump(compose_settings(config, overrides), sort_keys=False).rstrip()
    given = len(list(sweep(overrides)))
    if given > 1 and not multirun:
        raise UserError(f"{given} combinations of {' '.join(overrides)}: add --multirun to run all of them")
    plans = make_plans(name, config, overrides)
    check_one_source(plans)
    check_folders(plans)
    check_models(plans)
    check_sources(plans)
    check_one_length(plans)
    for plan in plans:
        share_lengths(plan, plans)  # some may have lengths from an earlier run
    if len(scored := {plan.scored for plan in plans}) > 1:
        raise UserError(f"{' and '.join(sorted(scored))}: {ONE_TABLE}")
    options = [*(["--config", config] if config != name else []), *(["--multirun"] if multirun else [])]
    command = shlex.join(["geoaccel", name, *options, *overrides])
    measured: list[tuple[AnyPlan, list[Row]]] = []
    for plan in plans:
        share_lengths(plan, plans)
        found = run_plan(plan, command) if isinstance(plan, Plan) else plan.run(command)
        measured.append((plan, found))
        finish(plan.folder, make_report(plan.title, found, plan.scored))
    if len(plans) > 1:
        joined = make_report(f"{name}: {len(plans)} runs", of_one_sitting(without_repeats(measured)), plans[0].scored)
        finish(sweep_folder(plans[0].folder, name), joined)
    return json_line(measured[-1][1][-1])


def share_lengths(plan: AnyPlan, plans: Sequence[AnyPlan]) -> None:
    """Give a run with ``windows=auto`` the windows of another run in its table, if that has chosen some."""
    auto = plan.auto() if isinstance(plan, Plan) else None
    if auto is None or auto.read() is not None:
        return
    others = [other for one in plans if isinstance(one, Plan) and (other := one.auto()) is not None]
    known = next((lengths for other in others if (lengths := other.read()) is not None), None)
    if known is not None:
        assert isinstance(plan, Plan)
        plan.store()  # creates the folder, or rejects another configuration's
        auto.keep(known)


def check_one_length(plans: Sequence[AnyPlan]) -> None:
    """Reject ``windows=auto`` for models that fit different windows: the first one's may be too long for the next.

    Raises:
        ValueError: Naming the difference.
    """
    found = [plan.job.dense.describe() for plan in plans if isinstance(plan, Plan) and plan.auto() is not None]
    for name in found[0] if found else ():
        given = dict.fromkeys(f"{name}={one.get(name)}" for one in found)
        if len(given) > 1:
            raise UserError(f"windows=auto differs between {' and '.join(given)}; give a number, such as windows=32")


def check_one_source(plans: Sequence[AnyPlan]) -> None:
    """Reject runs with different scenes, as rows do not show it.

    Raises:
        ValueError: Naming both.
    """
    sources = [plan.source.settings for plan in plans if isinstance(plan, Plan)]
    for name in dict.fromkeys(name for source in sources for name in source):
        # Rows have a column for frames, and "all frames" is a separate rule.
        same = [one for one in sources if name not in OF_FRAMES or one["data.frames"] == sources[0]["data.frames"]]
        given = dict.fromkeys(f"{name}={one.get(name)}" for one in same)
        if len(given) > 1 and name != "data.frames":
            raise UserError(f"{' and '.join(given)}: {ONE_TABLE}")


def check_folders(plans: Sequence[AnyPlan]) -> None:
    """Find out whether results can be written where they are to go, which must not show after an hour.

    Raises:
        OSError: In one line.
    """
    for folder in dict.fromkeys(plan.folder.absolute() for plan in plans):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not place.is_dir():
            raise FileExistsError(f"cannot write to {folder}: {place} is a file; choose another folder (out=FOLDER)")
        try:
            with TemporaryFile(dir=place) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            raise cannot_write(place, error) from None


def check_models(plans: Sequence[AnyPlan]) -> None:
    """Find the model of every run, or fetch it: a misspelt one must not show when the runs before it are done.

    Raises:
        ValueError: For a model that is not there, or no checkpoint.
    """
    names = [plan.job.model if isinstance(plan, Plan) else plan.checkpoint for plan in plans]
    for name in dict.fromkeys(names):
        if name is not None:
            backbone_of(name)


def check_sources(plans: Sequence[AnyPlan]) -> None:
    """Look for the scenes of every run, without reading one, and refuse those that no run can take.

    Raises:
        FileNotFoundError: The data set is not where it should be.
        ValueError: For an option that a reader refuses, or rendered images that do not divide into patches.
    """
    seen: list[Source] = []
    for plan in (one for one in plans if isinstance(one, Plan)):
        if plan.source not in seen:
            seen.append(plan.source)
            plan.source()
    rendered = [plan for plan in plans if isinstance(plan, Plan) and plan.source.is_rendered and not plan.job.resize]
    for model, plan in {plan.job.model: plan for plan in rendered if "size" in plan.source.options}.items():
        size, patch = list(plan.source.options["size"]), Room(plan.job).outline.preprocess.patch_size
        if any(side % patch for side in size):
            raise UserError(
                f"data.options.size={size}: {model} takes multiples of {patch}, its patches; give such a size, or "
                "data.resize=true"
            )


def make_plans(name: str, config: str, overrides: Sequence[str]) -> list[AnyPlan]:
    """Plans of every combination of the overrides, each with its own folder.

    All are checked before the first runs, so that a typo in the last is found at once.

    Raises:
        ValueError: For an invalid setting, two runs that would write to the same folder, or a sweep over knobs of
            methods on the report set.
    """
    plans: list[AnyPlan] = []
    chosen: list[list[str]] = []
    given_out = False
    given = combinations(config, overrides)
    knobs = swept_knobs(given)
    for combination in given:
        settings = compose_settings(config, combination)
        plan = make_plan(name, settings)
        if knobs and isinstance(plan, Plan) and plan.source.split == "report":
            raise UserError(
                f"a sweep over {', '.join(knobs)} is for choosing, and nothing may be chosen on the report set; sweep "
                "on data.split=validation, and evaluate the choice on data.split=report"
            )
        given_out = given_out or settings["out"] is not None
        if plan not in plans:  # a dense model has no ratio to sweep
            plans.append(plan)
            chosen.append(combination)
    return with_own_folders(plans, chosen, inside=given_out)


def without_repeats(found: Sequence[tuple[AnyPlan, Sequence[Row]]]) -> list[Row]:
    """All rows; of several dense rows on the same scenes, only the one with the most results."""
    rows: list[Row] = []
    dense: list[tuple[object, int]] = []
    for plan, own in found:
        scenes = (plan.job.dense, plan.source, plan.protocol) if isinstance(plan, Plan) else None
        for row in own:
            repeats = isinstance(plan, Plan) and (row.merging, row.quantization) == ("none", plan.job.held)
            place = next((i for known, i in dense if known == scenes), None) if repeats else None
            if place is None:
                dense += [(scenes, len(rows))] if repeats else []
                rows.append(row)
            elif len(row.scores) > len(rows[place].scores):
                rows[place] = row
    return rows


def swept_knobs(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Knobs of methods in which runs differ: ``ratio``, ``merging.httm.query_keep``, ``layers``, ``plan``.

    A comparison of layers or a plan with none is not a choice among knobs.

    Args:
        overrides: Overrides of each run; the same settings in the same order, with other values.
    """
    differing = [
        (values[0].lstrip("+~").split("=", 1)[0], {value.split("=", 1)[-1] for value in values})
        for values in zip(*overrides, strict=True)
    ]
    return [
        name
        for name, values in differing
        if (len(values) > 1 and (name == "ratio" or name.startswith(("merging.", "quantization.", "layers."))))
        or (len(values - {"null", ""}) > 1 and name in ("layers", "plan"))
    ]


def make_plan(name: str, settings: Mapping[str, Any]) -> AnyPlan:
    """The plan that a command runs, checked.

    Raises:
        ValueError: For an invalid setting.
    """
    kind = Plan if name == "eval" else SUITES[settings["suite"]]
    return kind.from_settings(settings)


def with_own_folders(plans: Sequence[AnyPlan], overrides: Sequence[Sequence[str]], *, inside: bool) -> list[AnyPlan]:
    """Give runs that would share a folder one each, named after the settings in which they differ.

    Args:
        plans: All different.
        overrides: Overrides of each; the same settings in the same order, with other values.
        inside: Put these folders inside the shared one, which the user named, rather than next to it.

    Raises:
        ValueError: If two would still write to the same folder.
    """
    result = list(plans)
    shared: dict[Path, list[int]] = {}
    for i, plan in enumerate(plans):
        shared.setdefault(plan.folder.resolve(), []).append(i)
    for group in shared.values():
        for i, suffix in zip(group, suffixes([overrides[i] for i in group]) if len(group) > 1 else (), strict=False):
            folder = plans[i].folder
            result[i] = replace(plans[i], folder=folder / suffix if inside else Path(f"{folder}-{suffix}"))
    for folder, count in Counter(plan.folder.resolve() for plan in result).items():
        if count > 1:
            raise UserError(f"{count} of the {len(plans)} runs would write to {folder}; give each its own out folder")
    return result


def suffixes(overrides: Sequence[Sequence[str]]) -> list[str]:
    """A name for each run, from the settings in which runs differ: ``query_keep-0.3``; a hash if not a valid name."""
    differing = [i for i, values in enumerate(zip(*overrides, strict=True)) if len(set(values)) > 1]
    runs = [dict(run[i].lstrip("+~").split("=", 1) for i in differing) for run in overrides]
    last = [key.rpartition(".")[2] for key in runs[0]]
    labels = last if len(set(last)) == len(last) else list(runs[0])
    names = ["-".join(map(_label, labels, run.values())) for run in runs]
    if len(set(names)) == len(names) and max(map(len, names)) <= MAX_NAME:
        return names
    return [of_json(run)[:8] for run in runs]


def _label(key: str, value: str) -> str:
    plain = re.sub(r"[^\w.+-]+", "_", value).strip("_")
    return f"{key}-{plain}"


def finish(folder: Path, report: Report) -> None:
    """Write a report, and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, report)
    print(terminal_table(report), file=sys.stderr)
    say(f"wrote {folder / 'report.html'}")


def sweep_folder(first: Path, name: str) -> Path:
    """The folder of the report on all runs of a sweep, next to theirs."""
    return first.parent / f"{name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"


def make_report(title: str, rows: Sequence[Row], protocol: str) -> Report:
    """Rows with today's date."""
    return Report(title=title, rows=tuple(rows), made=time.strftime("%Y-%m-%d"), protocol=protocol)
