"""The demo: a scene not used in training, reconstructed dense and accelerated, scored and timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from geoaccel import accelerate, export
from geoaccel.api import check_methods
from geoaccel.backbone import Geometry
from geoaccel.console import counted
from geoaccel.errors import UserError
from geoaccel.eval.bench.speed import compare, peak_memory
from geoaccel.eval.data.synthetic import TEST_SEEDS, SceneBatch, sequence
from geoaccel.eval.run.prepare import Truth
from geoaccel.eval.run.scoring import score_scene
from geoaccel.eval.run.token_effects import effective_key_ratio, effective_ratio
from geoaccel.export.comparison_sheet import write_comparison
from geoaccel.export.contact_sheet import write_contact_sheet
from geoaccel.export.view import DENSE_FILE, least_sure, view_of
from geoaccel.memory import GIB
from geoaccel.models.files import list_models
from geoaccel.models.weights import load_model
from geoaccel.outliers import warned
from geoaccel.reconstruction import Reconstruction, reconstruct
from geoaccel.runtime import MIN_REPEATS
from geoaccel.slots import fill_slots, filled_slots

PATIENCE = 55.0
"""Seconds of timing after which three runs of each are enough."""


@dataclass(frozen=True)
class Trial:
    """One way of running the model.

    Attributes:
        name: ``dense``, or the merging methods.
        scores: Output of :func:`geoaccel.eval.run.scoring.score_scene`.
        latency_s: Median time of three to five reconstructions, alternating with the others, after a warm-up with two
            frames.
        spread_s: Interquartile range of those.
        runs: Number of those.
        peak_memory_gib: Peak resident memory (CPU) or allocated memory (CUDA) during one.
        effective_ratio: Fraction of the queries removed; None for the dense model.
        effective_key_ratio: The same for keys.
    """

    name: str
    scores: dict[str, float]
    latency_s: float
    spread_s: float
    runs: int
    peak_memory_gib: float
    effective_ratio: float | None
    effective_key_ratio: float | None


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        trials: The dense model first.
        points: Points written.
        kept_share: Fraction of the pixels that the confidence filter kept.
        files: Files written, from the last trial.
    """

    trials: tuple[Trial, ...]
    points: int
    kept_share: float
    files: tuple[Path, ...]


