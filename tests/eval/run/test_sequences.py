"""Whole sequences in windows: an exact network has no error, pieces stay apart, and a run goes on from its windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle, short_loop
from plans import Given

from geoaccel.errors import UserError
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.run import sequences
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.run.room import Room
from geoaccel.eval.run.scoring import Protocol, SceneScores
from geoaccel.eval.run.sequence_scores import score_sequence, sequence_totals
from geoaccel.eval.run.sequences import AutoLengths, RenderedPicture, Windows, picture_of, predict_sequence
from geoaccel.eval.run.source import Source
from geoaccel.eval.run.store import Prediction, Store
from geoaccel.eval.run.trajectory import Trajectory
from geoaccel.windows import identity, predict
from geoaccel.windows import store as windows_store
from geoaccel.windows.predict import Lengths

pytest.importorskip("scipy")


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A network that is exact and merges a quarter; what it is made of is of no interest."""
    monkeypatch.setattr(identity, "identity_of", lambda model: {})
    for name, ratio in (("effective_ratio", 0.25), ("effective_key_ratio", 0.5)):
        monkeypatch.setattr(sequences, name, lambda model, ratio=ratio: ratio)
    return Oracle([short_loop(48).render(0, 48)])


def video(frames: int = 48, seed: int = 1000) -> EvalScene:
    (scene,) = DATASETS["long_paths"](None, seeds=[seed], num_frames=frames, size=(28, 28))
    return scene


def test_the_dataset_is_the_path() -> None:
    scene, batch = video(40), short_loop(40).render(30, 40)
    assert (scene.name, len(scene.frames)) == ("seed000001000", 40)
    assert torch.equal(scene.frames[37].image(), batch.images[0, 7])
    depth = scene.frames[37].depth()
    assert depth is not None
    assert torch.equal(depth, batch.depth[0, 7])
    assert torch.equal(scene.cam_from_world[30:].float(), batch.cam_from_world[0])


def test_an_exact_network_has_no_error(oracle: Oracle, tmp_path: Path) -> None:
    scene = video()
    found, ratios = predict_sequence(oracle, scene, Windows(16, 8), resize=False, out=tmp_path / "windows")
    assert ratios == (0.25, 0.5)
    assert list(tmp_path.iterdir()) == []
    scores = score_sequence(found, scene)
    assert scores.values["ate_percent"] < 0.1
    assert scores.values["open_ate_percent"] < 0.3
    assert scores.values["window_ate_percent"] < 1e-3  # windows are exact, joints are not quite
    assert scores.values["rotation_step_deg"] < 0.5
    assert scores.values["scale_step_percent"] < 1
    assert (scores.values["windows"], scores.values["pieces"], scores.values["cuts"]) == (5, 1, 0)
    assert scores.details is not None
    about = scores.details.about
    assert (about["window"], about["overlap"], about["pieces"]) == (16, 8, [[0, 47, 48]])
    assert [one["every"] for one in about["wide"] if one["used"]] == [4] * int(scores.values["wide_windows"])
    assert about["wide"][0]["first"] == 0
    assert [(row["start"], row["stop"]) for row in about["windows"]] == [(8 * i, 8 * i + 16) for i in range(5)]
    (path,) = scores.details.paths
    centres = torch.linalg.inv(scene.cam_from_world)[:, :3, 3]
    assert float((path - centres).norm(dim=-1).max()) < 0.05
    assert json.loads(json.dumps(about)) == about


def test_drift_of_windows_is_seen(oracle: Oracle, tmp_path: Path) -> None:
    """Windows whose ends are spread are bent by themselves, and that is no fault of the joints."""
    scene = video()
    exact, _ = predict_sequence(oracle, scene, Windows(16, 8), resize=False, out=tmp_path / "exact")
    oracle.drift = 0.1
    found, _ = predict_sequence(oracle, scene, Windows(16, 8), resize=False, out=tmp_path / "drifting")
    ours, before = score_sequence(found, scene).values, score_sequence(exact, scene).values
    assert ours["window_ate_percent"] > 10 * before["window_ate_percent"]
    assert ours["ate_percent"] > 5 * before["ate_percent"]
    against = score_sequence(found, scene, exact).values
    assert against["fidelity_ate_percent"] == pytest.approx(against["ate_percent"], rel=0.05)


