"""The rows of a report, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from geoaccel.errors import UserError

CONTRACT_SCORES = ("auc_3", "auc_5", "auc_15", "auc_30", "depth_abs_rel", "chamfer")
CONTRACT_FIELDS = (
    *("latency_ms", "dense_latency_ms", "speedup", "peak_memory_gib"),
    *("effective_ratio", "frames", "scenes", "model", "merging", "quantization"),
)
BUSY = 0.1
"""Spread of times over their median above which the machine counts as busy."""

ALSO_MEASURED = ("dense_peak_memory_gib", "limit_share")
NUMBERS = (*CONTRACT_FIELDS[:-3], *ALSO_MEASURED, "ratio")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated configuration.

    Attributes:
        model: Name, hub id or path.
        merging, quantization, attention: Names of the active methods; ``none`` if there is none.
        dtype, device: Dtype and device of the model.
        ratio: Requested ratio; None if the method has no such knob.
        knobs: ``method.knob`` to its JSON value.
        effective_ratio: 1 - M / N; None if nothing was merged.
        frames, scenes: Frames per scene, and number of scored scenes.
        scores: By name, the mean over scenes.
        latency_ms, dense_latency_ms, speedup: None if not measured.
        peak_memory_gib, dense_peak_memory_gib: None if not measured.
        limit_share: Fraction of the maximum gain from cheaper attention; None if not measured.
        sitting: Process in which times were measured, including those of the dense model; empty if unknown.
        hardware: Hardware, in words.
        versions: Package to version.
        command: The command that was run.
        per_scene: ``scene``, ``category``, ``frames`` and the scores of each scene; for one without, ``scene`` and the
            reason, ``failed``.
        skipped, failed: ``name: reason`` of scenes that were left out, or failed.
    """

    model: str
    merging: str
    quantization: str
    attention: str
    dtype: str
    device: str
    ratio: float | None = None
    knobs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    effective_ratio: float | None = None
    frames: int
    scenes: int
    scores: Mapping[str, float]
    latency_ms: float | None = None
    dense_latency_ms: float | None = None
    speedup: float | None = None
    peak_memory_gib: float | None = None
    dense_peak_memory_gib: float | None = None
    limit_share: float | None = None
    sitting: str = ""
    hardware: str
    versions: Mapping[str, str]
    command: str
    per_scene: tuple[Mapping[str, object], ...] = ()
    skipped: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether this is the unaccelerated model, the reference of the others."""
        return self.merging == "none" and self.quantization == "none"

    @property
    def method(self) -> str:
        """What was done to the model: ``dense``, ``httm``, ``httm+fp8``."""
        return "+".join(name for name in (self.merging, self.quantization) if name != "none") or "dense"

    @property
    def failures(self) -> tuple[str, ...]:
        """``name: reason`` of every failed scene, each once."""
        scenes = (f"{entry['scene']}: {entry['failed']}" for entry in self.per_scene if "failed" in entry)
        return tuple(dict.fromkeys((*self.failed, *scenes)))

    @property
    def is_timed(self) -> bool:
        """Whether times were measured."""
        return self.number("latency_ms") is not None

    @property
    def spread(self) -> float | None:
        """Variation of its times and the dense model's: the larger spread over the median."""
        pairs = [(self.number(f"{of}spread_ms"), self.number(f"{of}latency_ms")) for of in ("", "dense_")]
        shares = [spread / median for spread, median in pairs if spread is not None and median]
        return max(shares, default=None)

    def number(self, name: str) -> float | None:
        """A score or a measurement; None if there is none, or it is not finite."""
        value = getattr(self, name) if name in NUMBERS else self.scores.get(name)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Report:
    """Configurations scored by the same protocol.

    Attributes:
        title: Headline.
        rows: At least one.
        made: Date, as printed.
        protocol: What was scored, and how.
    """

    title: str
    rows: tuple[Row, ...]
    made: str
    protocol: str


def knobs_of(*methods: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Knobs of methods, as stored in a row; a ratio common to all is stored separately."""
    named = {f"{name}.{knob}": value for found in methods for name, of in found.items() for knob, value in of.items()}
    ratios = [name for name, value in named.items() if name.endswith(".ratio") and value is not None]
    told = ratios if len({named[name] for name in ratios}) == 1 else []
    return {name: json.dumps(value, default=str) for name, value in named.items() if name not in told}


def json_line(row: Row) -> str:
    """One line of JSON: the documented names, null if not measured, then all other measurements."""
    line: dict[str, object] = {name: row.scores.get(name) for name in CONTRACT_SCORES}
    line |= {name: getattr(row, name) for name in CONTRACT_FIELDS}
    line |= {name: getattr(row, name) for name in ALSO_MEASURED if row.number(name) is not None}
    return dump(line | {name: value for name, value in row.scores.items() if name not in line and math.isfinite(value)})


def to_json(report: Report) -> str:
    """A report as JSON, in full precision."""
    return dump(dataclasses.asdict(report), indent=1) + "\n"


def from_json(text: str) -> Report:
    """The inverse of `to_json`; scores that were not finite come back as NaN.

    Raises:
        ValueError: If the text is not a report.
    """
    try:
        document: dict[str, Any] = json.loads(text)
        return Report(**{**document, "rows": tuple(_row(entry) for entry in document["rows"])})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"not a report of this version ({type(error).__name__}: {error})") from None


def _row(entry: dict[str, Any]) -> Row:
    scores = {name: math.nan if value is None else value for name, value in entry["scores"].items()}
    tuples = {name: tuple(entry[name]) for name in ("per_scene", "skipped", "failed")}
    return Row(**{**entry, **tuples, "scores": scores})


def dump(value: object, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinity become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        return float(value) if math.isfinite(value) else None
    return value
