"""Order and names of rows, from the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from geoaccel.eval.report.rows import Row

LONGEST_KNOBS = 40
"""Maximum letters of knobs in a table or a plot; the CSV has all."""

SETTINGS = ("model", "attention", "dtype", "device", "hardware")


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows sorted for the reader.

    By model, frames, method (the dense model first) and ratio; models and methods in order of first appearance, equal
    rows in the given order.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))

    def key(row: Row) -> tuple[float, ...]:
        removed = row.number("ratio") or row.number("effective_ratio") or 0
        return (models.index(row.model), row.frames, not row.is_dense, methods.index(row.method), removed)

    return sorted(rows, key=key)


def differing(rows: Sequence[Row]) -> list[str]:
    """The `SETTINGS` that differ between rows."""
    return [name for name in SETTINGS if len({getattr(row, name) for row in rows}) > 1]


def short_models(rows: Sequence[Row]) -> dict[str, str]:
    """Model names without folders or owner, if still unique."""
    models = list(dict.fromkeys(row.model for row in rows))
    short = [Path(model).name or model for model in models]
    return dict(zip(models, short if len(set(short)) == len(models) else models, strict=True))


def settings(rows: Sequence[Row]) -> list[str]:
    """For each row, in words, the `SETTINGS` in which the rows differ; empty if they do not."""
    models, names = short_models(rows), differing(rows)
    return [", ".join(models[row.model] if name == "model" else getattr(row, name) for name in names) for row in rows]


def differing_knobs(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By method, the knobs that differ between its rows."""
    found: dict[str, list[str]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        own = [row.knobs for row in rows if row.method == method and row.knobs]  # older reports have none
        names = dict.fromkeys(name for knobs in own for name in knobs)
        found[method] = [name for name in names if len({knobs.get(name) for knobs in own}) > 1]
    return found


def knobs_in_words(row: Row, differing: Mapping[str, Sequence[str]]) -> str:
    """The `differing_knobs` of a row, roughly as typed; without the method's name if there is only one method."""
    known = {name: row.knobs[name] for name in differing[row.method] if name in row.knobs}
    text = ", ".join(f"{name if '+' in row.method else name.partition('.')[2]}={_short(known[name])}" for name in known)
    return text if len(text) <= LONGEST_KNOBS else text[: LONGEST_KNOBS - 3].rstrip() + "..."


def _short(value: str) -> str:
    """A knob's value without quotes; of a path, the last part."""
    return PurePath(value[1:-1]).name or value if value.startswith('"') else value


def labels(rows: Sequence[Row]) -> list[str]:
    """A unique name for each row."""
    many_frames, differ = len({row.frames for row in rows}) > 1, differing_knobs(rows)
    names = []
    for row, where in zip(rows, settings(rows), strict=True):
        ratio = "" if row.ratio is None else f"ratio {row.ratio:g}"
        parts = (row.method, where, ratio, knobs_in_words(row, differ), f"{row.frames} frames" if many_frames else "")
        names.append(", ".join(part for part in parts if part))
    alike = Counter(names)
    for i, row in enumerate(rows):
        if alike[names[i]] > 1 and row.effective_ratio is not None:
            names[i] += f", effective ratio {row.effective_ratio:.3g}"
    alike = Counter(names)
    count: Counter[str] = Counter()
    for i, name in enumerate(names):
        count[name] += 1
        if alike[name] > 1:
            names[i] = f"{name} ({count[name]})"
    return names
