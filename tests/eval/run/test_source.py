"""The data part of a configuration: what it takes, and what it says to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_trees import write_vggt_list
from PIL import Image
from random_poses import random_poses

from geoaccel.eval.data.co3d_layout import SequenceToWrite, write_co3d
from geoaccel.eval.metrics.pose_protocols import PROTOCOLS
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.run.source import Source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, r"data\.frames=0: give a whole number of at least 2, since poses are scored in pairs, null"),
        ({"frames": 1}, r"data\.frames=1: give a whole number of at least 2"),
        ({"frames": -3}, r"data\.frames=-3: give"),
        ({"frames": "many"}, r"data\.frames=many: give a whole number"),
        ({"frames": 3.5}, r"data\.frames=3\.5: give a whole number"),
        ({"frames": True}, r"data\.frames=True: give a whole number"),
        ({"scenes": -1}, r"data\.scenes=-1: give a whole number of at least 1, names, or null"),
        ({"scenes": 2.5}, r"data\.scenes=2\.5: give"),
        ({"scenes": {"seed000000001": 1}}, r"data\.scenes=.*: give"),
        ({"stride": "two"}, r"data\.stride=two: give a whole number of at least 1"),
        ({"stride": 0}, r"data\.stride=0: give a whole number of at least 1, or null for the preset's own"),
        ({"usual_stride": None}, r"data\.usual_stride=None: give"),
        ({"seed": "x"}, r"data\.seed=x: give a whole number"),
    ],
)
def test_what_is_no_number_is_one_clear_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Source("synthetic", **settings)
    assert "\n" not in str(caught.value)


def test_rendered_scenes_are_of_one_set() -> None:
    """Which is named, or follows from the seeds; a set is never evaluated under another's name."""
    assert list(Source("synthetic")._seeds) == list(range(64))
    assert list(Source("synthetic", split="report")._seeds) == list(range(8192, 8256))
    for seeds, split in (([3, 1000], "validation"), ([8192, 8255], "report"), ([1_000_000], "training")):
        source = Source("synthetic", options={"seeds": seeds, "size": [28, 28]})
        assert (source.split, source.notes, len(source)) == (split, [f"{split} scenes"], len(seeds))
        assert source == Source("synthetic", split=split, options=source.options)
    assert Source("synthetic", split="report").describe() != Source("synthetic").describe()
    (scene,) = Source("synthetic", split="report", scenes=1, frames=2, options={"size": [28, 28]})()
    assert scene.name == "seed000008192"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"seeds": [3, 8192]}}, "has seeds of the report set but data.split=validation; .*=report"),
        ({"split": "validation", "options": {"seeds": [8200]}}, "seeds of the report set but data.split=validation"),
        ({"split": "report", "options": {"seeds": [3]}}, "seeds of the validation set but data.split=report"),
        ({"split": "training"}, "give some, as data.options.seeds"),
        ({"split": "test"}, "unknown split 'test'; known: report, training, validation"),
    ],
)
def test_sets_do_not_mix(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Source("synthetic", **settings)
    assert "\n" not in str(caught.value)


def test_only_rendered_scenes_have_a_split_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"data\.split=report is only for rendered scenes"):
        Source("folder", root="nowhere", split="report")


def co3d_of(root: Path, **frames: int) -> None:
    """CO3D sequences of one grey photograph over and over."""
    sequences = [
        SequenceToWrite(name, torch.rand(count, 3, 8, 8), torch.eye(3).expand(count, 3, 3), random_poses(count))
        for name, count in frames.items()
    ]
    write_co3d(root, sequences, category="apple")


def test_short_sequences_are_left_out_and_frames_chosen_by_us_are_called_so(tmp_path: Path) -> None:
    """As VGGT leaves out CO3D's sequences of fewer than 50 photographs, of its test split alone."""
    co3d_of(tmp_path, long=50, short=49)
    settings = compose_settings("eval", ["data=co3d_own_frames", f"data.root={tmp_path}", "fidelity=true"])
    plan = Plan.from_settings(settings)
    (scene,) = plan.source()
    assert (scene.name, len(scene.frames)) == ("apple_long", 10)
    assert [str(skipped) for skipped in plan.source.skipped] == [
        "apple_short: 49 photographs, 50 are needed (data.min_images)"
    ]
    assert plan.scored.endswith(", frames chosen by us")
    assert plan.title == "vggt-mini on co3d, frames chosen by us"
    assert dict(plan.source.options) == {"subset": "fewview_dev", "split": "test", "min_quality": 0.5}
    own = Plan.from_settings(compose_settings("eval", ["data=realestate10k_own_frames", f"data.root={tmp_path}"]))
    assert own.scored.endswith(", frames chosen by us")
    frozen = Source("co3d", root=str(tmp_path), frames=10, rule="draw", frame_list="official.json")
    assert frozen.notes == ["frames of official.json"]
    assert Source("co3d_lists", root="x", rule="replay").notes == ["frames drawn as VGGT draws them"]
    for name in ("seven_scenes", "dtu", "folder"):
        assert not Plan.from_settings(compose_settings("eval", [f"data={name}", "data.root=x"])).source.notes


