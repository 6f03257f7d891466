"""Effect and detection of a bad first image: black, blurred, or from another scene; or several of the latter.

    python scripts/figures/bad_images.py measure vggt-mini --seeds 1000-1031 --out build/validation.jsonl
    python scripts/figures/bad_images.py fit build/validation.jsonl ...
    python scripts/figures/bad_images.py measure vggt-mini --seeds 8192-8223 --out build/report.jsonl
    python scripts/figures/bad_images.py score build/validation.jsonl build/report.jsonl --write
    python scripts/figures/bad_images.py measure vggt-mini --root photographs/ --out build/photographs.jsonl

``measure`` writes a line per scene, kind of first image and, for photographs, the other scene that it is taken from:
AUC@30 and AUC@5 over the images of the scene with ``reference=first`` and with ``auto``, the frame chosen by ``auto``,
and how well frames match each other. ``fit`` prints the bounds above which 0.15 % of the clean images of a file are
reported, for one image and for several, the larger over all files (:mod:`geoaccel.outliers`). ``score`` evaluates the
package's bounds on the scenes of each file, which should be different ones; ``--write`` stores the results in
benchmarks/bad-images.json and puts the table into docs/reference.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frame_tables import rounded
from geoaccel.errors import UserError, run_program
from geoaccel.eval.data.synthetic import checked_seeds
from geoaccel.eval.metrics.effects import interval, with_interval
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.eval.run.prepare import network_input
from geoaccel.eval.run.source import Source
from geoaccel.fingerprint import of_json
from geoaccel.frame_matches import FrameMatches
from geoaccel.models.weights import load_model
from geoaccel.outliers import BOUND, BOUND_OF_SEVERAL, strangeness, unlike
from geoaccel.reference import Order, reference_first
from seed_command import provenance

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, KEPT = ROOT / "docs" / "reference.md", ROOT / "benchmarks" / "bad-images.json"
BEGIN, END = "<!-- table of scripts/figures/bad_images.py -->\n", "<!-- end of table -->"
KINDS = ("clean", "black", "blurred", "foreign", "several foreign")
WAYS, DEGREES = ("first", "auto"), (30, 5)
FALSE_ALARMS = 0.0015
USUAL = 8
"""Images per scene."""
FOREIGN = 500_000
"""Added to the seed of a scene, it gives the seed of the scene from which images are inserted."""


def planted(images: Tensor, kind: str, foreign: Tensor) -> Tensor:  # [S, 3, H, W] each
    """The scene with other first images."""
    count, first = bad(kind, len(images)), images[:1]
    if kind == "black":
        first = torch.zeros_like(first)
    elif kind == "blurred":
        first = blurred(images[0])[None]
    elif kind != "clean":
        first = foreign[:count]
    return torch.cat([first[:count], images[count:]])


def bad(kind: str, frames: int) -> int:
    """Number of inserted images: one, or for several a quarter of the scene."""
    return {"clean": 0, "several foreign": frames // 4}.get(kind, 1)


def blurred(
    image: Tensor,  # [3, H, W]
) -> Tensor:
    """Out of focus: a Gaussian whose standard deviation is an eighth of the longer side."""
    sigma = max(image.shape[1:]) / 8
    reach = int(2 * sigma)
    weights = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    wide = F.pad(image[None], (reach,) * 4, mode="replicate")
    wide = F.conv2d(wide, weights, groups=3)
    return F.conv2d(wide, weights.transpose(2, 3), groups=3)[0]


@torch.inference_mode()
def predicted(model: Any, images: Tensor, reference: Any) -> tuple[Tensor, Order]:
    """Poses [S, 4, 4], and the order in which the network saw the frames."""
    heads = [head for head in model.heads if head not in ("track", "ray")]
    if "depth" in heads:
        heads.remove("point")
    with reference_first(model, reference, len(images)) as order:
        predictions = model(images[None], heads=heads)
        geometry = order.back(model.backbone.geometry(predictions, tuple(images.shape[-2:])))
    return geometry.cam_from_world[0].float(), order


def measure_scene(model: Any, images: Tensor, truth: Tensor, foreign: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """A line for each kind of first image, and each scene of `foreign`; scores exclude inserted images."""
    for kind in KINDS:
        for other, theirs in foreign.items() if "foreign" in kind else [("", images)]:
            given, count = planted(images, kind, theirs), bad(kind, len(images))
            if kind == "several foreign" and count < 2:
                continue

            def score(poses: Tensor, start: int = max(count, 1)) -> dict[str, float]:
                rotation, translation = relative_pose_errors(poses[start:].double(), truth[start:])
                larger = torch.maximum(rotation, translation)
                return {f"auc_{degrees}": round(auc(larger, degrees), 4) for degrees in DEGREES}

            first, _ = predicted(model, given, "first")
            chosen, order = predicted(model, given, "auto")
            assert order.matches is not None
            yield {
                "kind": kind,
                **({"other": other} if other else {}),
                "first": score(first),
                "auto": score(chosen),
                "reference": order.first,
                "others": order.matches.others.tolist(),
                "ratios": [[round(value, 4) for value in row] for row in order.matches.ratios.tolist()],
            }


def scenes(args: argparse.Namespace) -> Iterator[tuple[str, Source, dict[str, Source]]]:
    """Name and path of a scene, and the scenes from which images are inserted: for photographs, all others."""
    if args.root is None:
        low, _, high = args.seeds.partition("-")
        for seed in checked_seeds(range(int(low), int(high or low) + 1), "measure on", "validation", "report"):
            yield str(seed), _rendered(args, seed), {str(seed + FOREIGN): _rendered(args, seed + FOREIGN)}
        return
    names = sorted(path.name for path in Path(args.root).iterdir() if (path / "poses.json").exists())
    for name in names:
        others = {other: _photographed(args, other) for other in names if other != name}
        yield name, _photographed(args, name), others


def _rendered(args: argparse.Namespace, seed: int) -> Source:
    return Source("synthetic", frames=args.frames, options={"seeds": [seed], "size": [args.size, args.size]})


def _photographed(args: argparse.Namespace, name: str) -> Source:
    return Source("folder", root=str(args.root), frames=args.frames, rule="evenly", scenes=[name])


def measure(args: argparse.Namespace) -> None:
    """Append what is missing to the file."""
    import dataclasses

    wanted = list(scenes(args))
    root = None if args.root is None else str(Path(args.root).resolve())
    made = of_json({**provenance(args.model), "frames": args.frames, "size": args.size, "root": root})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = read(args.out) if args.out.exists() else []
    if any(line.get("made") != made for line in before):
        raise UserError(
            f"{args.out} has lines from another model, frames, size, root, code or machine; give another --out"
        )
    done = {line["scene"] for line in before}
    model: Any = load_model(args.model)
    preprocess = dataclasses.replace(model.preprocess, mode="pad", size=args.size)

    def images_of(scene: Any) -> Tensor:
        on_disk = scene.frames[0].image_path is not None
        return network_input(scene, preprocess, resize=on_disk)[0][0]

    for name, place, others in wanted:
        if name in done:
            continue
        scene = next(iter(place()))
        truth = torch.stack([frame.cam_from_world for frame in scene.frames])
        foreign = {other: images_of(next(iter(source()))) for other, source in others.items()}
        lines = list(measure_scene(model, images_of(scene), truth, foreign))
        with args.out.open("a") as file:
            file.writelines(
                json.dumps({"scene": name, "model": args.model, "made": made, **line}) + "\n" for line in lines
            )
        scores = {line["kind"]: (line["first"]["auc_30"], line["auto"]["auc_30"]) for line in lines}
        print(name, scores, file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def matches_of(line: dict[str, Any]) -> FrameMatches:
    """Frames against frames."""
    return FrameMatches(torch.tensor(line["ratios"]), torch.tensor(line["others"]))


def fit(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """The bounds for one image and for several above which the target rate of clean images is reported.

    Raises:
        UserError: For scenes of the report set.
    """
    checked_seeds({int(line["scene"]) for line in lines if line["scene"].isdecimal()}, "choose bounds by", "validation")
    one: list[tuple[float, int]] = []
    several: list[tuple[float, int]] = []
    clean = 0
    for line in lines:
        count = bad(line["kind"], len(line["ratios"]))
        clean += len(line["ratios"]) - count
        order, values = strangeness(matches_of(line))
        alarms = [sum(frame >= count for frame in order[:n]) for n in range(1, len(values) + 1)]
        one.append((values[0], alarms[0]))
        several += [max(zip(values[1:], alarms[1:], strict=True))] if values[1:] else []
    allowed = FALSE_ALARMS * clean
    return _bound(one, allowed), _bound(several, allowed)


def _bound(values: list[tuple[float, int]], allowed: float) -> float:
    """The lowest bound above which values together raise no more than the given number of alarms."""
    alarms = 0
    for value, more in sorted(values, reverse=True):
        alarms += more
        if alarms > allowed:
            return math.ceil(1000 * value) / 1000
    return math.ceil(1000 * min(values)[0]) / 1000 if values else -math.inf


def score(
    lines: list[dict[str, Any]], bound: float = BOUND, bound_of_several: float = BOUND_OF_SEVERAL
) -> dict[str, Any]:
    """Results of ``auto`` and of the bounds."""
    found: dict[str, Any] = {"scenes": len({line["scene"] for line in lines})}
    clean = alarms = hits = planted_images = 0
    for kind in dict.fromkeys(line["kind"] for line in lines):
        of_kind = [line for line in lines if line["kind"] == kind]
        one = found[kind] = {"trials": len(of_kind)}
        for way in WAYS:
            scores = {f"auc_{degrees}": _by_scene(of_kind, way, f"auc_{degrees}") for degrees in DEGREES}
            one[way] = rounded({name: interval(values) for name, values in scores.items()})
        frames, count = len(of_kind[0]["ratios"]), bad(kind, len(of_kind[0]["ratios"]))
        named = [unlike(matches_of(line), bound, bound_of_several) for line in of_kind]
        false = sum(frame >= count for frames_named in named for frame in frames_named)
        clean += (frames - count) * len(of_kind)
        alarms += false
        one["false_alarms"] = round(false / ((frames - count) * len(of_kind)), 4)
        if count:
            right = sum(frame < count for frames_named in named for frame in frames_named)
            one["named"] = round(right / (count * len(of_kind)), 3)
            one["taken_as_reference"] = sum(line["reference"] < count for line in of_kind)
            hits += right
            planted_images += count * len(of_kind)
    return found | {
        "frames": len(lines[0]["ratios"]),
        "named": round(hits / planted_images, 3),
        "clean_images": clean,
        "false_alarms": round(alarms / clean, 4),
    }


def _by_scene(lines: list[dict[str, Any]], way: str, name: str) -> list[float]:
    """The mean of each scene."""
    scenes_of: dict[str, list[float]] = {}
    for line in lines:
        scenes_of.setdefault(line["scene"], []).append(line[way][name])
    return [sum(values) / len(values) for values in scenes_of.values()]


def table(records: list[dict[str, Any]]) -> str:
    """The stored results, as Markdown."""

    names = [f"AUC@{degrees}, `{way}`" for way in WAYS for degrees in DEGREES]
    lines = [f"| scenes | first images | {' | '.join(names)} | named | clean images named |"]
    lines.append("|---|---|" + "---:|" * (len(names) + 2))
    for record in records:
        for kind in (kind for kind in KINDS if kind in record):
            one = record[kind]
            named = f"{100 * one['named']:.0f} %" if "named" in one else ""
            alarms = f"{100 * one['false_alarms']:.2f} %"
            if kind == "clean":
                alarms += f"; of all {record['clean_images']} {100 * record['false_alarms']:.2f} %"
            where = f"{record['scenes']} {record['of']}, {record['model']}" if kind == "clean" else ""
            where += f", {record['frames']} images" if kind == "clean" and record["frames"] != USUAL else ""
            scores = " | ".join(with_interval(one[way][f"auc_{degrees}"], ".3f") for way in WAYS for degrees in DEGREES)
            lines.append(f"| {where} | {kind} | {scores} | {named} | {alarms} |")
    return "\n".join(lines) + "\n"


def write(records: list[dict[str, Any]]) -> None:
    """Store the records, and put their table into the document."""
    KEPT.write_text(json.dumps(records, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{table(records)}{END}{rest.partition(END)[2]}")


def record_of(path: Path) -> dict[str, Any]:
    """The scores of a file, and their scenes."""
    lines = read(path)
    if not lines:
        raise UserError(f"{path} has no lines; measure first")
    names = list(dict.fromkeys(line["scene"] for line in lines))
    rendered = all(name.isdecimal() for name in names)
    of = f"rendered, seeds {names[0]} to {names[-1]}" if rendered else "of photographs"
    return {"of": of, "model": lines[0]["model"], **score(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--seeds", default="1000-1031", help="seeds of rendered scenes, such as 1000-1031")
    measuring.add_argument("--root", help="folder of scenes with poses.json instead")
    measuring.add_argument("--frames", type=int, default=USUAL)
    measuring.add_argument("--size", type=int, default=112)
    measuring.add_argument("--out", type=Path, required=True)
    for name in ("fit", "score"):
        command = commands.add_parser(name)
        command.add_argument("files", type=Path, nargs="+")
        command.add_argument("--write", action="store_true", help="with score: store the results")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
        return
    if args.command == "fit":
        bounds = [fit(read(path)) for path in args.files]
        print(*(max(values) for values in zip(*bounds, strict=True)))
        return
    records = [record_of(path) for path in args.files]
    print(json.dumps(records, indent=1))
    if args.write:
        write(records)


if __name__ == "__main__":
    sys.exit(run_program("bad_images", main))
