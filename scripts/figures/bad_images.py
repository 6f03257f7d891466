"""What a bad first image does, and whether it is found: black, blurred, or of another scene.

    python scripts/figures/bad_images.py measure vggt-mini --seeds 1000-1031 --out build/validation.jsonl
    python scripts/figures/bad_images.py fit build/validation.jsonl
    python scripts/figures/bad_images.py measure vggt-mini --seeds 8192-8223 --out build/report.jsonl
    python scripts/figures/bad_images.py score build/validation.jsonl build/report.jsonl --write
    python scripts/figures/bad_images.py measure vggt-mini --root photographs/ --out build/photographs.jsonl

``measure`` writes a line for each scene and kind of first image: AUC@30 and AUC@5 over the other images with
``reference=first`` and with ``auto``, the frame that ``auto`` took, and how alike each frame is to the others. ``fit``
prints the jump by which 0.5 % of the clean images are named (:mod:`geoaccel.outliers`). ``score`` says how the jumps of
the package do on the scenes of each file, which should be others than those; ``--write`` keeps that in
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

from frame_tables import rounded, spread
from geoaccel.errors import UserError, run_program
from geoaccel.eval.data.synthetic import checked_seeds
from geoaccel.eval.metrics.effects import interval
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.eval.run.prepare import network_input
from geoaccel.eval.run.source import Source
from geoaccel.models.weights import load_model
from geoaccel.outliers import JUMP, unlike
from geoaccel.reference import Order, reference_first

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, KEPT = ROOT / "docs" / "reference.md", ROOT / "benchmarks" / "bad-images.json"
BEGIN, END = "<!-- table of scripts/figures/bad_images.py -->\n", "<!-- end of table -->"
KINDS = ("clean", "black", "blurred", "foreign")
WAYS, DEGREES = ("first", "auto"), (30, 5)
FALSE_ALARMS = 0.005
FOREIGN = 500_000
"""Added to the seed of a scene: that of the one whose image is planted into it."""


def planted(images: Tensor, kind: str, foreign: Tensor) -> Tensor:  # [S, 3, H, W]
    """The scene with another first image."""
    first = images[0]
    changed = {"clean": first, "black": torch.zeros_like(first), "foreign": foreign}
    return torch.cat([(blurred(first) if kind == "blurred" else changed[kind])[None], images[1:]])


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


def measure_scene(model: Any, images: Tensor, truth: Tensor, foreign: Tensor) -> Iterator[dict[str, Any]]:
    """A line for each kind of first image; scores leave that image out."""

    def score(poses: Tensor) -> dict[str, float]:
        rotation, translation = relative_pose_errors(poses[1:].double(), truth[1:])
        larger = torch.maximum(rotation, translation)
        return {f"auc_{degrees}": round(auc(larger, degrees), 4) for degrees in DEGREES}

    for kind in KINDS:
        given = planted(images, kind, foreign)
        first, _ = predicted(model, given, "first")
        chosen, order = predicted(model, given, "auto")
        assert order.alike is not None
        yield {
            "kind": kind,
            "first": score(first),
            "auto": score(chosen),
            "reference": order.first,
            "alike": [round(value, 5) for value in order.alike.tolist()],
        }


def scenes(args: argparse.Namespace) -> Iterator[tuple[str, Source, Source]]:
    """Name of a scene, where it is, and where the image that is planted into it is."""
    if args.root is None:
        low, _, high = args.seeds.partition("-")
        for seed in checked_seeds(range(int(low), int(high or low) + 1), "measure on", "validation", "report"):
            yield str(seed), _rendered(args, seed), _rendered(args, seed + FOREIGN)
        return
    names = sorted(path.name for path in Path(args.root).iterdir() if (path / "poses.json").exists())
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        yield name, _photographed(args, name), _photographed(args, other)


def _rendered(args: argparse.Namespace, seed: int) -> Source:
    return Source("synthetic", frames=args.frames, options={"seeds": [seed], "size": [args.size, args.size]})


def _photographed(args: argparse.Namespace, name: str) -> Source:
    return Source("folder", root=str(args.root), frames=args.frames, rule="evenly", scenes=[name])


def measure(args: argparse.Namespace) -> None:
    """Append what is missing to the file."""
    import dataclasses

    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {line["scene"] for line in read(args.out)} if args.out.exists() else set()
    model: Any = load_model(args.model)
    preprocess = dataclasses.replace(model.preprocess, mode="pad", size=args.size)
    for name, place, other in scenes(args):
        if name in done:
            continue
        scene, elsewhere = (next(iter(source())) for source in (place, other))
        on_disk = scene.frames[0].image_path is not None
        images, foreign = (network_input(one, preprocess, resize=on_disk)[0][0] for one in (scene, elsewhere))
        truth = torch.stack([frame.cam_from_world for frame in scene.frames])
        lines = list(measure_scene(model, images, truth, foreign[0]))
        with args.out.open("a") as file:
            file.writelines(json.dumps({"scene": name, "model": args.model, **line}) + "\n" for line in lines)
        scores = {line["kind"]: (line["first"]["auc_30"], line["auto"]["auc_30"]) for line in lines}
        print(name, scores, file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(lines: list[dict[str, Any]]) -> float:
    """The jump by which so many clean images are named.

    Raises:
        UserError: For scenes of the report set.
    """
    checked_seeds({int(line["scene"]) for line in lines if line["scene"].isdecimal()}, "choose a jump by", "validation")
    worst = []
    for line in lines:
        away, order = (1 - torch.tensor(line["alike"])).log().sort(descending=True)
        if line["kind"] == "clean" or int(order[0]) != 0:
            worst.append(float(away[0] - away[1]))
    clean = sum(len(line["alike"]) - (line["kind"] != "clean") for line in lines)
    allowed = int(FALSE_ALARMS * clean)
    return math.ceil(1000 * sorted(worst, reverse=True)[allowed]) / 1000


def score(lines: list[dict[str, Any]], jump: float = JUMP) -> dict[str, Any]:
    """How ``auto`` and the jumps do."""
    found: dict[str, Any] = {"scenes": len({line["scene"] for line in lines})}
    clean = alarms = hits = 0
    for kind in KINDS:
        of_kind = [line for line in lines if line["kind"] == kind]
        one = found[kind] = {}
        for way in WAYS:
            scores = {f"auc_{degrees}": [line[way][f"auc_{degrees}"] for line in of_kind] for degrees in DEGREES}
            one[way] = rounded({name: interval(values) for name, values in scores.items()})
        named = [unlike(line["alike"], jump) for line in of_kind]
        bad = [0] if kind != "clean" else []
        clean += sum(len(line["alike"]) - len(bad) for line in of_kind)
        alarms += sum(len(set(frames) - set(bad)) for frames in named)
        if bad:
            one["named"] = round(sum(0 in frames for frames in named) / len(named), 3)
            one["taken_as_reference"] = sum(line["reference"] == 0 for line in of_kind)
            hits += sum(0 in frames for frames in named)
    planted_images = sum(line["kind"] != "clean" for line in lines)
    return found | {
        "named": round(hits / planted_images, 3),
        "clean_images": clean,
        "false_alarms": round(alarms / clean, 4),
    }


def table(records: list[dict[str, Any]]) -> str:
    """What was kept, as Markdown."""

    names = [f"AUC@{degrees}, `{way}`" for way in WAYS for degrees in DEGREES]
    lines = [f"| scenes | first image | {' | '.join(names)} | named | clean images named |"]
    lines.append("|---|---|" + "---:|" * (len(names) + 2))
    for record in records:
        for kind in KINDS:
            one = record[kind]
            named = f"{100 * one['named']:.0f} %" if "named" in one else ""
            alarms = f"{100 * record['false_alarms']:.2f} % of {record['clean_images']}" if kind == "clean" else ""
            where = f"{record['scenes']} {record['of']}, {record['model']}" if kind == "clean" else ""
            scores = " | ".join(spread(one[way][f"auc_{degrees}"], ".3f") for way in WAYS for degrees in DEGREES)
            lines.append(f"| {where} | {kind} | {scores} | {named} | {alarms} |")
    return "\n".join(lines) + "\n"


def write(records: list[dict[str, Any]]) -> None:
    """Keep the records, and put their table into the document."""
    KEPT.write_text(json.dumps(records, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{table(records)}{END}{rest.partition(END)[2]}")


def record_of(path: Path) -> dict[str, Any]:
    """The scores of a file, and of which scenes they are."""
    lines = read(path)
    if not lines:
        raise UserError(f"there is no line in {path}; measure first")
    names = list(dict.fromkeys(line["scene"] for line in lines))
    rendered = all(name.isdecimal() for name in names)
    of = f"rendered, seeds {names[0]} to {names[-1]}" if rendered else "of photographs"
    return {"of": of, "model": lines[0]["model"], **score(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--seeds", default="1000-1031", help="of rendered scenes, as 1000-1031")
    measuring.add_argument("--root", help="folder of scenes with poses.json instead")
    measuring.add_argument("--frames", type=int, default=8)
    measuring.add_argument("--size", type=int, default=112)
    measuring.add_argument("--out", type=Path, required=True)
    for name in ("fit", "score"):
        command = commands.add_parser(name)
        command.add_argument("files", type=Path, nargs="+")
        command.add_argument("--write", action="store_true", help="of score: keep the figures")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
        return
    if args.command == "fit":
        print(fit([line for path in args.files for line in read(path)]))
        return
    records = [record_of(path) for path in args.files]
    print(json.dumps(records, indent=1))
    if args.write:
        write(records)


if __name__ == "__main__":
    sys.exit(run_program("bad_images", main))
