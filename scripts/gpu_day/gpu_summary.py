"""One JSON file and the plots of a journal."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_journal import Journal, Line
from gpu_schedule import DENSE

from geoaccel.atomic import write_bytes, write_text
from geoaccel.eval.report import Report, Row, write_report
from geoaccel.eval.report.style import INK, looks, new_figure, png, tidy
from geoaccel.runtime import hardware, versions

DOCUMENT, PEAKS = "on_gpu.json", "peaks.png"
OTHERS = ("kernel", "peer", "failed", "left_out")
KEY = ("group", "model", "frames", "candidate")


def forwards(journal: Journal) -> list[dict[str, Any]]:
    """One row per candidate and group: medians over its runs, against the dense model or bfloat16."""
    runs: dict[tuple[Any, ...], list[Line]] = {}
    for line in journal.of("run"):
        runs.setdefault(tuple(line[key] for key in KEY), []).append(line)
    medians = {key: statistics.median(line["ms"] for line in lines) for key, lines in runs.items()}
    rows = []
    for key, lines in runs.items():
        last, dense = lines[-1], medians.get((*key[:3], DENSE))
        times = [line["ms"] for line in lines]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0], 0, times[0])
        row: dict[str, Any] = {name: last[name] for name in KEY}
        row |= {
            "median_ms": medians[key],
            "spread_ms": round(high - low, 3),
            "runs": len(lines),
            "sittings": len({line["sitting"] for line in lines}),
            "speedup": None if dense is None else round(dense / medians[key], 4),
            "peak_gib": last["peak_gib"],
            "predicted_gib": last["predicted_gib"],
            "peak_over_predicted": round(last["peak_gib"] / last["predicted_gib"], 4),
        }
        rows.append(row | {name: last[name] for name in ("tokens", "effective_ratio") if name in last})
    return rows


def still_cut(journal: Journal) -> list[Line]:
    """Groups not run for lack of time; the last line of each."""
    found = {}
    for line in journal.of("cut"):
        group = {key: line[key] for key in KEY[:3]}
        run = group if line["candidate"] is None else {**group, "candidate": line["candidate"], "turn": line["turn"]}
        if not journal.of("run", **run):
            found[tuple(line[key] for key in (*KEY, "turn"))] = line
    return list(found.values())


def summarise(journal: Journal, folder: Path, settings: dict[str, Any], command: str) -> list[Path]:
    """Write the JSON, the reports of both comparisons and the plot of peaks; returns the paths."""
    rows = forwards(journal)
    folder.mkdir(parents=True, exist_ok=True)
    others = {kind: [_plain(line) for line in journal.of(kind)] for kind in OTHERS}
    others["cut"] = [_plain(line) for line in still_cut(journal)]
    found: dict[str, Any] = {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "hardware": hardware(settings["device"]),
        "versions": versions(),
        "settings": settings,
        "command": command,
        "forwards": rows,
        **others,
    }
    write_text(folder / DOCUMENT, json.dumps(found, indent=1) + "\n")
    written = [folder / DOCUMENT]
    for group in sorted({row["group"] for row in rows}):
        own = [row for row in rows if row["group"] == group]
        report = Report(
            f"{group}, time and memory",
            tuple(_row(row, own, settings, command) for row in own),
            found["made"],
            "median of the runs that there are, in turns, model only",
        )
        written += write_report(folder / group, report)
    if rows:
        write_bytes(folder / PEAKS, png(_peaks(rows)))
        written.append(folder / PEAKS)
    return written


def _plain(line: Line) -> Line:
    return {key: value for key, value in line.items() if key not in ("made", "kind")}


def _row(row: dict[str, Any], rows: Sequence[dict[str, Any]], settings: dict[str, Any], command: str) -> Row:
    """A row in the format of our reports."""
    key = [row[name] for name in KEY[:3]]
    dense = next((one for one in rows if [one[name] for name in KEY[:3]] == key and one["candidate"] == DENSE), None)
    merges = row["group"] == "merging"
    return Row(
        model=row["model"],
        merging=row["candidate"] if merges else "none",
        quantization="none" if merges else row["candidate"],
        attention="sdpa",
        dtype=settings["dtype"],
        device=settings["device"],
        effective_ratio=row.get("effective_ratio"),
        frames=row["frames"],
        scenes=0,
        scores={"spread_ms": row["spread_ms"], "runs": row["runs"], "predicted_gib": row["predicted_gib"]},
        latency_ms=row["median_ms"],
        dense_latency_ms=None if dense is None else dense["median_ms"],
        speedup=row["speedup"],
        peak_memory_gib=row["peak_gib"],
        dense_peak_memory_gib=None if dense is None else dense["peak_gib"],
        hardware=hardware(settings["device"]),
        versions=versions(),
        command=command,
    )


def _peaks(rows: Sequence[dict[str, Any]]) -> Any:
    """Measured over predicted peak, one line per candidate and model."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = f"{row['model']}, {'dense' if row['candidate'] == DENSE else row['candidate']}"
        name += "" if row["group"] == "merging" else " (formats)"
        lines.setdefault(name, []).append((row["frames"], row["peak_over_predicted"]))
    figure = new_figure(6.4, 3.6 + 0.16 * len(lines))
    axes = figure.subplots()
    for name, look in looks(lines).items():
        xs, ys = zip(*sorted(lines[name]), strict=True)
        axes.plot(xs, ys, color=look.color, marker=look.marker, linewidth=1.4, markersize=5, label=name)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    counts = sorted({row["frames"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("frames", color=INK, fontsize=9.5)
    axes.set_ylabel("peak memory, measured / predicted", color=INK, fontsize=9.5)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    tidy(axes)
    return figure


def tell(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as text."""
    for row in rows:
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x, "
        print(
            f"{row['model']} {row['frames']} frames {row['candidate']}: {row['median_ms']:.1f} ms (of {row['runs']}), "
            f"{speedup}peak {row['peak_gib']:.2f} GiB of {row['predicted_gib']:.2f} predicted",
            file=sys.stderr,
        )
