"""What the commands do for a user: reconstruct, demo, info; and the options that they take."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import checkpoint, commands, refused, run, write_images  # noqa: F401 (a fixture)
from PIL import Image
from references import REAL_SCENES

import geoaccel.info
from geoaccel import checks
from geoaccel.backbone import BACKBONES, Origin
from geoaccel.cli import parser
from geoaccel.errors import UserError
from geoaccel.eval.tools.demo import DemoResult, Trial, run_demo
from geoaccel.memory import GIB
from geoaccel.viewer.folder import read_results

# Users' scripts rely on the options: changing them is a decision, not an accident.
OPTIONS = {
    "demo": {"--out", "--model", "--merging", "--scene", "--frames", "--device", "--overwrite"},
    "reconstruct": {
        "--out", "--model", "--merging", "--quantization", "--attention", "--formats", "--points", "--conf-percentile",
        "--edge-filter", "--masks", "--max-points", "--fps", "--max-frames", "--size", "--mode", "--device", "--dtype",
        "--overwrite", "--layers", "--plan", "--poses", "--intrinsics", "--depths", "--images", "--shared-camera",
        "--square-pixels", "--scale", "--positions", "--skip-bad", "--recursive", "--scenes", "--dry-run",
        "--reference", "--drop-outliers", "--refine", "--tracks", "--max-memory", "--compare",
        "--window", "--overlap", "--wide", "--no-wide", "--loops", "--no-loops", "--engine", "--ray-address",
    },
    "tune": {
        "--model", "--out", "--max-pose-error", "--max-depth-error", "--speedup", "--max-memory", "--frames",
        "--measured", "--device", "--dtype", "--overwrite",
    },
    "eval": {"--config", "--multirun", "-m", "--cfg"},
    "bench": {"--config", "--multirun", "-m", "--cfg"},
    "info": {"--backbones"},
    "quantize export": {
        "--model", "--quantization", "--allocation", "--out", "--include", "--exclude", "--group-size", "--dtype",
        "--overwrite",
    },
    "quantize calibrate": {
        "--model", "--quantization", "--allocation", "--out", "--include", "--exclude", "--group-size", "--dtype",
        "--overwrite", "--images", "--co3d", "--co3d-subset", "--categories", "--scenes", "--frames", "--first-seed",
        "--evaluation", "--device", "--all-tokens", "--search", "--shortlist", "--rounding",
        "--camera-token",
    },
    "quantize sensitivity": {
        "--model", "--quantization", "--out", "--include", "--exclude", "--group-size", "--overwrite", "--images",
        "--co3d", "--co3d-subset", "--categories", "--scenes", "--frames", "--first-seed", "--evaluation", "--device",
        "--protect", "--budget-gb", "--max-effect", "--rank-by", "--draws",
    },
    "view": {"--against", "--html", "--host", "--port", "--overwrite"},
    "completion": set(),
}  # fmt: skip
OF_EVERY_COMMAND = {"-q", "--quiet", "-v", "--verbose"}


def test_options_are_pinned() -> None:
    assert commands(parser()) == {name: own | OF_EVERY_COMMAND for name, own in OPTIONS.items()}


def test_reconstruct(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = write_images(tmp_path / "photos"), tmp_path / "scene"
    formats = "ply,glb,colmap,colmap-text,nerfstudio,npz,png"
    code, _, err = run(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, "--formats", formats)
    assert code == 0, err
    assert "3 cameras in" in err
    assert "70 % of the pixels kept" in err
    for name in ("points.ply", "scene.glb", "sparse/0/cameras.bin", "sparse/0/points3D.txt", "transforms.json",
                 "contact_sheet.png"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    refused(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, says="not empty")
    code, _, err = run(capsys, "reconstruct", photos, "--out", out, "--model", checkpoint, "--overwrite")
    assert code == 0, err


def test_bfloat16_and_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_images(tmp_path / "photos")
    args = ("--model", checkpoint, "--dtype", "bfloat16", "--size", 56, "--mode", "pad", "--formats", "npz")
    code, _, err = run(capsys, "reconstruct", photos, "--out", tmp_path / "scene", *args)
    assert code == 0, err
    assert "3 x 56 x 56 pixels" in err


def test_masks(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trimesh

    photos, masks = write_images(tmp_path / "photos"), tmp_path / "masks"
    masks.mkdir()
    for index in range(3):
        picture = np.zeros((60, 80), dtype=np.uint8)
        picture[:, :40] = 255  # the left half
        Image.fromarray(picture).save(masks / (f"{index}.jpg.png" if index else "0.png"))
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "ply", "--conf-percentile", 0)
    code, _, err = run(capsys, *args, "--out", tmp_path / "left", "--masks", masks)
    assert code == 0, err
    assert "50 % of the pixels kept" in err
    assert run(capsys, *args, "--out", tmp_path / "all")[0] == 0
    counts = [len(trimesh.load(tmp_path / name / "points.ply").vertices) for name in ("left", "all")]
    assert 2 * counts[0] == counts[1]
    (masks / "1.jpg.png").unlink()
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", masks, says="no mask for 1.jpg")
    Image.new("L", (8, 8)).save(masks / "1.png")
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", masks, says="is 8x8, its image 1.jpg is 80x60")
    refused(capsys, *args, "--out", tmp_path / "none", "--masks", tmp_path / "nowhere", says="the folder of masks")


def test_cut_outs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points of the opaque half, without a word about masks."""
    import trimesh

    photos, cut = write_images(tmp_path / "photos"), tmp_path / "cut"
    cut.mkdir()
    alpha = np.zeros((60, 80), dtype=np.uint8)
    alpha[:, :40] = 255
    for path in photos.iterdir():
        picture = Image.open(path)
        picture.putalpha(Image.fromarray(alpha))
        picture.save(cut / f"{path.stem}.png")
    args = ("--model", checkpoint, "--formats", "ply", "--conf-percentile", 0)
    counts = []
    for folder in (photos, cut):
        code, _, err = run(capsys, "reconstruct", folder, *args, "--out", tmp_path / f"{folder.name}-scene")
        assert code == 0, err
        counts.append(len(trimesh.load(tmp_path / f"{folder.name}-scene" / "points.ply").vertices))
    assert counts[0] == 2 * counts[1]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoaccel.outliers.unlike", lambda alike: [1])
    code, out, err = run(capsys, "demo", "--out", tmp_path / "demo", "--frames", 3, "--merging", "httm")
    assert code == 0, err
    assert [record.name for record in caplog.records].count("geoaccel.outliers") == 1
    for text in ("pose AUC@30", "depth error", "time", "peak memory"):
        assert text in out
    assert out.split()[:2] == ["dense", "httm"]
    for name in ("queries removed", "keys removed"):
        (left_out,) = (line.split() for line in out.splitlines() if name in line)
        assert left_out[-4:-2] == ["0", "%"]
    (speedup,) = (line.split()[1:] for line in out.splitlines() if "speedup" in line)
    assert speedup[0] == "1.00x"
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"points.ply", "scene.glb", "contact_sheet.png", "comparison.png", "photos"} <= names
    *_, look, again, own = out.splitlines()
    assert look.endswith(f"geoaccel view {tmp_path / 'demo'}")
    assert list(read_results(tmp_path / "demo")) == ["dense", "accelerated"]
    photos = tmp_path / "demo" / "photos"
    assert again.endswith(f"geoaccel reconstruct {photos} --model vggt-mini --merging httm --out scene")
    assert own.endswith("geoaccel reconstruct photos/ --model facebook/VGGT-1B --merging httm --out scene")
    for command in (again, own):
        parser().parse_args(command.partition("geoaccel ")[2].split())


