"""Benchmarks to run once a GPU is available: everything never measured on one, within a time limit.

    python scripts/on_gpu.py --minutes 60 --out runs/on_gpu
    python scripts/on_gpu.py --minutes 90 --out runs/on_gpu --fastvggt ../FastVGGT --litevggt ../LiteVGGT-repo
    python scripts/on_gpu.py --out runs/on_gpu --summary           # the JSON and the plots of existing measurements

In this order, as far as time permits: every kernel against its torch reference; the dense model and every merging
method at each frame count, and fp8 and w4a16 against bfloat16 with the same blocks compiled, from few frames to many;
published implementations if their clones are given. Full-size networks with random weights alternate in one process;
every forward is written to ``OUT/journal.jsonl`` at once, as a line with its time, its peak memory and the predicted
peak. If killed at any time, the same command resumes; measurements from other code, another machine or other settings
are repeated.

Before each group of forwards the rest is planned again from the measurements so far: if not everything fits, the most
expensive groups get fewer rounds, and finally none. A separate process measures, so that it can be ended if it hangs
and restarted if it dies. ``OUT/on_gpu.json`` has everything; ``OUT/merging``, ``OUT/quantization`` and
``OUT/peaks.png`` are tables and plots.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu_day"))

from gpu_forwards import Settings
from gpu_journal import Journal
from gpu_kernels import probe_kernels
from gpu_schedule import Clock, check_minutes
from gpu_summary import forwards, summarise, tell

from geoaccel.errors import UserError, run_program
from geoaccel.eval.run.made_by import TIMING, made_by
from geoaccel.runtime import DTYPES, pick_device, pick_dtype
from gpu_day import groups, spend

PEERS = ("fastvggt", "litevggt", "come")
JOURNAL = "journal.jsonl"


def main() -> None:
    args = arguments().parse_args()
    sys.exit(run_program("on_gpu", lambda: work(args)))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["vggt", "pi3"], help="backbones at full size, or checkpoints")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 100, 300, 1000], help="(default: %(default)s)")
    parser.add_argument("--quantized-frames", type=int, nargs="*", default=[10, 100], help="(default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[392, 518], metavar=("H", "W"))
    parser.add_argument("--turns", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--kernel-tokens", type=int, default=4096, help="tokens when timing single kernels")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--no-compile", action="store_true", help="do not compile blocks when comparing formats")
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"a clone of {name}'s repository")
    parser.add_argument("--summary", action="store_true", help="measure nothing, write the JSON and the plots")
    parser.add_argument("--in-process", action="store_true", help="measure in this process, without a hard limit")
    return parser


def work(args: argparse.Namespace) -> None:
    """Measure, and write the results."""
    if min(*args.frames, *args.quantized_frames, args.turns) < 1:
        raise UserError("--frames, --quantized-frames and --turns: give numbers of at least 1")
    clock = Clock(check_minutes(args.minutes))
    device = pick_device(args.device)
    settings = Settings((args.size[0], args.size[1]), device, pick_dtype(args.dtype, device), not args.no_compile)
    if args.in_process:
        peers = {name: folder for name in PEERS if (folder := getattr(args, name)) is not None}
        wanted = groups(args.models, args.frames, args.quantized_frames)
        journal = journal_of(args.out, settings)
        probe_kernels(journal, device, settings.dtype, args.kernel_tokens)
        spend(wanted, args.turns, settings, journal, clock, peers)
    elif not args.summary:
        supervise(args.out / JOURNAL, clock)
    journal = journal_of(args.out, settings)
    command = " ".join(["python", "scripts/on_gpu.py", *sys.argv[1:]])
    for path in summarise(journal, args.out, told(settings), command):
        print(path)
    tell(forwards(journal))


def told(settings: Settings) -> dict[str, Any]:
    """Settings as plain data."""
    return {**vars(settings), "size": list(settings.size)}


def journal_of(folder: Path, settings: Settings) -> Journal:
    """The valid lines for this code, this machine and these settings."""
    return Journal(folder / JOURNAL, {**made_by(settings.device, TIMING), **told(settings)})


def supervise(journal: Path, clock: Clock) -> None:
    """Measure in a process that is ended at the time limit, and restarted if it dies after some progress.

    Raises:
        UserError: If it rejects the arguments.
    """
    signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))  # also ends the measuring process
    before = -1
    while clock.left() > 0 and (size := journal.stat().st_size if journal.exists() else 0) > before:
        before = size
        minutes = f"{1 + clock.left() / 60:.3f}"
        command = [sys.executable, __file__, *sys.argv[1:], "--minutes", minutes, "--in-process"]  # the last counts
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            try:
                code = child.wait(clock.left())
            except subprocess.TimeoutExpired:
                print("on_gpu: the time is over", file=sys.stderr)
                return
            finally:
                child.kill()
        if code == 0:
            return
        if code == 2:
            sys.exit(2)  # it has said why
        print(f"on_gpu: the process ended with {code} at {time.strftime('%H:%M:%S')}, going on", file=sys.stderr)


if __name__ == "__main__":
    main()
