"""Cost and savings of every merging method over frame counts: measured scene by scene, then summarised in tables.

    python scripts/figures/measure_frames.py measure vggt-mini --frames 4 8 16 32 64:16 128:16 --scenes 32
    python scripts/figures/measure_frames.py measure pi3-mini --frames 16 --variants httm 'asymmetric, stride=4'
    python scripts/figures/measure_frames.py measure vggt-mini --set photographs --root scenes/ --frames 8 16
    python scripts/figures/measure_frames.py summary --set validation

A scene is rendered once; the dense model and then every variant run on it, with bypassing off. Each run is written at
once as a line of ``OUT/MODEL.jsonl``: scores against the ground truth, distances from the dense output, tokens left,
the predicted speedup, CPU seconds of the forward and of the dense one, the knobs, and the provenance. If killed at any
time, the same command resumes; measurements from other code, another machine or other photographs are repeated. Frame
counts alternate, so that a stopped run has about as many scenes of each. It uses one thread, as threads waiting for a
busy core waste CPU seconds; with two cores measure one model on each.

The set ``photographs`` are the scenes of a folder, each with ``poses.json``, a COLMAP model or nerfstudio's
``transforms.json``; frames are evenly spaced, and scenes with fewer are left out.

``summary`` uses the lines from the newest code for each model, and writes JSON into `benchmarks/`, tables with 95 %
intervals over scenes and a figure into `docs/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frame_tables import write_summary
from geoaccel import describe, restore
from geoaccel.api import place_mixer
from geoaccel.attention import AttentionContext, Mixer
from geoaccel.backbone import Geometry
from geoaccel.errors import UserError, run_program
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.data.synthetic import REPORT_SEEDS, TEST_SEEDS, VALIDATION_SEEDS
from geoaccel.eval.metrics.effects import effects
from geoaccel.eval.metrics.pose import fold
from geoaccel.eval.run.job import Job
from geoaccel.eval.run.made_by import SCORES, made_by
from geoaccel.eval.run.prepare import network_input, truth_of
from geoaccel.eval.run.scoring import Protocol, score_scene
from geoaccel.eval.run.source import Source
from geoaccel.eval.run.store import photographs
from geoaccel.eval.run.token_effects import effects as token_effects
from geoaccel.fingerprint import of_file
from geoaccel.merging import MERGING
from geoaccel.merging.layers import Layers
from geoaccel.models.files import fingerprint
from geoaccel.models.weights import load_model
from geoaccel.registry import make
from geoaccel.tuned import TunedPlan
from merging_variants import DENSE, FREE, GROUPS, LAYERS, Knobs, chosen

SETS: dict[str, Sequence[int]] = {"validation": VALIDATION_SEEDS, "report": REPORT_SEEDS, "test": TEST_SEEDS}
"""Seeds of the scenes. Choices are made on the first set, published tables show the second; defaults were partly chosen
on the third, too, so its results are biased in their favour."""

PHOTOGRAPHS = "photographs"
RENDERED_SIZE = (224, 224)
Scene = int | str
"""The seed of a rendered scene, or the name of a folder of photographs."""

PROTOCOL = Protocol(points=None)
ABOUT = ("frames", "seed", "variant", "merging", "root", "photographs", "files")
"""Keys of a line; rendered scenes have no photographs, and few methods read files."""

SCORED = ("auc_30", "auc_5", "auc_3", "depth_abs_rel")
"""The last one only with depth."""


def measure(
    model_name: str,
    seeds: Mapping[int, Sequence[Scene]],
    variants: dict[str, Knobs],
    out: Path,
    *,
    size: tuple[int, int] = RENDERED_SIZE,
    root: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure what is missing, line by line, each written to the file before it is yielded.

    Args:
        model_name: Embedded name or file.
        seeds: By number of frames, the scenes to measure.
        variants: Output of :func:`merging_variants.chosen`; the dense model is always measured.
        out: The file of lines; created with its folder.
        size: Height and width of rendered images; photographs in files get the network's default size.
        root: The folder of scenes, for photographs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = None if root else list(size)
    made = {"weights": fingerprint(model_name), "size": shown, "made_by": made_by("cpu", SCORES)}
    wanted = {DENSE: {}, **variants}
    done = {identity(line) for line in read_lines(out) if all(line.get(key) == value for key, value in made.items())}
    model: nn.Module | None = None
    read = {name: files_of(knobs) for name, knobs in wanted.items()}
    for frames, seed in in_turns(seeds):
        scene = None if root is None else read_scene(seed, frames, size, root)
        about = {"frames": frames, "seed": seed, **({} if scene is None else photographed_as(scene, root))}
        keys = {name: {**about, "variant": name, "merging": wanted[name], **read[name]} for name in wanted}
        missing = [name for name in wanted if identity(keys[name]) not in done]
        if not missing:
            continue
        if model is None:
            model = load_model(model_name)
            list(measure_scene(model, model_name, read_scene(seed, 2, size, root), {DENSE: {}}))  # warms up
        scene = scene or read_scene(seed, frames, size, root)
        for name, found in measure_scene(model, model_name, scene, pick(wanted, missing)):
            line = {"model": Path(model_name).stem, **keys[name], **found, **made}
            append_line(out, line)
            yield line


def photographed_as(scene: EvalScene, root: Path | None) -> dict[str, Any]:
    """Paths of a scene's photographs, and their sizes and times."""
    return {"root": str(Path(root or "").resolve()), "photographs": [list(stamp) for stamp in photographs(scene)]}


