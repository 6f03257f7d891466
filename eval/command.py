"""``geoaccel eval`` and ``geoaccel bench``: overrides to measurements to a report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from geoaccel.eval.bench import Bench
from geoaccel.eval.evaluation import Plan
from geoaccel.eval.merge3d_bench import Merge3DBench
from geoaccel.eval.report import Report, Row, json_line, terminal_table, write_report
from geoaccel.eval.settings import combinations, compose_settings, sweep
from geoaccel.registry import Registry

SUITES: Registry[type[Bench] | type[Merge3DBench]] = Registry("benchmark", {"speed": Bench, "merge3d": Merge3DBench})


def run_command(
    name: str,
    overrides: Sequence[str],
    pick_device: Callable[[str], str],
    *,
    config: str | None = None,
    multirun: bool = False,
    show: bool = False,
) -> str:
    """Run ``eval`` or ``bench``.

    Args:
        name: Which of the two.
        overrides: ``key=value`` as given.
        config: File in ``configs`` in place of the one of that name; its ``sweep`` is run without being asked twice.
        pick_device: Resolves ``auto`` and refuses devices that are not there.
        multirun: Run every combination of overrides that list several values.
        show: Only say what the settings are.

    Returns:
        What belongs on stdout: one line of JSON for the last row, or the settings as YAML.

    Raises:
        ValueError: For anything that the user can put right.
    """
    config = config or name
    if show:
        return yaml.safe_dump(compose_settings(config, overrides), sort_keys=False).rstrip()
    given = len(list(sweep(overrides)))
    if given > 1 and not multirun:
        raise ValueError(f"{given} combinations of {' '.join(overrides)}: add --multirun to run all of them")
    # All plans are checked before the first runs: a typo in the last must not show after an hour.
    plans: list[Plan | Bench | Merge3DBench] = []
    for combination in combinations(config, overrides):
        plan = make_plan(name, compose_settings(config, combination), pick_device)
        if plan not in plans:  # a dense model has no ratio to sweep over
            plans.append(plan)
    if len({plan.scored for plan in plans}) > 1:
        raise ValueError(
            f"{' and '.join(sorted({plan.scored for plan in plans}))}: one table cannot hold both; give one protocol "
            "and one data set, and run the command once for each"
        )
    options = [*(["--config", config] if config != name else []), *(["--multirun"] if multirun else [])]
    command = shlex.join(["geoaccel", name, *options, *overrides])
    rows: list[Row] = []
    for plan in plans:
        found = plan.run(command)
        rows += found
        finish(plan.folder, make_report(plan.title, found, plan.scored))
    if len(plans) > 1:
        finish(sweep_folder(plans[0].folder, name), make_report(f"{name}: {len(plans)} runs", rows, plans[0].scored))
    return json_line(rows[-1])


def make_plan(name: str, settings: Mapping[str, Any], pick_device: Callable[[str], str]) -> Plan | Bench | Merge3DBench:
    """What a command runs, checked.

    Raises:
        ValueError: For a setting that is not allowed.
    """
    kind = Plan if name == "eval" else SUITES[settings["suite"]]
    return kind.from_settings(settings, pick_device)


def finish(folder: Path, report: Report) -> None:
    """Write a report, and show it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, report)
    print(terminal_table(report), file=sys.stderr)
    print(f"wrote {folder / 'report.html'}", file=sys.stderr)


def sweep_folder(first: Path, name: str) -> Path:
    """Where the report over all runs of a sweep goes: beside them."""
    return first.parent / f"{name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"


def make_report(title: str, rows: Sequence[Row], protocol: str) -> Report:
    """Rows with today's date."""
    return Report(title=title, rows=tuple(rows), made=time.strftime("%Y-%m-%d"), protocol=protocol)
