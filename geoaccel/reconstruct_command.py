"""``geoaccel reconstruct``: one scene or several, in this process or on workers."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from geoaccel import export
from geoaccel.checks import Job, check_jobs, check_kernel, check_options
from geoaccel.console import split_names, warn
from geoaccel.fingerprint import of_json
from geoaccel.finished_scenes import of_model, say_kept
from geoaccel.ray_command import check_ray, run_on_workers
from geoaccel.runtime import pick_dtype
from geoaccel.scene_command import do_all, load, make_scene, silent
from geoaccel.windows_command import check_windows, make_windows
from geoaccel.workers import Here

if TYPE_CHECKING:
    from geoaccel.sharding.launch import Session


def run(args: argparse.Namespace) -> None:
    """Check everything, load the model once, and reconstruct each scene; a line of JSON on stdout for each."""
    from geoaccel.sharding.launch import session

    check_ray(args)
    check_windows(args)
    formats = check_options(args, split_names(args.merging))
    if args.engine == "ray":
        run_on_workers(args, formats)
        return
    with session() as processes:
        run_in(args, formats, processes)


def run_in(args: argparse.Namespace, formats: list[str], processes: Session) -> None:
    """The work of one process, possibly one of several."""
    processes.check(args)
    device = processes.device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check_kernel(args.attention, device, dtype)
    jobs = check_jobs(args, formats, writes=processes.speaks)
    processes.agree("number of images", sum(len(job.pictures) for job in jobs))
    processes.agree("list of images", of_json([[picture.name for picture in job.pictures] for job in jobs]))
    if args.dry_run:
        from geoaccel.dry_run import dry_run

        for job in jobs:
            dry_run(args, job, formats, device, dtype) if job.before is None else say_kept(job.out, dry_run=True)
        return
    with ExitStack() as claims:
        for job in jobs if processes.speaks else ():
            if job.before is None:
                claims.enter_context(export.claimed(job.out))
        model = processes.shared(load(args, device, dtype, warn if processes.speaks else silent))
        known = of_model(model) if args.scenes else {}
        jobs = [job.with_model(known) for job in jobs]

        def make(job: Job) -> None:
            if job.before is not None:
                say_kept(job.out)
            elif args.window is not None:
                make_windows(args, job, formats, Here(model), dtype, device, f"in {dtype} on {device}")
            else:
                make_scene(args, job, formats, model, dtype, device, processes)

        do_all((job, partial(make, job)) for job in jobs) if args.scenes else make(jobs[0])
