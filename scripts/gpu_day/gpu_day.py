"""All GPU measurements in one process: kernels, groups of forwards from the cheapest up, then peers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_forwards import Settings, candidates, measure
from gpu_journal import Journal, read_line
from gpu_schedule import AROUND, LONG, Clock, Cost, Group, allot, seconds_of

PEER_FRAMES, PEER_SIZE = ("8", "32", "100"), ("252", "336")
PEER_SECONDS = 300.0
MANY = 100
"""Peers come before groups of more frames, which may use up all the time."""

COMPARE_PEERS = Path(__file__).resolve().parents[1] / "figures" / "compare_peers.py"


def groups(models: Sequence[str], frames: Sequence[int], quantized: Sequence[int]) -> list[Group]:
    """All groups, the cheapest first."""
    found = [Group("merging", model, count, candidates("merging")) for model in models for count in frames]
    found += [
        Group("quantization", model, count, candidates("quantization")) for model in models for count in quantized
    ]
    return sorted(found, key=lambda group: (group.frames, group.kind))


def spend(
    wanted: Sequence[Group], turns: int, settings: Settings, journal: Journal, clock: Clock, peers: Mapping[str, Path]
) -> None:
    """Run everything that fits in the time; before each group, its time is predicted again from the measurements."""
    rest, beside = [group for group in wanted if done(group, journal) < turns], dict(peers)
    while rest:
        if rest[0].frames > MANY:
            while beside:
                compare_peer(*beside.popitem(), settings.device, journal, clock)
        costs = [_cost(group, turns, settings, journal) for group in rest]
        counts = allot(costs, clock.left() - PEER_SECONDS * len(beside))
        _say_plan(rest, costs, counts, clock)
        group, count = rest.pop(0), counts[0]
        if count:
            measure(group, int(done(group, journal)) + count, settings, journal, clock)
        else:
            told = round(costs[0].seconds(1))
            journal.write("cut", **group.key, candidate=None, turn=0, expected_s=told)
    while beside:
        compare_peer(*beside.popitem(), settings.device, journal, clock)


def done(group: Group, journal: Journal) -> float:
    """Rounds completed by all its candidates, except those that failed or cannot act."""
    counts = [
        len(journal.of("run", **group.key, candidate=name))
        for name in group.candidates
        if not any(journal.of(kind, **group.key, candidate=name) for kind in ("failed", "left_out"))
    ]
    return min(counts, default=float("inf"))


def _cost(group: Group, turns: int, settings: Settings, journal: Journal) -> Cost:
    seconds = [seconds_of(journal, group, name, settings.size, settings.device) for name in group.candidates]
    warm = sum(each for each in seconds if each < LONG)
    around = AROUND if settings.device != "cpu" else 0.0
    return Cost(sum(seconds), around + warm, turns - int(done(group, journal)))


def _say_plan(rest: Sequence[Group], costs: Sequence[Cost], counts: Sequence[int], clock: Clock) -> None:
    """Print the remaining groups, and in how many minutes each starts."""
    begins = 0.0
    print(f"plan, {clock.left() / 60:.1f} minutes left:", file=sys.stderr)
    for group, cost, count in zip(rest, costs, counts, strict=True):
        what = f"{count} turns" if count else f"left out, a turn takes {cost.seconds(1) / 60:.1f} minutes"
        print(f"  minute {begins / 60:5.1f}: {group}: {what}", file=sys.stderr)
        begins += cost.seconds(count)


def compare_peer(name: str, folder: Path, device: str, journal: Journal, clock: Clock) -> None:
    """A published implementation against ours, in a separate process; its rows are written as they come."""
    done = {line["frames"] for line in journal.of("peer", peer=name)}
    frames = [count for count in PEER_FRAMES if int(count) not in done]
    if not frames or clock.left() < LONG:
        return
    options = ["--device", device, "--size", *PEER_SIZE, "--frames", *frames]
    command = [sys.executable, str(COMPARE_PEERS), f"--{name}", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            _keep_rows(process, journal, clock)
        finally:
            process.kill()


def _keep_rows(process: subprocess.Popen[str], journal: Journal, clock: Clock) -> None:
    timer = threading.Timer(min(PEER_SECONDS, max(0.0, clock.left())), process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if row := read_line(line):  # the peer's code may print, too
            journal.write("peer", **row)
    timer.cancel()