def test_pieces_are_reported_and_not_glued(oracle: Oracle, tmp_path: Path) -> None:
    other = short_loop(48, seed=1001)
    oracle.videos = [oracle.videos[0], other.render(0, 20)]
    first, second = video(), video(48, 1001)
    renamed = tuple(replace(frame, name=f"b{frame.name}") for frame in second.frames[:20])
    both = replace(first, frames=(*first.frames[:20], *renamed))
    found, _ = predict_sequence(oracle, both, Windows(16), resize=False, out=tmp_path / "windows")
    scores = score_sequence(found, both)
    assert scores.details is not None
    assert scores.details.about["cuts"] == [20]
    assert scores.details.about["pieces"] == [[0, 19, 20], [20, 39, 20]]
    assert scores.values["pieces"] == 2
    assert scores.values["ate_percent"] < 0.2
    assert [len(path) for path in scores.details.paths] == [20, 20]
    in_turns = replace(
        found, owner=torch.arange(40) % 2 * (len(found.parts) - 1)
    )  # no two frames of a piece follow each other
    assert not {"rpe_rotation_deg", "rpe_translation"} & score_sequence(in_turns, both).values.keys()


def test_a_trajectory_comes_back_from_disk_as_it_was(oracle: Oracle, tmp_path: Path) -> None:
    scene = video(20)
    found, ratios = predict_sequence(oracle, scene, Windows(8), resize=False, out=tmp_path / "windows")
    store = Store(tmp_path / "run", {})
    store.unfinished("a/b").mkdir(parents=True)
    store.write("a/b", Prediction(found, tuple(frame.name for frame in scene.frames), [], *ratios))
    assert not store.unfinished("a/b").exists()
    back = store.read("a/b")
    assert (back.effective_ratio, back.effective_key_ratio) == ratios
    assert vars(back.geometry).keys() == vars(found).keys()
    for name, tensor in vars(found).items():
        assert torch.equal(getattr(back.geometry, name), tensor)
        assert getattr(back.geometry, name).dtype == tensor.dtype


