"""``geoaccel reconstruct --engine ray``: windows or scenes on the machines of a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from geoaccel import Reconstruction, export
from geoaccel.checks import Job, check_jobs
from geoaccel.console import collected, counted, expand, repeat, say, shows_progress, warn
from geoaccel.errors import UserError
from geoaccel.finished_scenes import FILES, of_model, say_kept
from geoaccel.images.elsewhere import absolute
from geoaccel.runtime import pick_dtype
from geoaccel.scene_command import do_all, for_photographs, load, predict_scene, silent, write_scene
from geoaccel.sharding.launch import Session
from geoaccel.tracks import measure_tracks
from geoaccel.tracks.features import pycolmap_here
from geoaccel.windows.identity import same
from geoaccel.windows_command import make_windows
from geoaccel.workers import Done, Task, Team, Workers, check_engine, connect, device_for, machines

NAMED = ("model", *FILES)
"""Options that may name a file or a folder."""


def check_ray(args: argparse.Namespace) -> None:
    """Refuse options that cannot be combined with workers, or that need them.

    Raises:
        UserError: Naming the option.
        MissingPackage: Ray is not installed.
    """
    check_engine(args.engine, args.ray_address)
    if args.engine != "ray":
        return
    if args.window is None and not args.scenes:
        raise UserError(
            "--engine ray distributes windows or scenes; add --window auto for one long sequence or --scenes for "
            "several inputs, or leave it out (torchrun distributes the frames of one scene)"
        )
    if dist.is_available() and dist.is_torchelastic_launched():
        raise UserError("--engine ray starts its own processes; leave out torchrun, or --engine ray")
    if args.dry_run:
        raise UserError("--dry-run looks at this machine only; leave out --engine ray, or --dry-run")
    if args.device.startswith("cuda:"):
        device_for(args.device, ())


def run_on_workers(args: argparse.Namespace, formats: list[str]) -> None:
    """Check all inputs, load the model on every worker, and reconstruct each scene; a line of JSON on stdout for each.

    With windows, all workers predict the windows of one scene after another; without, each scene goes to one worker.
    """
    jobs = [replace(job, pictures=absolute(job.pictures)) for job in check_jobs(args, formats)]
    with ExitStack() as stack:
        for job in jobs:
            if job.before is None:
                stack.enter_context(export.claimed(job.out))
        device = device_for(args.device, machines(connect(args.ray_address)))
        team = Team(args.ray_address, gpus=float(device == "cuda"))
        workers = stack.enter_context(Workers(team, load_there, _absolute(args), device))
        dtype = _one(workers.ask(pick_dtype, args.dtype, device, beside=True))
        known = workers.ask(of_model)
        same(known)
        jobs = [job.with_model(known[0]) for job in jobs]
        if (better := workers.ask(partial(_for_photographs, args.model))[0]) is not None:
            warn(f"warning: {args.model} is a test model; for photographs use --model {better}")
        where = f"in {dtype} on {len(workers)} worker{'s' * (len(workers) > 1)} ({device})"
        if args.window is not None:

            def make(job: Job) -> None:
                if job.before is None:
                    make_windows(args, job, formats, workers, dtype, device, where)
                else:
                    say_kept(job.out)

            do_all((job, partial(make, job)) for job in jobs) if args.scenes else make(jobs[0])
            return
        say(f"{len(jobs)} scenes; running {args.model} {where}")
        with counted(len(jobs), "scene", shown=shows_progress(), desc="scenes") as bar:

            def finished() -> Iterator[tuple[Job, Any]]:
                for done in workers.in_order(_tasks(_absolute(args), jobs, formats, dtype, device)):
                    yield done.name, partial(_finish, done, args, formats, dtype, device)
                    bar.update()

            do_all(finished())


def load_there(args: argparse.Namespace, device: str) -> Any:
    """The model of a command, on a worker."""
    return load(args, device, pick_dtype(args.dtype, device), silent)


def _tasks(
    args: argparse.Namespace, jobs: Sequence[Job], formats: Sequence[str], dtype: str, device: str
) -> Iterator[Task]:
    measure = export.holds_tracks(formats) and args.tracks in ("auto", "measure") and pycolmap_here()
    for job in jobs:
        yield job, None if job.before is not None else (_predict_there, args, job, dtype, device, measure)


def _predict_there(
    model: Any, args: argparse.Namespace, job: Job, dtype: str, device: str, measure: bool
) -> tuple[Reconstruction, list[tuple[bool, str]]]:
    """One scene and its messages; with tracks, as measuring them takes longer than the network."""
    with collected() as lines:
        result = predict_scene(args, job, model, dtype, device, Session())
    assert result is not None
    if measure and result.tracks is None and pycolmap_here():
        result = replace(result, tracks=measure_tracks(result))
    return result, lines


def _finish(done: Done, args: argparse.Namespace, formats: Sequence[str], dtype: str, device: str) -> None:
    if done.name.before is not None:
        say_kept(done.name.out)
        return
    if done.error is None:
        say(f"{done.name.out.name}:")
    result, lines = done.get()
    repeat(lines)
    write_scene(args, done.name, formats, result, dtype, device)


def _for_photographs(name: str, model: Any) -> str | None:
    return for_photographs(name, model)


def _one(found: Sequence[str]) -> str:
    """The precision, if all workers have the same."""
    if len(set(found)) > 1:
        raise UserError(f"--dtype auto is {' on some workers and '.join(sorted(set(found)))} on others; give --dtype")
    return found[0]


def _absolute(args: argparse.Namespace) -> argparse.Namespace:
    """The same options for a process in another working directory."""
    values = {name: value for name, value in vars(args).items() if name != "run"}
    for name in NAMED:
        if values[name] is not None and expand(values[name]).exists():
            values[name] = str(expand(values[name]).absolute())
    return argparse.Namespace(**values)
