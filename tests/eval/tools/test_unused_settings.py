"""A setting that would change nothing is refused, and so is an option of a kind that its reader cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from geoaccel.errors import UserError
from geoaccel.eval.data.registry import check_options
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.settings import compose_settings
from geoaccel.eval.tools.command import make_plan


def planned(command: str) -> Any:
    name, *overrides = command.split()
    return make_plan(name, compose_settings(name, overrides))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval data=scannet data.root=x points=head", "points=head: fastvggt-scannet scores depth; use points=depth"),
        ("eval data=kitti_odometry data.root=x points=head", "points=head: no points are scored"),
        (
            "eval data=folder data.root=x data.stride=9",
            "data.stride=9 is not for data.rule=evenly; use data.rule=stri",
        ),
        ("eval data.stride=2", "data.stride=2 is not for rendered scenes; leave it out"),
        ("eval data.rule=stride data.stride=2", "data.stride=2 is not for rendered scenes; leave it out"),
        ("eval data=co3d_vggt data.root=x data.stride=2", "data.stride=2 is not for replay; leave it out"),
        (
            "eval data=folder data.root=x data.rule=stride data.stride=3 data.frame_list=a.json",
            "data.stride=3 is not for data.frame_list; leave it out",
        ),
        ("eval data.seed=3", "data.seed=3 does not choose scenes; use data.options.seeds"),
        ("eval data.options.num_frames=5", "data.options.num_frames is not an option of the reader; use data.frames"),
        ("eval data.options.root=x", "data.options.root is not an option of the reader; use data.root"),
        ("eval data.options.scenes=[a]", "data.options.scenes is not an option of the reader; use data.scenes"),
        ("eval data.options.sizes=3", "unknown data option 'sizes'; known: seeds, size"),
        ("eval data=scannet data.root=x data.options.fifty=no", "data.options.fifty=no: give true or false"),
        ("eval data=seven_scenes data.root=x data.options.split=[test]", "split=['test']: give one name"),
        ("eval data=long_paths data.options.path=[loop]", "data.options.path=['loop']: give one name"),
        ("eval data=co3d_vggt data.root=x data.options.annotations=[1]", "annotations=[1]: give one file or folder"),
        ("eval ratio=0.5 layers={0:httm}", "ratio=0.5 is only for merging=NAME, and layers has its own knobs; omit it"),
        ("eval ratio=0.5 plan=x.yaml", "ratio=0.5 is only for merging=NAME, and plan has its own knobs; omit it"),
        ("eval ray.actors=3", "ray.actors=3 is only for engine=ray; add that, or leave it out"),
        ("bench merge3d.ratios=[0.2]", "merge3d.ratios=[0.2] is only for suite=merge3d; add that, or leave it out"),
        ("bench suite=merge3d model=pi3-mini", "model=pi3-mini is only for suite=speed; suite=merge3d has its own"),
        ("bench suite=merge3d methods=[httm]", "methods=['httm'] is only for suite=speed"),
        ("bench suite=merge3d knobs.httm.anchor=false", "is only for suite=speed"),
        ("bench suite=merge3d ratio=0.5", "ratio=0.5 is only for suite=speed"),
        ("bench suite=merge3d layers=saf3r", "layers=saf3r is only for suite=speed"),
        ("bench suite=merge3d attention=matmul", "attention=matmul is only for suite=speed"),
        ("bench suite=merge3d heads=[depth]", "heads=['depth'] is only for suite=speed"),
    ],
)
def test_what_would_change_nothing_is_refused(command: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(command)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "rule", "stride", "is_whole"),
    [
        ("data=kitti_odometry", "all", 1, True),
        ("data=kitti_odometry data.stride=2", "stride", 2, True),
        ("data=kitti_odometry data.frames=100 data.stride=2", "stride", 2, False),
        ("data=seven_scenes", "stride", 40, False),
        ("data=seven_scenes data.stride=20", "stride", 20, False),
        ("data=seven_scenes data.frames=all", "all", 1, True),
        ("data=seven_scenes data.frames=all data.stride=7", "stride", 7, True),
        ("data=seven_scenes data.rule=evenly data.frames=9", "evenly", 1, False),
        ("data=folder data.frames=all data.stride=3", "stride", 3, False),
    ],
)
def test_strides(settings: str, rule: str, stride: int, is_whole: bool) -> None:
    source = planned(f"eval data.root=x {settings}").source
    assert (source.rule, source.stride, source.is_whole) == (rule, stride, is_whole)
    assert len(source._choice().indices("a", 400)) == len(range(0, 400, stride)[: source.frames])


def test_a_ratio_is_for_the_layers_that_layers_leaves() -> None:
    job = planned("eval merging=httm layers={0-1:frame-only} ratio=0.5").job
    assert job.merging["httm"]["ratio"] == 0.5


def test_kinds_of_options_of_other_readers() -> None:
    def read(
        a: int | str = 0, b: str | list[str] = "", c: float | str = 0.0, d: bool | None = None, e: str | None = None
    ) -> Iterator[EvalScene]:
        raise NotImplementedError

    check_options(read, {"a": 3, "b": ["x"], "c": 0.5, "d": True, "e": "x"})
    check_options(read, {"a": "x", "b": "y", "c": "z", "d": None, "e": None})
    for given in ({"d": "no"}, {"e": 3}):
        with pytest.raises(UserError, match=r"^data.options\.[de]=(no|3): give "):
            check_options(read, given)


def test_a_folder_may_be_called_2024() -> None:
    assert planned("eval data=co3d_vggt data.root=x data.options.annotations=2024").source.options == {
        "annotations": 2024
    }
