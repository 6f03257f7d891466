"""Small evaluations of rendered scenes."""

from __future__ import annotations

from pathlib import Path

from plans import evaluate

from geoaccel.eval.run.job import Job
from geoaccel.eval.run.runner import Evaluation
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.source import Source


def source(scenes: int = 3) -> Source:
    return Source("synthetic", frames=3, scenes=scenes, options={"size": [28, 28]})


def run(checkpoint: Path, folder: Path, scenes: Source | None = None, **options) -> Evaluation:
    chosen = scenes or source()
    job = Job(str(checkpoint), resize=False)
    protocol = options.pop("protocol", Protocol())
    return evaluate(job, options.pop("read", chosen), protocol, folder, data=chosen.describe(), **options)
