"""The demo: a scene that training never saw, reconstructed with a model of the package, scored and timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geoaccel import export
from geoaccel.backbone import Geometry
from geoaccel.eval.data.synthetic import TEST_SEEDS, SceneBatch, sequence
from geoaccel.eval.prepare import Truth
from geoaccel.eval.scoring import score_scene
from geoaccel.eval.speed import compare, peak_memory
from geoaccel.export.contact_sheet import write_contact_sheet
from geoaccel.models.weights import load_model
from geoaccel.reconstruction import Reconstruction, reconstruct


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        scores: Of :func:`geoaccel.eval.scoring.score_scene`.
        latency_s: Median time of five reconstructions after a warm-up.
        peak_memory_gib: Largest resident memory (CPU) or allocated memory (CUDA) during the forwards.
        points: Points written.
        kept_share: Share of the pixels that the confidence filter left.
        files: What was written.
    """

    scores: dict[str, float]
    latency_s: float
    peak_memory_gib: float
    points: int
    kept_share: float
    files: tuple[Path, ...]


def run_demo(
    out: str | Path,
    *,
    model: str = "vggt-mini",
    scene: int = TEST_SEEDS[0],
    frames: int = 8,
    device: str = "cpu",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Render a test scene, reconstruct it, score it, and write PLY, GLB and a contact sheet.

    Args:
        out: Output folder; appears when everything in it is complete.
        model: Name or path of a checkpoint.
        scene: Seed of the scene.
        frames: Photographs to render.
        device: Where to run.
        overwrite: Replace an earlier result.
        report: Called with a line of text at each step.
    """
    export.check_output_folder(out, overwrite=overwrite)
    network = load_model(model, device=device)
    size = network.preprocess.size
    report(f"rendering scene {scene}: {frames} frames of {size} x {size} pixels")
    truth = sequence(scene, frames=frames, size=(size, size))
    report(f"reconstructing with {model} on {device}")

    def forward() -> Reconstruction:
        return reconstruct(truth.images[0], model=network)

    with peak_memory(device) as peak:
        timing = compare({"dense": forward}, device=device)["dense"]
        result = forward()
    known = Truth(truth.cam_from_world[0].double(), truth.depth[0], truth.valid[0], truth.points_world[0])
    scores = score_scene(as_geometry(result), known, points=False).values
    with export.atomic_folder(out, overwrite=overwrite) as work:
        cloud = result.point_cloud()
        for name in ("ply", "glb"):
            export.FORMATS[name](result, cloud, work)
        write_photographs(truth, work / "photos")
        title = f"{model}: AUC@30 {scores['auc_30']:.2f}, depth error {100 * scores['depth_abs_rel']:.0f} %"
        write_contact_sheet(result, work / "contact_sheet.png", title=title, gt_depth=truth.depth[0])
    files = tuple(sorted(path for path in Path(out).iterdir() if path.suffix in (".ply", ".glb", ".png")))
    return DemoResult(scores, timing.latency_ms / 1000, peak[0] / 2**30, len(cloud), cloud.kept_share, files)


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
