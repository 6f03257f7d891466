"""Which frames are evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import TREES, write_vggt_list
from tree_parts import camera_poses, write_photograph

from geoaccel.eval.data.co3d_layout import viewpoint_from_opencv
from geoaccel.eval.data.frames import (
    FrameChoice,
    VggtReplay,
    apply_frame_list,
    choose_frames,
    read_frame_list,
    write_frame_list,
)
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalFrame, EvalScene, Skipped, make_scene


def scene(name: str, count: int) -> EvalScene:
    return make_scene(name, [EvalFrame(f"f{i}", torch.eye(4).double(), None) for i in range(count)])


@pytest.mark.parametrize(
    ("choice", "count", "expected"),
    [
        (FrameChoice("all"), 4, [0, 1, 2, 3]),
        (FrameChoice("evenly", frames=2), 100, [0, 99]),
        (FrameChoice("evenly", frames=5), 9, [0, 2, 4, 6, 8]),
        (FrameChoice("evenly", frames=4), 6, [0, 2, 3, 5]),
        (FrameChoice("evenly", frames=3), 3, [0, 1, 2]),
        (FrameChoice("stride", stride=40), 100, [0, 40, 80]),
        (FrameChoice("stride", stride=3, frames=2), 100, [0, 3]),
        (FrameChoice("steps", frames=4), 12, [0, 1, 4, 7]),
        (FrameChoice("steps", frames=4), 5, [0, 1, 2, 3]),
        (FrameChoice("steps", frames=4), 4, [0, 1, 2, 3]),
        (FrameChoice("steps", frames=4), 3, [0, 1, 2]),
        (FrameChoice("steps", frames=2), 9, [0, 1]),
        (FrameChoice("steps", frames=300), 280, list(range(280))),
        (FrameChoice("steps", frames=300), 1000, [0, *range(1, 896, 3)]),
    ],
)
def test_rules(choice: FrameChoice, count: int, expected: list[int]) -> None:
    assert choice.indices("any", count) == expected


def test_steps_are_those_of_fastvggt() -> None:
    for count in range(2, 60):
        for frames in range(2, 60):
            rest = list(range(1, count))
            expected = [0, *rest[:: max(1, len(rest) // (frames - 1))][: frames - 1]]
            if count <= frames:
                expected = list(range(count))
            assert FrameChoice("steps", frames=frames).indices("any", count) == expected
    with pytest.raises(ValueError, match="1 frames, 2 are needed"):
        FrameChoice("steps", frames=300).indices("any", 1)


def test_evenly_is_numpy_linspace() -> None:
    for count in range(2, 60):
        for frames in range(2, count + 1):
            indices = FrameChoice("evenly", frames=frames).indices("any", count)
            assert indices[0] == 0
            assert indices[-1] == count - 1
            assert len(set(indices)) == frames
            assert np.abs(np.array(indices) - np.linspace(0, count - 1, frames)).max() <= 0.5 + 1e-9


def test_draws_depend_on_the_scene_alone() -> None:
    choice = FrameChoice("draw", frames=5, seed=7)
    indices = choice.indices("apple_1", 30)
    assert len(set(indices)) == 5
    assert indices == choice.indices("apple_1", 30) == [6, 12, 4, 3, 18]
    assert indices != choice.indices("apple_2", 30)
    assert indices != FrameChoice("draw", frames=5, seed=8).indices("apple_1", 30)
    drawn = [i for n in range(400) for i in choice.indices(f"scene {n}", 10)]
    assert np.bincount(drawn).min() > 150  # 200 expected
    assert sorted(FrameChoice("draw", frames=4).indices("apple_1", 4)) == [0, 1, 2, 3]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Did you mean 'evenly'"):
        FrameChoice("evenl", frames=2)
    for rule, frames, stride in (("evenly", None, 1), ("all", 3, 1), ("draw", 1, 1), ("stride", None, 0)):
        with pytest.raises(ValueError, match="frames="):
            FrameChoice(rule, frames=frames, stride=stride)
    with pytest.raises(ValueError, match="100 frames \\(1 at stride 200\\), 2 are needed"):
        FrameChoice("stride", stride=200).indices("any", 100)


def test_short_scenes_are_skipped_with_a_reason() -> None:
    skipped: list[Skipped] = []
    scenes = choose_frames([scene("a", 3), scene("b", 8)], FrameChoice("evenly", frames=4), on_skip=skipped.append)
    assert [(s.name, [f.name for f in s.frames]) for s in scenes] == [("b", ["f0", "f2", "f5", "f7"])]
    assert [str(s) for s in skipped] == ["a: 3 frames, 4 are needed; data.frames=3 uses all"]


def test_frozen_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    chosen = list(choose_frames([scene("a", 9), scene("b", 8)], FrameChoice("draw", frames=3)))
    write_frame_list(path, chosen)
    frozen = read_frame_list(path)
    skipped: list[Skipped] = []
    again = apply_frame_list([scene("z", 9), scene("a", 9), scene("b", 2)], frozen, on_skip=skipped.append)
    assert [[f.name for f in s.frames] for s in again] == [[f.name for f in chosen[0].frames]]
    assert [s.name for s in skipped] == ["b"]
    list(apply_frame_list([], frozen, on_skip=skipped.append))
    assert [s.reason for s in skipped[1:]] == ["in the frame list, but not in the dataset"] * 2
    few = apply_frame_list([scene("a", 9), scene("b", 9)], {"a": [], "b": ["f0"]}, on_skip=skipped.append)
    assert not list(few)
    whys = [f"{n} frame(s) in the list, need at least 2" for n in (0, 1)]
    assert [s.reason for s in skipped[3:]] == whys
    for damaged in ("[1]", "{", json.dumps({"a": [1]})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is not a frame list"):
            read_frame_list(path)


def vggt_lists(root: Path, counts: dict[str, dict[str, int]]) -> None:
    for category, sequences in counts.items():
        lists = {}
        for name, count in sequences.items():
            entries = []
            for i in range(count):
                file = f"{category}/{name}/images/frame{i:06d}.jpg"
                write_photograph(root / file, (8, 8))
                viewpoint = viewpoint_from_opencv(torch.eye(3), camera_poses(1)[0], (8, 8))
                entries.append({"filepath": file, "R": viewpoint["R"], "T": viewpoint["T"]})
            lists[name] = entries
        write_vggt_list(root, category, lists)


def drawn(root: Path, skipped: list[Skipped] | None = None, **options) -> dict[str, list[int]]:
    on_skip = None if skipped is None else skipped.append
    scenes = DATASETS["co3d_lists"](root, on_skip=on_skip, **options)
    return {s.name: [int(f.name.removeprefix("frame")) for f in s.frames] for s in scenes}


def test_replay_of_vggt(tmp_path: Path) -> None:
    """The generator runs over categories and sequences in order; a short sequence draws nothing."""
    vggt_lists(tmp_path, {"bench": {"3": 12}, "apple": {"2": 9, "1": 11, "short": 5}, "zebra": {"1": 20}})
    skipped: list[Skipped] = []
    replay = VggtReplay(frames=4, min_images=6)
    result = drawn(tmp_path, skipped, replay=replay)
    np.random.seed(0)  # noqa: NPY002
    expected = {
        name: np.random.choice(count, 4, replace=False).tolist()  # noqa: NPY002
        for name, count in (("apple_1", 11), ("apple_2", 9), ("bench_3", 12))
    }
    assert result == expected
    assert [str(s) for s in skipped] == ["apple_short: 5 frames, 6 are needed"]
    # neither a choice of scenes nor a missing photograph changes what the others draw
    assert drawn(tmp_path, replay=replay, scenes=["bench"]) == {"bench_3": expected["bench_3"]}
    (tmp_path / f"apple/2/images/frame{expected['apple_2'][0]:06d}.jpg").unlink()
    skipped.clear()
    assert drawn(tmp_path, skipped, replay=replay) == {k: v for k, v in expected.items() if k != "apple_2"}
    assert [s.name for s in skipped] == ["apple_2", "apple_short"]


def test_far_and_nan_translations_in_a_replay(tmp_path: Path) -> None:
    """A translation above 1e5 draws nothing, a NaN draws and is lost: as in the original."""
    counts = {"apple": {"1": 10, "2": 10, "3": 10}}
    vggt_lists(tmp_path, counts)
    from geoaccel.eval.data.co3d_lists import _read_list

    lists = _read_list(tmp_path / "apple_test.jgz")
    lists["1"][5]["T"] = [1e6, 0.0, 0.0]
    for entry in lists["2"]:
        entry["T"] = [float("nan"), 0.0, 0.0]
    write_vggt_list(tmp_path, "apple", lists)
    skipped: list[Skipped] = []
    generator = np.random.RandomState(0)
    generator.choice(10, 4, replace=False)
    expected = generator.choice(10, 4, replace=False).tolist()
    assert drawn(tmp_path, skipped, replay=VggtReplay(frames=4, min_images=6)) == {"apple_3": expected}
    assert "adds up to more than 100000" in skipped[0].reason
    assert "NaN" in skipped[1].reason


def test_a_sequence_with_fewer_frames_than_are_drawn_is_skipped(tmp_path: Path) -> None:
    """The list is long enough for VGGT, not for what is asked for; it draws nothing, and the run goes on."""
    vggt_lists(tmp_path, {"apple": {"1": 7, "2": 9}})
    skipped: list[Skipped] = []
    expected = np.random.RandomState(0).choice(9, 8, replace=False).tolist()
    assert drawn(tmp_path, skipped, replay=VggtReplay(frames=8, min_images=6)) == {"apple_2": expected}
    assert [str(s) for s in skipped] == ["apple_1: 7 frames, 8 are needed"]


def test_a_damaged_list_costs_its_category_but_ends_a_replay(tmp_path: Path) -> None:
    vggt_lists(tmp_path, {"apple": {"1": 6}, "bench": {"1": 6}, "car": {"1": 6}})
    (tmp_path / "bench_test.jgz").write_bytes(b"no gzip")
    skipped: list[Skipped] = []
    assert set(drawn(tmp_path, skipped)) == {"apple_1", "car_1"}
    assert [s.name for s in skipped] == ["bench"]
    assert "is not a frame list" in skipped[0].reason
    assert set(drawn(tmp_path, scenes=["car"])) == {"car_1"}
    # All that is drawn after it would differ from the original
    with pytest.raises(ValueError, match=r"bench_test\.jgz is not a frame list"):
        drawn(tmp_path, replay=VggtReplay(frames=2, min_images=2))


def test_fast_evaluation_draws_sequences(tmp_path: Path) -> None:
    import random

    names = [f"{i}" for i in range(6)]
    vggt_lists(tmp_path, {"apple": dict.fromkeys(names, 6)})
    generator = random.Random(0)
    assert sorted(generator.sample(names, 3)) == [
        name.removeprefix("apple_")
        for name in drawn(tmp_path, replay=VggtReplay(frames=2, min_images=6, max_sequences=3))
    ]


@pytest.mark.parametrize("content", [b"no gzip", b"\x1f\x8b\x08"])
def test_damaged_lists(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "apple_test.jgz").write_bytes(content)
    with pytest.raises(ValueError, match=r"apple_test\.jgz is not a frame list"):
        drawn(tmp_path)


def test_frames_of_a_real_reader(tmp_path: Path) -> None:
    tree = TREES["folder_poses"](tmp_path, camera_poses())
    (chosen,) = choose_frames(DATASETS["folder"](tree.root), FrameChoice("evenly", frames=2))
    assert chosen.image_paths == [tree.images[0], tree.images[2]]
    assert chosen.depth().shape == (2, 48, 64)