def test_what_the_demo_keeps_is_no_memory_of_the_next_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    @contextmanager
    def peak_memory(device: str) -> Iterator[list[int]]:
        yield (peak := [GIB])
        seen.append(peak[0])

    monkeypatch.setattr("geoaccel.eval.tools.demo.peak_memory", peak_memory)
    dense, merged = run_demo(tmp_path / "demo", merging=["httm"], frames=2).trials
    assert seen == [GIB, GIB]
    # At least photographs, depth, confidence and points of two frames.
    assert dense.peak_memory_gib == 1
    assert 2 * 224 * 224 * 8 * 4 < GIB * (1 - merged.peak_memory_gib) < 2 * 224 * 224 * 16 * 4


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_the_demo_says_when_the_machine_was_busy(
    spread: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = dict.fromkeys(("auc_30", "auc_5", "rotation_median_deg", "depth_abs_rel"), 0.5)
    trials = [Trial(name, scores, 2.0, 2 * spread, 3, 1.0, None, None) for name in ("dense", "httm")]
    monkeypatch.setattr("geoaccel.eval.tools.demo.run_demo", lambda *_, **__: DemoResult(tuple(trials), 1, 0.5, ()))
    err = run(capsys, "demo", "--out", tmp_path)[2]
    assert ("times varied by 50 %: the machine was busy" in err) == (spread > 0.1)


def test_info_names_licences_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    for text in ("facebook/VGGT-1B", "non-commercial", "CC BY-NC", "sdpa: works", "vggt-mini"):
        assert text in out


def test_info_of_checkpoints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "commercial use: not allowed" in run(capsys, "info", "facebook/VGGT-1B")[1]
    assert "commercial use: allowed" in run(capsys, "info", "facebook/VGGT-1B-Commercial")[1]
    assert "commercial use: allowed" in run(capsys, "info", "depth-anything/DA3-BASE")[1]
    large = run(capsys, "info", "depth-anything/DA3-LARGE")[1]
    assert "commercial use: not allowed" in large
    assert "optional conditions: poses, intrinsics" in large
    assert "about a metre" in run(capsys, "info", "yyfz233/Pi3X")[1]
    assert "Apache-2.0" in run(capsys, "info", "vggt-mini")[1]
    assert "keeps its licence" not in run(capsys, "info", "vggt-mini")[1]
    assert "published checkpoint keep its licence" in run(capsys, "info", checkpoint)[1]
    # Rounds of training, each on a line that can be read.
    rounds = [line for line in run(capsys, "info", "pi3-mini")[1].splitlines() if line.startswith("  after ")]
    assert len(set(rounds)) == len(rounds) > 8
    assert all("scenes" in line and len(line) < 160 for line in rounds)
    refused(capsys, "info", "vggt-mni", says="Did you mean 'vggt-mini'")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_SCENES.is_dir(), reason="no real images here")