def test_a_run_that_goes_on_knows_what_was_merged(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, out = video(40), tmp_path / "windows"
    stops = oracle.register_forward_pre_hook(lambda *_: stop() if oracle.forwards == 2 else None)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_sequence(oracle, scene, Windows(16), resize=False, out=out)
    stops.remove()
    monkeypatch.setattr(sequences, "effective_ratio", lambda model: 0.75)
    forwards = oracle.forwards
    found, ratios = predict_sequence(oracle, scene, Windows(16), resize=False, out=out)
    assert ratios == (0.25, 0.5)  # of the first window, which an earlier run predicted
    assert oracle.forwards - forwards == len(found.parts[:, 0].unique()) - 2 + len(found.wide) + len(found.loops)
    whole, _ = predict_sequence(oracle, scene, Windows(16), resize=False, out=tmp_path / "whole")
    assert all(torch.equal(getattr(whole, name), tensor) for name, tensor in vars(found).items())


def other_machine(predictor: Predictor) -> None:
    predictor.made_by["threads"] += 1


def other_lengths(predictor: Predictor) -> None:
    assert predictor.auto is not None
    predictor.auto.keep(Lengths(12, 6))


@pytest.mark.parametrize(("change", "known"), [(lambda predictor: None, 1), (other_machine, 0), (other_lengths, 0)])
def test_windows_of_another_machine_or_length_are_not_taken(
    change: Any, known: int, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "build", lambda job: oracle)
    auto = AutoLengths(tmp_path / "lengths.json", "dense")
    auto.keep(Lengths(16, 8))
    windows = Windows(wide=False, loops=False)
    predictor, scene = Predictor(Job("vggt-mini", resize=False, windows=windows), auto), video()
    write, made = windows_store.Store.write, []

    def stopping(self: Any, name: str, window: Any) -> None:
        write(self, name, window)
        made.append(name)
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(windows_store.Store, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        predictor(scene, tmp_path / "windows")
    change(predictor)
    found = predictor(scene, tmp_path / "windows").geometry
    assert isinstance(found, Trajectory)
    assert len(made) - 1 == len(found.parts[:, 0].unique()) - known


def test_auto_is_one_length_for_a_run(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory is another for every sequence; one is shorter than the windows."""
    monkeypatch.setattr(Job, "build", lambda job: oracle)
    monkeypatch.setattr("geoaccel.memory.estimate_bytes", lambda model, frames, size, **how: frames)
    job = Job("vggt-mini", resize=False, windows=Windows(wide=False, loops=False))
    plan = Plan(job, Source("long_paths", frames=48), Protocol(), tmp_path, fidelity=True)
    assert "as many frames as fit, a half" in plan.scored
    own, dense = plan.store(), plan.reference()
    found = []
    for store, free, frames in ((dense, 20, 40), (own, 50, 48), (own, 30, 12)):
        assert store is not None
        monkeypatch.setattr(predict, "free_bytes", lambda device, free=free: free)
        trajectory = Predictor(job, store.auto)(video(frames), store.unfinished(f"{frames}")).geometry
        assert isinstance(trajectory, Trajectory)
        found.append(trajectory.lengths.tolist())
    assert found == [[16, 8]] * 3
    assert capsys.readouterr().err.count("windows=auto: 16 frames, 8 shared, for all sequences") == 1
    assert "as many frames as fit (16), a half" in plan.scored
    auto = plan.auto()
    assert auto is not None
    assert replace(auto, of="another configuration").read() is None


def test_trajectories_in_windows_of_other_lengths_are_not_compared(oracle: Oracle, tmp_path: Path) -> None:
    scene = video(20)
    first, second = (
        predict_sequence(oracle, scene, Windows(n, wide=False, loops=False), resize=False, out=tmp_path / "windows")[0]
        for n in (8, 10)
    )
    with pytest.raises(UserError, match=r"windows of 8 frames, 4 shared, cannot be compared .* of 10 frames, 5 shared"):
        score_sequence(first, scene, second)


def test_rendered_frames_are_told_apart_without_being_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [
        DATASETS["long_paths"](None, seeds=[1000], num_frames=4, size=(28, 28), path=path)
        for path in ("loop", "loop", "corridor")
    ]
    pictures = [[picture_of(frame) for frame in scene.frames] for (scene,) in scenes]
    with monkeypatch.context() as patch:
        patch.setattr(RenderedPicture, "read", None)
        first, again, other = map(identity.of_pictures, pictures)
    assert first == again != other
    # What a test or a user renders in a way of their own counts by its pixels.
    grey = [replace(video(4).frames[0], read_image=lambda v=value: torch.full((3, 28, 28), v)) for value in (0.0, 0.5)]
    dark, light = (identity.of_pictures([picture_of(frame)]) for frame in grey)
    assert dark != light


def test_totals_are_means_and_kittis_over_all_subsequences() -> None:
    def scores(count: float, drift: float, ate: float) -> SceneScores:
        kitti = {"kitti_subsequences": count, "kitti_translation_percent": drift, "kitti_rotation_deg_per_m": 0.0}
        return SceneScores(
            "x", None, 3, PairErrors(torch.empty(0), torch.empty(0)), {"ate_percent": ate} | (kitti if count else {})
        )

    found = sequence_totals([scores(30, 2.0, 1.0), scores(10, 6.0, 3.0), scores(0, 0.0, 5.0)])
    assert found["ate_percent"] == 3.0
    assert found["kitti_translation_percent"] == 3.0
    assert found["kitti_subsequences"] == 40


def test_pixels_that_the_network_would_not_see_as_they_are_are_refused(oracle: Oracle, tmp_path: Path) -> None:
    (scene,) = DATASETS["long_paths"](None, seeds=[1000], num_frames=10, size=(28, 38))
    with pytest.raises(UserError, match=r"would see 38 x 28 pixels .*data\.resize=true|multiple of the patch size"):
        predict_sequence(oracle, scene, Windows(8), resize=False, out=tmp_path / "windows")


def test_sequences_shorter_than_their_windows_are_skipped(tmp_path: Path) -> None:
    source = Given(lambda: [video(10), replace(video(20), name="long")])
    plan = Plan(Job("vggt-mini", windows=Windows(12)), source, Protocol(), tmp_path)  # type: ignore[arg-type]
    assert [scene.name for scene in plan.scenes()] == ["long"]
    assert [str(one) for one in source.skipped] == [
        "seed000001000: windows=12 is longer than the sequence of 10 frames; give at most 10"
    ]


def test_what_does_not_fit_at_once_is_known_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    room, scene = Room(Job("vggt-mini", resize=False)), video(40)
    assert next(room.outline.parameters()).is_meta
    assert room.why_not(scene) is None
    monkeypatch.setattr("geoaccel.eval.run.room.free_bytes", lambda device: 2**25)
    why = room.why_not(scene)
    assert why is not None
    assert "40 frames of 28 x 28 pixels need about" in why
    assert "windows=auto takes them part by part" in why