def files_of(methods: Knobs) -> dict[str, Any]:
    """Files that the methods of a variant read, under ``files``; empty if none."""
    by_layers = methods.keys() & {LAYERS, FREE}
    made: list[Any] = [] if by_layers else [make(MERGING, name, knobs) for name, knobs in methods.items()]
    made += Layers.read(methods.get(LAYERS)).methods
    paths = [(method.name, path) for method in made for path in getattr(method, "files", list)()]
    found = {f"{name}.{path.name}": of_file(path) for name, path in paths}
    return {"files": found} if found else {}


def pick(variants: dict[str, Knobs], names: list[str]) -> dict[str, Knobs]:
    return {name: variants[name] for name in names}


def in_turns(seeds: Mapping[int, Sequence[Scene]]) -> Iterator[tuple[int, Scene]]:
    """Frame counts and seeds: the first seed of each count, then the second."""
    for i in range(max(map(len, seeds.values()), default=0)):
        yield from ((frames, own[i]) for frames, own in seeds.items() if i < len(own))


def read_scene(name: Scene, frames: int, size: tuple[int, int], root: Path | None) -> EvalScene:
    """One scene, rendered or photographed."""
    if root is None:
        source = Source("synthetic", frames=frames, options={"seeds": [name], "size": list(size)})
    else:
        source = Source("folder", root=str(root), frames=frames, rule="evenly", scenes=[str(name)])
    return next(iter(source()))