@pytest.mark.parametrize("scene", sorted(path.name for path in REAL_SCENES.glob("*")) if REAL_SCENES.is_dir() else [])
def test_real_images(scene: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported points, projected with the exported cameras, land on the pixels of the images they came from."""
    pycolmap = pytest.importorskip("pycolmap")
    import trimesh

    out = tmp_path / "scene"
    code, _, err = run(capsys, "reconstruct", REAL_SCENES / scene / "images", "--out", out, "--max-frames", 12)
    assert code == 0, err
    assert len(trimesh.load(out / "points.ply").vertices) > 1000
    assert trimesh.load(out / "scene.glb").geometry
    model = pycolmap.Reconstruction(str(out / "sparse" / "0"))
    worst = 0.0
    for image in model.images.values():
        size = Image.open(io.BytesIO((REAL_SCENES / scene / "images" / image.name).read_bytes())).size
        assert size == (image.camera.width, image.camera.height)
        seen = [point for point in image.points2D if point.has_point3D()]
        for point in seen[:: max(1, len(seen) // 200)]:
            projected = image.project_point(model.points3D[point.point3D_id].xyz)
            worst = max(worst, float(np.abs(projected - point.xy).max()))
    assert worst < 0.5


@pytest.mark.parametrize(
    ("given", "fps", "most"),
    [((), 2.0, None), (("--fps", 5), 5.0, None), (("--max-frames", 7), None, 7)],
)
def test_two_frames_a_second_of_a_video_unless_told_otherwise(
    checkpoint: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[Any, ...],
    fps: float | None,
    most: int | None,
) -> None:
    asked: list[Any] = []

    def list_pictures(_: Any, *chosen: Any, recursive: bool) -> None:
        asked.extend(chosen)
        raise UserError("that was all")

    monkeypatch.setattr(checks, "list_pictures", list_pictures)
    clip = tmp_path / "clip.mp4"
    refused(capsys, "reconstruct", clip, "--out", tmp_path / "out", "--model", checkpoint, *given, says="that was all")
    assert asked == [fps, most]


def test_info_of_all_backbones(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network so small that its costs can be counted again."""
    backbone = BACKBONES["da3"]
    origin = Origin("Free", True, ("model.safetensors",), config=backbone.tiny.to_dict())
    monkeypatch.setattr(geoaccel.info, "origins", lambda: {"somebody/tiny": (backbone, origin)})
    code, out, _ = run(capsys, "info", "--backbones")
    assert code == 0
    head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
    found = dict(zip(head, row, strict=True))
    assert found["checkpoint"] == "`somebody/tiny` (da3)"
    assert (found["licence"], found["commercial use"]) == ("Free", "yes")
    assert found["takes besides images"] == "poses, intrinsics"
    assert found["input"] == "112 x 84"
    flops = backbone.build(**origin.config).cost(300, (84, 112)).total  # type: ignore[operator]
    assert found["300 frames"].startswith(f"{flops / 1e12:.3g} TFLOP, ")
