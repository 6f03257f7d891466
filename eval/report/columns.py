"""Which columns a table has, and how a number is printed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from geoaccel.eval.report.naming import SETTINGS, differing, short_models
from geoaccel.eval.report.rows import Row

MAX_FIDELITY = 4


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: Of the score or measurement.
        header: Printed on top.
        about: What it means; empty where the header says it.
        spare: Where a table is too wide, columns with higher numbers go first; 0 stays.
        get: Value of a row.
    """

    name: str
    header: str
    about: str
    spare: int
    get: Callable[[Row], str | float | None]

    @property
    def is_number(self) -> bool:
        return self.name not in ("method", *SETTINGS)


POSE = "area under the recall curve of pose errors up to {} degrees, 1 is best"
NUMBER_COLUMNS = (
    ("ratio", "ratio", "share of tokens that was asked to be removed", 0),
    ("effective_ratio", "eff. ratio", "share of tokens that was removed, 1 - M / N", 1),
    ("auc_3", "AUC@3", POSE.format(3), 2),
    ("auc_5", "AUC@5", POSE.format(5), 4),
    ("auc_30", "AUC@30", POSE.format(30), 0),
    ("depth_abs_rel", "depth AbsRel", "mean absolute relative error of depth, 0 is best", 1),
    ("chamfer", "points chamfer", "mean of accuracy and completeness of points, 0 is best", 1),
    ("fidelity", "", "", 3),
    ("latency_ms", "ms", "median time of one forward with all heads", 0),
    ("dense_latency_ms", "dense ms", "the same of the dense model, in turns with the other in one process", 6),
    ("end_to_end_ms", "end to end ms", "with reading the images", 8),
    ("speedup", "speedup", "dense over accelerated time", 0),
    ("limit_share", "limit share", "share of the gain that free attention would give", 7),
    ("tokens", "tokens", "of one attention where tokens are merged, mean over these places", 7),
    ("query_tokens", "query tokens", "of them, what is left as queries", 6),
    ("key_tokens", "key tokens", "of them, what is left as keys and values", 6),
    ("peak_memory_gib", "peak GiB", "peak memory during one forward: allocated on a GPU, resident on a CPU", 0),
    ("dense_peak_memory_gib", "dense GiB", "the same of the dense model", 5),
)


def columns(rows: Sequence[Row]) -> list[Column]:
    """Columns of a table: the method, settings in which rows differ, and every number that some row has."""
    models = short_models(rows)
    found = [Column("method", "method", "", 0, lambda row: row.method)]
    for name in differing(rows):
        found.append(Column(name, name, "", 0, _setting(name, models)))
    for name in ("frames", "scenes"):
        if len({row.number(name) for row in rows}) > 1:
            found.append(Column(name, name, "", 0, _number(name)))
    for name, header, about, spare in NUMBER_COLUMNS:
        if name == "fidelity":
            found += fidelity_columns(rows, spare)
        elif any(row.number(name) is not None for row in rows):
            found.append(Column(name, header, about, spare, _number(name)))
    return found


def fidelity_columns(rows: Sequence[Row], spare: int) -> list[Column]:
    """The first scores against the dense model; those of single frames and layers stay in the CSV."""
    names = dict.fromkeys(name for row in rows for name in row.scores if name.startswith("fidelity_"))
    whole = [name for name in names if not re.search(r"(frame|layer|block)_?\d+$", name)]
    measured = [name for name in whole if any(row.number(name) is not None for row in rows)]
    about = "against the dense model on the same images"
    return [
        Column(name, name.replace("_", " "), about, spare + 3 * (i > 0), _number(name))
        for i, name in enumerate(measured[:MAX_FIDELITY])
    ]


def _number(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.number(name)


def _setting(name: str, models: dict[str, str]) -> Callable[[Row], str]:
    return lambda row: models[row.model] if name == "model" else str(getattr(row, name))


def higher_is_better(name: str) -> bool:
    """Whether a score grows with quality; errors and distances fall."""
    return any(part in name for part in ("auc", "delta", "rra", "rta", "spearman", "cosine", "consistency", "fscore"))


def cell(name: str, value: object, *, missing: str) -> str:
    """A value as a table shows it: three significant digits, whole numbers as they are."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    if name in ("frames", "scenes") and isinstance(value, int | float):
        return str(int(value))
    if name == "ratio" and isinstance(value, int | float):
        return f"{value:g}"
    if isinstance(value, int | float):
        return three_digits(value) + ("x" if name == "speedup" else "")
    return str(value)


def three_digits(value: float) -> str:
    """Three significant digits: ``0.0123``, ``0.800``, ``12.3``, ``45700``."""
    if value == 0:
        return "0"
    text = f"{value:#.3g}"
    if "e" in text and 1e-6 <= abs(value) < 1e7:
        rounded = float(text)
        return f"{rounded:.0f}" if abs(rounded) >= 1000 else f"{rounded:.{2 - math.floor(math.log10(abs(rounded)))}f}"
    return text.removesuffix(".")