def measure_scene(
    model: nn.Module, model_name: str, scene: EvalScene, variants: dict[str, Knobs]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of each variant on one scene, one by one; the dense model always runs first."""
    preprocess: Any = model.preprocess
    on_disk = scene.frames[0].image_path is not None
    images, transforms = network_input(scene, preprocess, resize=on_disk)
    truth = truth_of(scene, transforms)
    restore(model)
    dense, dense_s = predicted(model, images)
    for name, methods in variants.items():
        if name == DENSE:
            geometry, seconds = dense, dense_s
        else:
            put_into(model, model_name, methods)
            geometry, seconds = predicted(model, images)
        scores = score_scene(geometry, truth, PROTOCOL, name=scene.name, points=False)
        pairs = torch.maximum(scores.pairs.rotation_deg, fold(scores.pairs.translation_deg))
        yield (
            name,
            {
                **{key: scores.values[key] for key in SCORED if key in scores.values},
                **effects(geometry, dense, None),
                **tokens_left(model),
                "predicted_speedup": describe(model).gain or 1.0
                if methods and not methods.keys() & {LAYERS, FREE}
                else None,
                **{"cpu_s": seconds, "dense_cpu_s": dense_s},
                "pairs_deg": [round(error, 4) for error in pairs.tolist()],
            },
        )
    restore(model)


class FreeAttention(Mixer):
    """Gives every token its own value."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> tuple[Tensor, None]:
        return v, None


def put_into(model: nn.Module, model_name: str, methods: Knobs) -> None:
    """Apply a variant to a model."""
    if FREE in methods:
        place_mixer(restore(model), FreeAttention())
    else:
        Job(model_name, **(methods if LAYERS in methods else {"merging": methods})).apply(model)


@torch.inference_mode()
def predicted(model: nn.Module, images: Tensor) -> tuple[Geometry, float]:
    """The output of a model, and the CPU seconds of its forward with all heads and threads."""
    backbone: Any = model.backbone
    start = time.process_time()
    predictions = model(images)
    seconds = time.process_time() - start
    return backbone.geometry(predictions, (images.shape[-2], images.shape[-1])), seconds


def tokens_left(model: nn.Module) -> dict[str, Any]:
    """Fractions of queries and keys left, means over the attentions with merging, and why any of them did not merge."""
    found = list(token_effects(model))
    if not found:
        return {"queries": 1.0, "keys": 1.0, "bypassed": None}
    shares = {"queries": [e.queries / e.tokens for e in found], "keys": [e.keys / e.tokens for e in found]}
    why = next((effect.bypassed for effect in found if effect.bypassed), None)
    return {name: sum(values) / len(values) for name, values in shares.items()} | {"bypassed": why}


def identity(line: dict[str, Any]) -> str:
    """The keys of a line, without its provenance."""
    return json.dumps([line.get(key) for key in ABOUT], sort_keys=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line truncated when its process was killed is ignored."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line, after ending a truncated last one."""
    text = json.dumps(line) + "\n"
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            text = "\n" + text
        file.write(text.encode())


def scenes_of(
    given: Iterable[str], scenes: int, which: str, root: Path | None, skip: int = 0
) -> dict[int, Sequence[Scene]]:
    """From ``64:16``, or only a number of frames, the seeds or names of that many scenes after the skipped ones.

    Raises:
        UserError: For an invalid number, or a folder that does not match the set.
    """
    if (root is None) == (which == PHOTOGRAPHS):
        raise UserError(f"--set {which}: --root FOLDER is required with --set {PHOTOGRAPHS}, and only there")
    found: dict[int, Sequence[Scene]] = {}
    for text in given:
        count, _, own = text.partition(":")
        if not count.isdecimal() or int(count) < 2 or not (own or str(scenes)).isdecimal():
            raise UserError(f"--frames {text}: give a number of at least 2, or with a number of scenes, as in 64:16")
        there: Sequence[Scene] = (photographed(root, int(count)) if root else SETS[which])[skip:]
        number = int(own) if own else min(scenes, len(there)) if root else scenes
        if not 1 <= number <= len(there):
            held = (f"{len(there)} of {count} frames" if root else str(len(there))) + f" behind {skip}" * bool(skip)
            raise UserError(f"{number} scenes of the {which} set, which has {held}: give 1 to that many")
        found[int(count)] = there[:number]
    return found


def photographed(root: Path, frames: int) -> list[str]:
    """Names of the scenes in a folder that have enough photographs."""
    return [scene.name for scene in Source("folder", root=str(root))() if len(scene.frames) >= frames]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="measure what is missing")
    one.add_argument("model", help="embedded name, or a file")
    one.add_argument("--frames", nargs="+", default=["4", "8", "16", "32", "64:16", "128:16"], metavar="N[:SCENES]")
    one.add_argument("--scenes", type=int, default=32, help="for frame counts without their own; default: %(default)s")
    one.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    groups = f"groups ({', '.join(GROUPS)}), names, methods with knobs, plans of geoaccel tune (*.yaml), '{FREE}'"
    one.add_argument("--variants", nargs="+", default=["published", "ours"], help=f"{groups}; default: %(default)s")
    two = commands.add_parser("summary", help="tables, JSON and a figure of the measurements")
    two.add_argument("models", nargs="*", help="default: all measured models")
    two.add_argument("--to", type=Path, default=Path(), help="folder of benchmarks/ and docs/results/; default: here")
    two.add_argument("--name", default="merging", help="prefix of the file names; default: %(default)s")
    for command in (one, two):
        command.add_argument(
            "--set", choices=[*SETS, PHOTOGRAPHS], default="validation", dest="which", help="set of scenes"
        )
        command.add_argument("--skip", type=int, default=0, help="number of first scenes of the set to leave out")
        command.add_argument("--root", type=Path, help=f"folder of scenes for --set {PHOTOGRAPHS}")
        command.add_argument("--out", type=Path, default=Path("runs/frames"), help="folder of lines (%(default)s)")
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Measure, or summarise."""
    if args.skip < 0:
        raise UserError(f"--skip {args.skip}: give a number of scenes, from 0 on")
    if args.skip and args.which == PHOTOGRAPHS:
        raise UserError(f"--skip {args.skip} is only for rendered scenes; give a --root without those to leave out")
    if args.command == "summary":
        files = [args.out / f"{name}.jsonl" for name in args.models] or sorted(args.out.glob("*.jsonl"))
        lines = {path.stem: read_lines(path) for path in files}
        names = {line["seed"] for own in lines.values() for line in own if isinstance(line["seed"], str)}
        there = SETS[args.which][args.skip :] if args.which in SETS else names
        write_summary(lines, args.which, there, args.to, args.name)
        return
    seeds = scenes_of(args.frames, args.scenes, args.which, args.root, args.skip)
    variants = chosen(args.variants)
    for plan in (name for name in args.variants if name.endswith(".yaml")):
        TunedPlan.read(plan).check_weights(load_model(args.model))
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        out = args.out / f"{Path(args.model).stem}.jsonl"
        for line in measure(args.model, seeds, variants, out, root=args.root):
            what = f"{line['frames']} frames, scene {line['seed']}, {line['variant']}"
            scores = f"AUC@30 {line['auc_30']:.3f}, {line['pose_median_deg']:.2f} deg from dense"
            print(f"{what}: {scores}, {line['cpu_s']:.1f} s", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)


def main() -> None:
    args = arguments()
    sys.exit(run_program("measure_frames", lambda: work(args), interrupted="the same command goes on"))


if __name__ == "__main__":
    main()
