"""CO3D's layout: written, read back, and damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from geoaccel.eval.data.co3d import Co3dSequence, list_categories, opencv_from_viewpoint, read_co3d
from geoaccel.eval.data.co3d_layout import SequenceToWrite, from_scenes, viewpoint_from_opencv, write_co3d
from geoaccel.eval.data.synthetic import SceneBatch, sample_batch

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
ANNOTATIONS = "procedural/frame_annotations.jgz"


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return sample_batch([3, 4], frames=3, size=(42, 28))


@pytest.fixture
def written(batch: SceneBatch, tmp_path: Path) -> Path:
    write_co3d(tmp_path / "co3d", from_scenes(batch))
    return tmp_path / "co3d"


def change_annotations(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    entries = json.loads(gzip.decompress((root / ANNOTATIONS).read_bytes()))
    change(entries)
    (root / ANNOTATIONS).write_bytes(gzip.compress(json.dumps(entries).encode()))


def test_scenes_come_back(written: Path, batch: SceneBatch) -> None:
    assert list_categories(written) == ["procedural"]
    sequences = list(read_co3d(written))
    assert [s.name for s in sequences] == ["seed000000003", "seed000000004"]
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(sequence.cam_from_world.float(), batch.cam_from_world[b], atol=1e-6, rtol=0)
        torch.testing.assert_close(sequence.intrinsics.float(), batch.intrinsics[b], atol=1e-5, rtol=0)
        for i, frame in enumerate(sequence.frames):
            assert frame.number == i + 1
            assert (frame.image() - batch.images[b, i]).abs().mean() < 0.02
            assert torch.equal(frame.mask(), batch.mask[b, i])
            torch.testing.assert_close(frame.depth(), batch.depth[b, i], atol=0, rtol=1e-3)
        points = sequence.points()
        assert len(points) == batch.mask[b].sum()
        torch.testing.assert_close(points, batch.points_world[b][batch.mask[b]], atol=1e-5, rtol=0)


def test_set_lists_choose_frames(written: Path) -> None:
    def count(**choice: Any) -> int:
        return sum(len(s.frames) for s in read_co3d(written, "procedural", **choice))

    assert count(subset="fewview_dev", split="test") == 6
    assert count(subset="fewview_dev") == 6
    assert count(subset="fewview_dev", split="train") == 0
    assert count(sequences=["seed000000004"]) == 3


def test_viewpoint_by_hand(this_processor: None) -> None:
    """A camera two units before the origin: 100 x 200 pixels, focal length 60, principal point right and below."""
    intrinsics = torch.tensor([[60.0, 0, 110], [0, 60, 70], [0, 0, 1]])
    cam_from_world = torch.eye(4)
    cam_from_world[:3, 3] = torch.tensor([0.5, 0.25, 2.0])
    viewpoint = viewpoint_from_opencv(intrinsics, cam_from_world, (100, 200))
    assert viewpoint["R"] == [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]
    assert viewpoint["T"] == [-0.5, -0.25, 2.0]
    assert viewpoint["focal_length"] == pytest.approx([1.2, 1.2])
    assert viewpoint["principal_point"] == pytest.approx([-0.2, -0.4])
    back, pose = opencv_from_viewpoint(viewpoint, (100, 200), "here")
    torch.testing.assert_close(back, intrinsics.double())
    torch.testing.assert_close(pose, cam_from_world.double())


def test_intrinsics_in_units_of_each_side() -> None:
    viewpoint = viewpoint_from_opencv(torch.eye(3), torch.eye(4), (100, 200))
    viewpoint |= {
        "focal_length": [0.6, 1.2],
        "principal_point": [-0.1, -0.4],
        "intrinsics_format": "ndc_norm_image_bounds",
    }
    intrinsics, _ = opencv_from_viewpoint(viewpoint, (100, 200), "here")
    torch.testing.assert_close(intrinsics, torch.tensor([[60.0, 0, 110], [0, 60, 70], [0, 0, 1]]).double())


def test_real_poses_survive(tmp_path: Path) -> None:
    folder = SHARED_DATA / "co3d_apple"
    if not folder.is_dir():
        pytest.skip("the real scenes are not here")
    frames = json.loads((folder / "poses.json").read_text())["frames"]
    cam_from_world = torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1)
    cam_from_world[:, :3] = torch.tensor([frame["extrinsic"] for frame in frames], dtype=torch.float64)
    intrinsics = torch.tensor([frame["intrinsic"] for frame in frames], dtype=torch.float64)
    intrinsics[:, :2, 2] += 0.5
    images = torch.zeros(len(frames), 3, frames[0]["height"], frames[0]["width"])
    apple = SequenceToWrite("apple_1", images, intrinsics, cam_from_world)
    write_co3d(tmp_path, [apple], category="apple")
    (sequence,) = read_co3d(tmp_path)
    torch.testing.assert_close(sequence.cam_from_world, cam_from_world, atol=1e-6, rtol=0)
    torch.testing.assert_close(sequence.intrinsics, intrinsics, atol=1e-6, rtol=0)
    frame = sequence.frames[0]
    assert frame.depth() is None
    assert frame.mask() is None
    assert sequence.points() is None


def test_same_scenes_same_annotations(written: Path, batch: SceneBatch, tmp_path: Path) -> None:
    again = write_co3d(tmp_path / "again", from_scenes(batch))
    assert (again / "frame_annotations.jgz").read_bytes() == (written / ANNOTATIONS).read_bytes()


def test_an_error_leaves_nothing(batch: SceneBatch, tmp_path: Path) -> None:
    def broken() -> Iterator[SequenceToWrite]:
        yield from_scenes(batch)[0]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        write_co3d(tmp_path, broken())
    assert not any(tmp_path.iterdir())


def test_refusals_when_writing(written: Path, batch: SceneBatch, tmp_path: Path) -> None:
    scene = from_scenes(batch)[0]
    with pytest.raises(FileExistsError, match="not empty"):
        write_co3d(written, [scene])
    write_co3d(written, [scene], overwrite=True)
    assert len(list(read_co3d(written))) == 1
    with pytest.raises(ValueError, match="split"):
        write_co3d(tmp_path, [scene], split="all")
    with pytest.raises(ValueError, match="two sequences"):
        write_co3d(tmp_path / "twice", [scene, scene])
    with pytest.raises(ValueError, match="folder name"):
        SequenceToWrite("../up", scene.images, scene.intrinsics, scene.cam_from_world)
    with pytest.raises(ValueError, match="intrinsics"):
        SequenceToWrite("a", scene.images, scene.intrinsics[:1], scene.cam_from_world)
    endless = replace(scene, depth=torch.full_like(scene.depth, torch.inf))
    with pytest.raises(ValueError, match="inf or NaN"):
        write_co3d(tmp_path / "inf", [endless])


def test_missing_files(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        list(read_co3d(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="give its parent"):
        list(read_co3d(written / "procedural"))
    with pytest.raises(FileNotFoundError, match="available: procedural"):
        list(read_co3d(written, "apple"))
    with pytest.raises(FileNotFoundError, match="fewview_dev"):
        list(read_co3d(written, subset="fewview_test"))
    with pytest.raises(ValueError, match="give subset"):
        list(read_co3d(written, split="test"))
    with pytest.raises(ValueError, match="train, val, test"):
        list(read_co3d(written, subset="fewview_dev", split="all"))
    next((written / "procedural").glob("*/images/*.jpg")).unlink()
    with pytest.raises(FileNotFoundError, match="fetch the rest"):
        list(read_co3d(written))


DAMAGED = {
    "not compressed": b"[]",
    "cut off": b"\x1f\x8b\x08",
    "not json": gzip.compress(b"{"),
    "no list": gzip.compress(b"{}"),
    "a list of numbers": gzip.compress(b"[1]"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_annotations(written: Path, content: bytes) -> None:
    (written / ANNOTATIONS).write_bytes(content)
    with pytest.raises(ValueError, match="fetch it again"):
        list(read_co3d(written))


def test_truncated_annotations(written: Path) -> None:
    path = written / ANNOTATIONS
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="fetch it again"):
        list(read_co3d(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["T"].__setitem__(0, float("nan")), "not a camera"),
        (lambda v: v["R"].__setitem__(0, [0.0, 0.0, 0.0]), "not a camera"),
        (lambda v: v["focal_length"].__setitem__(0, -1.0), "not a camera"),
        (lambda v: v.pop("R"), "lacks R"),
        (lambda v: v.update(intrinsics_format="pixels"), "known: ndc_isotropic"),
    ],
)
def test_bad_cameras(written: Path, change: Callable[[dict], Any], message: str) -> None:
    change_annotations(written, lambda entries: change(entries[1]["viewpoint"]))
    with pytest.raises(ValueError, match=rf"seed000000003, frame 2: .*{message}"):
        list(read_co3d(written))
    # the other sequence can still be read
    assert [s.name for s in read_co3d(written, sequences=["seed000000004"])] == ["seed000000004"]


def test_frames_without_a_viewpoint_or_with_damage(written: Path) -> None:
    change_annotations(written, lambda entries: entries[0].update(viewpoint=None))
    with pytest.raises(ValueError, match="no viewpoint"):
        list(read_co3d(written))
    change_annotations(written, lambda entries: entries[0].pop("image"))
    with pytest.raises(ValueError, match="damaged annotation"):
        list(read_co3d(written))


def test_damaged_images(written: Path) -> None:
    sequence: Co3dSequence = next(read_co3d(written))
    frame = sequence.frames[0]
    frame.image_path.write_text("not an image")
    with pytest.raises(ValueError, match="not a readable image"):
        frame.image()
    frame.depth_path.write_bytes(frame.mask_path.read_bytes())
    with pytest.raises(ValueError, match="16-bit"):
        frame.depth()
    frame.mask_path.unlink()
    with pytest.raises(FileNotFoundError):
        frame.mask()