@pytest.mark.parametrize("name", ["co3d_own_frames", "co3d_vggt", "realestate10k_own_frames"])
def test_presets_are_as_their_pose_protocol_says(name: str) -> None:
    preset = compose_settings("eval", [f"data={name}", "data.root=x"])["data"]
    protocol = PROTOCOLS[preset["protocol"]["pose"]]
    assert preset["frames"] == protocol.num_frames
    assert preset["seed"] == protocol.seed
    assert (preset["min_images"] or 0) == protocol.min_images


def test_a_replay_leaves_out_short_sequences(tmp_path: Path) -> None:
    names = [f"{i:06d}" for i in range(60)]
    pose = {"R": torch.eye(3).tolist(), "T": [0.0, 0.0, 1.0]}
    lists = {"1_long": [{"filepath": f"apple/{n}.jpg", **pose} for n in names]}
    lists["2_short"] = lists["1_long"][:20]
    write_vggt_list(tmp_path, "apple", lists)
    (tmp_path / "apple").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "apple" / f"{name}.jpg")

    def found(**settings: int) -> list[str]:
        source = Source("co3d_lists", root=str(tmp_path), rule="replay", **settings)
        return [scene.name for scene in source()]

    assert found() == found(min_images=50) == ["apple_1_long"]
    assert found(min_images=20) == ["apple_1_long", "apple_2_short"]
    preset = compose_settings("eval", ["data=co3d_vggt", "data.root=x"])["data"]
    assert preset["min_images"] == 50


def test_a_rule_without_its_number_shows_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="frames=None with rule 'evenly'"):
        Source("folder", root="nowhere", rule="evenly")


def test_a_lone_name_is_a_name_and_so_is_a_number_in_a_list() -> None:
    small = {"size": [28, 28]}
    alone = Source("synthetic", frames=2, scenes="seed000000005", options=small)
    assert [scene.name for scene in alone()] == ["seed000000005"]
    assert len(alone) == 1
    with pytest.raises(ValueError, match="unknown scene '24'"):
        Source("synthetic", frames=2, scenes=[24], options=small)()


def test_images_without_poses_are_read_only_where_poses_are_not_needed(tmp_path: Path) -> None:
    hall = tmp_path / "hall"  # alone in its folder: others with poses would be its scenes
    hall.mkdir()
    for name in ("10.png", "9.png", "11.png", ".hidden.png"):
        Image.new("RGB", (28, 28)).save(hall / name)
    (hall / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"cannot be scored: compare with the dense model \(fidelity=true\)"):
        Source("folder", root=str(hall))()
    found = Source("folder", root=str(hall), need_poses=False)
    (scene,) = found()
    assert [frame.name for frame in scene.frames] == ["9.png", "10.png", "11.png"]
    assert scene.cam_from_world.isnan().all()
    (scene,) = Source("folder", root=str(tmp_path), scenes="hall", need_poses=False)()
    assert scene.name == "hall"
    # Whether poses are needed changes no prediction.
    assert found.describe() == Source("folder", root=str(hall)).describe()


def test_a_folder_with_poses_is_read_with_them(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "0.png")
    (tmp_path / "poses.json").write_text("{}")
    source = Source("folder", root=str(tmp_path), need_poses=False)
    assert list(source()) == []
    assert "has no list of frames" in str(source.skipped[0])


def test_what_a_folder_lacks_is_said_with_a_remedy_that_is_one(tmp_path: Path) -> None:
    """Photographs first of all; and nothing that was given already."""
    (tmp_path / "empty").mkdir()
    for need_poses in (True, False):
        with pytest.raises(
            FileNotFoundError, match=rf"^no photographs in {tmp_path} or one folder below; set data.root"
        ):
            Source("folder", root=str(tmp_path), need_poses=need_poses)()
    Image.new("RGB", (28, 28)).save(tmp_path / "empty" / "0.png")
    source = Source("folder", root=str(tmp_path), need_poses=False, options={"format": "colmap"})
    with pytest.raises(FileNotFoundError, match=r"^no colmap in .*: leave data.options.format out") as error:
        source()
    assert "fidelity" not in str(error.value)
