"""Overrides to settings, and settings to scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from geoaccel.eval.data.frames import write_frame_list
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.run.settings import combinations, compose_settings, methods_of, sweep
from geoaccel.eval.run.source import Source

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))


def test_every_data_set_has_a_preset() -> None:
    used = {compose_settings("eval", [f"data={name}"])["data"]["dataset"] for name in PRESETS}
    assert used == set(DATASETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_source(preset: str) -> None:
    data = compose_settings("eval", [f"data={preset}", "data.root=somewhere", "data.scenes=3"])["data"]
    data.pop("protocol"), data.pop("resize")
    source = Source(**data)
    assert source.root == "somewhere"
    assert len(source) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=sinthetic"], "Could not find 'data/sinthetic'.*co3d.*synthetic"),
        (["modle=vggt-mini"], "Could not override 'modle'.*--cfg"),
        (["model=a=b"], "mismatched input"),
        (["merging=htttm"], "Could not find 'merging/htttm'"),
        (
            ["merging=none", "merging.httm.query_keep=0.4"],
            "^merging.httm.query_keep is a knob of merging=httm, which is ",
        ),
        (["merging=[alike,come]", "merging.httm.query_keep=0.4"], "run the command with merging=httm, and again"),
        (["quantization=w4a16", "quantization.fp8.activations=false"], "^quantization.fp8.activations is a knob of "),
        (["merging=httm", "merging.httm.qurey_keep=0.4"], "Could not override 'merging.httm.qurey_keep'.*--cfg"),
        (["merging.httm.no_knob=0.4"], "Could not override 'merging.httm.no_knob'.*--cfg"),
        (["knobs.httm.query_keep=0.4"], "Could not override 'knobs.httm.query_keep'.*--cfg"),
        (["data.optoins.poses=color"], "Could not override 'data.optoins.poses'.*--cfg"),
        (["data.options.poses=color", "modle=vggt-mini"], "Could not override 'modle'.*--cfg"),
        (["data.options.poses=a=b"], "mismatched input"),
    ],
)
def test_a_wrong_override_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose_settings("eval", overrides)
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value)


def test_a_knob_is_a_knob_only_where_methods_are_a_setting() -> None:
    """A benchmark takes them as knobs.httm.query_keep."""
    with pytest.raises(ValueError, match="no such setting"):
        compose_settings("bench", ["merging.httm.query_keep=0.4"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_a_reader_can_be_given(preset: str) -> None:
    before = compose_settings("eval", [f"data={preset}"])["data"]
    options = ["data.options.poses=color", "data.options.subset=fewview_dev", "data.frame_list=x.json"]
    data = compose_settings("eval", [*options, f"data={preset}"])["data"]
    assert data["options"] == {**before["options"], "poses": "color", "subset": "fewview_dev"}
    assert (before["frame_list"], data["frame_list"]) == (None, "x.json")
    assert data["stride"] == before["stride"]


def test_options_are_replaced_swept_and_marked_as_ever() -> None:
    assert compose_settings("eval", ["data.options.size=[28,28]"])["data"]["options"] == {"size": [28, 28]}
    assert compose_settings("eval", ["data.options={seeds: [3]}"])["data"]["options"] == {
        "size": [224, 224],
        "seeds": [3],
    }
    assert compose_settings("eval", ["+data.options.seeds=[3]", "~data.options.size"])["data"]["options"] == {
        "seeds": [3]
    }
    swept = [compose_settings("bench", one)["knobs"] for one in combinations("bench", ["knobs.httm.ratio=0.3,0.6"])]
    assert swept == [{"httm": {"ratio": 0.3}}, {"httm": {"ratio": 0.6}}]


def test_a_stride_of_any_data_set_and_that_of_its_preset() -> None:
    assert compose_settings("eval", ["data=dtu"])["data"]["usual_stride"] == 5
    assert compose_settings("eval", ["data=folder", "data.rule=stride", "data.stride=3"])["data"]["stride"] == 3


def test_sweeps_are_every_combination_in_order() -> None:
    combinations = list(sweep(["ratio=0.3,0.6", "data=synthetic", "data.frames=range(8,25,8)"]))
    assert combinations[0] == ["ratio=0.3", "data=synthetic", "data.frames=8"]
    assert combinations[-1] == ["ratio=0.6", "data=synthetic", "data.frames=24"]
    assert len(combinations) == 6
    assert list(sweep(["data.scenes=[a,b]"])) == [["data.scenes=[a,b]"]]


def test_one_ratio_for_all_methods() -> None:
    assert methods_of({"a": {"ratio": 0.9, "x": 1}}, 0.5) == {"a": {"ratio": 0.5, "x": 1}}
    assert methods_of({"a": {"ratio": 0.9}}, None) == {"a": {"ratio": 0.9}}
    assert methods_of(None, 0.5) == {}


def test_synthetic_scenes_by_number_and_by_name() -> None:
    small = {"size": [28, 28]}
    first = [scene.name for scene in Source("synthetic", frames=2, scenes=3, options=small)()]
    assert first == ["seed000000000", "seed000000001", "seed000000002"]
    named = Source("synthetic", frames=2, scenes=["seed000000005"], options=small)
    assert [scene.name for scene in named()] == ["seed000000005"]
    assert [len(scene.frames) for scene in named()] == [2]
    assert len(Source("synthetic")) == 64


def test_a_frozen_list_decides_scenes_and_frames(tmp_path: Path) -> None:
    small = {"size": [28, 28]}
    scenes = list(Source("synthetic", frames=4, scenes=2, options=small)())
    write_frame_list(tmp_path / "list.json", [scenes[1].subset([2, 0])])
    frozen = Source("synthetic", frames=4, frame_list=str(tmp_path / "list.json"), options={**small, "seeds": [0, 1]})
    (scene,) = frozen()
    assert scene.name == "seed000000001"
    assert [frame.name for frame in scene.frames] == ["frame000002", "frame000000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "synthetik"}, "unknown dataset 'synthetik'.*Did you mean 'synthetic'"),
        ({"dataset": "synthetic", "rule": "evenley"}, "unknown frame rule 'evenley'.*Did you mean 'evenly'"),
        ({"dataset": "folder"}, "data.root is not set"),
        ({"dataset": "folder", "root": ".", "rule": "replay"}, "use it with data=co3d_vggt"),
        ({"dataset": "synthetic", "scenes": 0}, "at least 1"),
    ],
)
def test_wrong_sources_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**options)
