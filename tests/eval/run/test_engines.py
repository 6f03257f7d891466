"""Who predicts: runs that are killed, and the order of scenes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from evaluations import run, source
from tiny_checkpoint import write_checkpoint

from geoaccel.eval.run.engines import local
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.source import Source
from geoaccel.eval.run.store import Store

SCRIPT = """
import sys
from geoaccel.eval.run.job import Job
from pathlib import Path
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.runner import predict, score
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.source import Source
source = Source("synthetic", frames=4, scenes=6, options={"size": [42, 42]})
plan = Plan(Job(sys.argv[1], resize=False), source, Protocol(), Path(sys.argv[2]))
score(plan, predict(plan))
"""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, this_processor: None) -> None:
    checkpoint = write_checkpoint("vggt", tmp_path)
    scenes = Source("synthetic", frames=4, scenes=6, options={"size": [42, 42]})
    run(checkpoint, tmp_path / "whole", scenes)
    killed = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(checkpoint), str(killed)], env=environment)
    while len(list(killed.glob("predictions/*.safetensors"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "scores.json").exists()
    made = {path.name: path.stat().st_mtime_ns for path in killed.glob("predictions/*.safetensors")}
    run(checkpoint, killed, scenes)
    assert all((killed / "predictions" / name).stat().st_mtime_ns == stamp for name, stamp in made.items())
    assert (killed / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()


def test_engines_give_scenes_in_order_with_the_reason_of_each(checkpoint: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {})
    outcomes = list(local(Job(str(checkpoint), resize=False), source()(), store))
    assert [(scene.name[-1], reason) for scene, reason in outcomes] == [("0", None), ("1", None), ("2", None)]
