"""Rows and reports that the tests of the report share, and a reader of its page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from geoaccel.eval.report import (
    Report,
    Row,
)

ATTACK = "<script>alert(1)</script>"
SETTINGS: dict[str, Any] = {
    "model": "vggt-mini",
    "merging": "none",
    "quantization": "none",
    "attention": "sdpa",
    "dtype": "float32",
    "device": "cpu",
    "frames": 8,
    "scenes": 2,
    "scores": {"auc_30": 0.9, "auc_5": 0.5},
    "hardware": "2 CPU threads",
    "versions": {"torch": "2.6"},
    "command": "geoaccel eval data=synthetic",
}


def row(**known: Any) -> Row:
    return Row(**{**SETTINGS, **known})


def merged(name: str, ratio: float | None, auc: float, speedup: float | None, **known: Any) -> Row:
    times = {} if speedup is None else {"latency_ms": 100 / speedup, "dense_latency_ms": 100.0}
    scores = {"auc_30": auc, "auc_5": auc / 2}
    return row(merging=name, ratio=ratio, scores=scores, speedup=speedup, **{**times, **known})


def report(*rows: Row, **known: str) -> Report:
    return Report(**{"title": "Some runs", "made": "2025-01-02", "protocol": "pose vggt-co3d", **known}, rows=rows)


SWEEP = (
    row(speedup=1.0, latency_ms=100.0, dense_latency_ms=100.0),
    merged("httm", 0.6, 0.8, 2.0),
    merged("httm", 0.3, 0.85, 1.5),
    merged("come", 0.6, 0.7, 3.0),
)


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style") and data.strip():
            self.text.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read_html(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page
