"""Reports on disk: report.md, report.csv, report.json, report.html, pareto.png, scaling.png, paths of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geoaccel.atomic import write_bytes
from geoaccel.errors import UserError
from geoaccel.eval.report.page import html_page
from geoaccel.eval.report.paths import path_pictures
from geoaccel.eval.report.plots import plot_pareto
from geoaccel.eval.report.rows import Report, Row, from_json, to_json
from geoaccel.eval.report.scaling import plot_scaling
from geoaccel.eval.report.style import png
from geoaccel.eval.report.tables import markdown, to_csv

REPORT = "report.json"
PLOTS = {"pareto.png": plot_pareto, "scaling.png": plot_scaling}


def write_report(folder: str | Path, report: Report) -> list[Path]:
    """Write the report in every format, each file atomically.

    Everything is made before the first file is written. A plot without data is not written, and an earlier one is
    removed.

    Args:
        folder: Created if missing. Figures of paths in it (:mod:`geoaccel.eval.report.paths`) are included.
        report: What to write.

    Returns:
        The files written.

    Raises:
        ValueError: If the report has no rows.
    """
    if not report.rows:
        raise ValueError(f"the report {report.title!r} has no rows; give at least one")
    folder = Path(folder)
    figures = {name: plot(report.rows) for name, plot in PLOTS.items()}
    plots = {name: png(figure) for name, figure in figures.items() if figure is not None} | path_pictures(folder)
    texts = {
        "report.md": markdown(report, list(plots)),
        "report.csv": to_csv(report),
        REPORT: to_json(report),
        "report.html": html_page(report, plots),
    }
    # File names that are not UTF-8 have lone surrogates, which cannot be written.
    files = plots | {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)
    for name in PLOTS.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def read_report(path: str | Path) -> Report:
    """Read a report back.

    Args:
        path: A report.json, or its folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = Path(path)
    path = path / REPORT if path.is_dir() else path
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a folder with a {REPORT}") from None
    except ValueError as error:
        raise UserError(f"{path} is {error}; run the evaluation again") from None


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """The rows of a report.json, or of its folder; see `read_report`."""
    return read_report(path).rows


def merge_reports(folders: Sequence[str | Path], *, title: str, made: str) -> Report:
    """Join the reports of several runs into one.

    Args:
        folders: Each with a report.json; a folder given twice counts once.
        title: Title of the new report.
        made: Its date.

    Raises:
        ValueError: If there is nothing to join, a report cannot be read, or they differ in protocol or were timed in
            different runs: their numbers must not be in one table.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise ValueError("there are no reports to join; give at least one folder")
    reports = [read_report(path) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        if report.protocol != reports[0].protocol:
            raise UserError(
                f"{paths[0]} was scored by {reports[0].protocol!r}, {path} by {report.protocol!r}; join only reports "
                "with the same protocol"
            )
    timed: dict[str, Path] = {}
    for path, report in zip(paths, reports, strict=True):
        for row in report.rows:
            if row.is_timed:
                timed.setdefault(row.sitting or str(path), path)
    if len(timed) > 1:
        one, other, *_ = timed.values()
        raise UserError(
            f"{one} and {other} were timed in different runs; time all rows of a table in one run, or evaluate with "
            "timing.repeats=0"
        )
    return Report(title, tuple(row for report in reports for row in report.rows), made, reports[0].protocol)