def run_demo(
    out: str | Path,
    *,
    model: str = "vggt-mini",
    merging: Sequence[str] = (),
    scene: int = TEST_SEEDS[0],
    frames: int = 8,
    device: str = "cpu",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Render a scene, reconstruct it dense and accelerated, score both, and write PLY, GLB and figures.

    Args:
        out: Output folder; created only when everything is complete.
        model: Name or path of a checkpoint.
        merging: Methods of the accelerated model; none runs only the dense model.
        scene: Seed of the scene.
        frames: Images to render.
        device: Where to run.
        overwrite: Replace an earlier result.
        report: Called with a line of text at each step.
    """
    out = Path(out).expanduser()
    check_methods(merging=list(merging))
    if frames < 2:
        raise UserError(f"frames={frames}; a reconstruction needs at least 2 (--frames 2)")
    if not 0 <= scene < 2**63:
        raise UserError(f"scene={scene}; scenes have numbers from 0 to 2**63 - 1 (--scene 0)")
    export.check_output_folder(out, overwrite=overwrite, needed=[] if model in list_models() else [Path(model)])
    with export.claimed(out):
        return _run_demo(out, model, merging, scene, frames, device, overwrite, report)


def _run_demo(
    out: Path,
    model: str,
    merging: Sequence[str],
    scene: int,
    frames: int,
    device: str,
    overwrite: bool,
    report: Callable[[str], None],
) -> DemoResult:
    network = load_model(model, device=device)
    slots = {"dense": filled_slots(network)}
    if merging:
        slots["+".join(merging)] = filled_slots(accelerate(network, merging=list(merging)))
    preprocess: Any = network.preprocess
    size = preprocess.size
    report(f"rendering scene {scene}: {frames} frames of {size} x {size} pixels")
    truth = sequence(scene, frames=frames, size=(size, size))
    report(f"reconstructing with {model} on {device}, {' and '.join(slots)} alternately")

    known = Truth(truth.cam_from_world[0].double(), truth.depth[0], truth.valid[0], truth.points_world[0])
    first: dict[str, Any] = {}
    kept = 0

    def run(name: str) -> None:
        nonlocal kept
        fill_slots(slots[name])
        if name in first:
            with warned():
                reconstruct(truth.images[0], model=network)
        else:  # the first timed run is the one scored
            gc.collect()
            with warned() if first else nullcontext(), peak_memory(device) as peak:
                result = reconstruct(truth.images[0], model=network)
            memory = (peak[0] - kept) / GIB  # without the earlier results, which are on the CPU
            if device == "cpu":
                kept += sum(value.nbytes for value in vars(result).values() if isinstance(value, Tensor))
            first[name] = result, memory, effective_ratio(network), effective_key_ratio(network)
        bar.update()

    for name in slots:
        fill_slots(slots[name])
        with warned():
            reconstruct(truth.images[0, :2], model=network)  # warms up
    with counted(len(slots) * MIN_REPEATS, "run", leave=False) as bar:
        timings = compare({name: partial(run, name) for name in slots}, warmup=0, seconds=PATIENCE, device=device)
    trials = []
    for name, (result, memory, queries, keys) in first.items():
        scores = score_scene(as_geometry(result), known, points=False).values
        timing = timings[name]
        seconds = timing.latency_ms / 1000, timing.spread_ms / 1000
        trials.append(Trial(name, scores, *seconds, len(timing.runs_ms), memory, queries, keys))
    results = {name: found[0] for name, found in first.items()}
    with export.atomic_folder(out, overwrite=overwrite) as work:
        cloud = result.point_cloud()
        for form in ("ply", "glb", "view"):
            export.FORMATS[form](result, cloud, work)
        write_photographs(truth, work / "photos")
        title = f"{model}: AUC@30 {scores['auc_30']:.2f}, depth error {100 * scores['depth_abs_rel']:.0f} %"
        write_contact_sheet(result, work / "contact_sheet.png", title=title, gt_depth=truth.depth[0])
        if merging:
            view_of(results["dense"], least_sure(result, cloud)).write(work / DENSE_FILE)
            ways = {trial.name: (results[trial.name], lines(trial, trials[0])) for trial in trials}
            title = f"{frames} photographs, {model}: dense and with {trials[-1].name}"
            write_comparison(ways, work / "comparison.png", title=title)
    files = tuple(sorted(path for path in out.iterdir() if path.suffix in (".ply", ".glb", ".png", ".npz")))
    return DemoResult(tuple(trials), len(cloud), cloud.kept_share, files)


def lines(trial: Trial, dense: Trial) -> list[str]:
    """Cost of a trial, in words."""
    times = f"{trial.latency_s:.1f} s" if trial is dense else f"{trial.latency_s:.1f} s: {speedup(trial, dense):.2f}x"
    scores = trial.scores
    return [
        f"{times}, {trial.peak_memory_gib:.2f} GiB",
        f"cameras: AUC@30 {scores['auc_30']:.3f}, AUC@5 {scores['auc_5']:.3f}; "
        f"depth error {100 * scores['depth_abs_rel']:.1f} %",
    ]


def speedup(trial: Trial, dense: Trial) -> float:
    return dense.latency_s / trial.latency_s


def as_geometry(result: Reconstruction) -> Geometry:
    """A reconstruction as a batch of one scene."""
    fields = (result.cam_from_world, result.intrinsics, result.depth, result.points_world, result.conf)
    return Geometry(*(field[None] for field in fields))


def write_photographs(scene: SceneBatch, folder: Path) -> None:
    """The rendered frames as PNG, for `geoaccel reconstruct`."""
    from PIL import Image

    folder.mkdir()
    pixels = (scene.images[0] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{index:03d}.png")
