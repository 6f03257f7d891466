"""Columns of a table, and number formatting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from geoaccel.eval.report.naming import SETTINGS, differing, differing_knobs, knobs_in_words, short_models
from geoaccel.eval.report.rows import Row


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: Name of the score or measurement.
        header: Column header.
        about: Explanation; empty if the header is enough.
        spare: If a table is too wide, columns with higher numbers are dropped first; 0 is kept.
        get: Value of a row.
    """

    name: str
    header: str
    about: str
    spare: int
    get: Callable[[Row], str | float | None]

    @property
    def is_number(self) -> bool:
        return self.name not in ("method", KNOBS, *SETTINGS)


KNOBS = "knobs"
POSE = "area under the recall curve of pose errors up to {} degrees, 1 is best"
NUMBER_COLUMNS = (
    ("ratio", "ratio", "requested fraction of tokens to remove", 0),
    ("effective_ratio", "eff. ratio", "fraction of tokens removed, 1 - M / N", 1),
    ("effective_key_ratio", "eff. keys", "the same for the keys that queries attend to", 1),
    ("auc_3", "AUC@3", POSE.format(3), 2),
    ("auc_5", "AUC@5", POSE.format(5), 4),
    ("auc_30", "AUC@30", POSE.format(30), 0),
    ("depth_abs_rel", "depth AbsRel", "mean absolute relative error of depth, 0 is best", 1),
    ("chamfer", "points chamfer", "mean of accuracy and completeness of points, 0 is best", 1),
    (
        "fidelity_auc_30",
        "fidelity AUC@30",
        "AUC@30 with the dense model as ground truth, opposite directions not folded",
        3,
    ),
    ("fidelity_rotation_deg", "fidelity rotation", "median angle to the dense model over pairs, in degrees", 6),
    ("fidelity_depth_abs_rel", "fidelity AbsRel", "mean relative difference of depth to the dense model's", 5),
    ("fidelity_point_distance", "fidelity points", "mean distance to the dense model's points over their size", 6),
    ("latency_ms", "ms", "median time of one forward", 0),
    (
        "dense_latency_ms",
        "dense ms",
        "the same for the dense model, timed alternately in one process",
        6,
    ),
    ("spread_ms", "spread ms", "interquartile range of these times", 5),
    ("dense_spread_ms", "dense spread ms", "the same for the dense model", 8),
    ("end_to_end_ms", "end to end ms", "including reading the images", 8),
    ("speedup", "speedup", "dense over accelerated time", 0),
    ("predicted_speedup", "predicted", "speedup by which the method decides whether it acts", 6),
    ("visual_tokens", "visual tokens", "visual tokens that the language model reads", 1),
    ("prompt_tokens", "prompt", "tokens of the prompt, including text", 6),
    ("geometry_ms", "geometry ms", "geometry encoder", 4),
    ("encoder_ms", "2D ms", "2D encoder", 4),
    ("reduction_ms", "reduction ms", "saliency, plan and rewritten prompt", 5),
    ("prefill_ms", "prefill ms", "language model on the prompt", 2),
    ("first_token_ms", "first token ms", "encoders, reduction and prefill", 1),
    ("decode_ms_per_token", "ms/token", "time per token of the answer after the first", 2),
    ("kv_cache_mib", "KV MiB", "keys and values after the prefill", 3),
    ("encoder_share", "encoder share", "fraction of the total answer time spent in the encoders", 3),
    ("first_token_limit", "limit", "speedup of the first token if the prefill were free", 5),
    ("limit_share", "limit share", "fraction of the gain that free attention would give", 7),
    ("tokens", "tokens", "tokens of an attention with merging, mean over these attentions", 7),
    ("query_tokens", "query tokens", "of these, the remaining queries", 6),
    ("key_tokens", "key tokens", "of these, the remaining keys and values", 6),
    ("peak_memory_gib", "peak GiB", "peak memory during one forward: allocated on a GPU, resident on a CPU", 0),
    ("dense_peak_memory_gib", "dense GiB", "the same for the dense model", 5),
)

TRAJECTORY_COLUMNS = (
    ("ate_percent", "ATE %", "distance of cameras after a similarity, in percent of the true path, 0 is best", 0),
    ("open_ate_percent", "no loops", "the same without loop closure", 2),
    ("are_rmse_deg", "ARE", "rotation error of cameras after it, in degrees", 3),
    ("rpe_translation", "RPE", "error of the motion between frames, in the unit of the ground truth", 5),
    ("rpe_rotation_deg", "RPE deg", "the same for its rotation, in degrees", 5),
    ("kitti_translation_percent", "KITTI %", "drift over sub-sequences of 100 to 800 m, in percent", 1),
    ("kitti_rotation_deg_per_m", "KITTI deg/m", "the same for rotation, in degrees per metre", 2),
    ("window_ate_percent", "window ATE %", "ATE of single windows, in percent of their own paths, median", 3),
    ("scale_step_percent", "scale step %", "change of scale from window to window, median", 4),
    ("rotation_step_deg", "rotation step", "the same for rotation, in degrees", 4),
    ("fidelity_ate_percent", "fidelity ATE %", "distance to the dense model's path, in percent of it", 4),
    ("windows", "windows", "windows per sequence, mean", 6),
    ("pieces", "pieces", "disconnected pieces, each with its own world frame, mean", 1),
    ("loops_closed", "loops", "closed loops, mean", 6),
)
"""Additional columns for whole sequences in windows."""


def columns(rows: Sequence[Row]) -> list[Column]:
    """Columns of a table: the method, settings and knobs in which rows differ, and every number that some row has."""
    models = short_models(rows)
    found = [Column("method", "method", "", 0, lambda row: row.method)]
    for name in differing(rows):
        found.append(Column(name, name, "", 0, _setting(name, models)))
    if any((own := differing_knobs(rows)).values()):
        about = "knobs in which rows of one method differ"
        found.append(Column(KNOBS, KNOBS, about, 0, lambda row: knobs_in_words(row, own) or None))
    for name in ("frames", "scenes"):
        if len({row.number(name) for row in rows} - {0}) > 1:
            found.append(Column(name, name, "", 0, _number(name)))
    in_windows = any("windows" in row.scores for row in rows)
    for name, header, about, spare in (*(TRAJECTORY_COLUMNS if in_windows else ()), *NUMBER_COLUMNS):
        if any(row.number(name) is not None for row in rows):
            found.append(Column(name, header, about, spare, _number(name)))
    return found


def _number(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.number(name)


def _setting(name: str, models: dict[str, str]) -> Callable[[Row], str]:
    return lambda row: models[row.model] if name == "model" else str(getattr(row, name))


def cell(name: str, value: object, *, missing: str) -> str:
    """A value as shown in a table: three significant digits, whole numbers unchanged."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    if name in ("frames", "scenes") and isinstance(value, int | float):
        return str(int(value))
    if name == "ratio" and isinstance(value, int | float):
        return f"{value:g}"
    if isinstance(value, int | float):
        return three_digits(value) + ("x" if name in ("speedup", "predicted_speedup") else "")
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
