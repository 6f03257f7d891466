"""What Merge3D refuses, in one line each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merge3d_tokens import FUSED, GEO, SCORES, SEM

from geoaccel.mllm import BASELINES, Merge3DConfig, TokenPlan, plan_merge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sem": SEM[:5]}, r"sem must be \[6, C\], one row for each of 6 scores, got \[5, 2\]"),
        ({"geo": GEO[:, 0]}, r"geo must be \[6, C\].*got \[6\]"),
        ({"scores": SCORES[None]}, "scores must be"),
        ({"scores": SCORES.clone().fill_(math.nan)}, "scores contains NaN, first at token 0"),
        ({"sem": torch.where(torch.arange(6)[:, None] == 4, math.inf, SEM)}, "sem contains NaN or infinity.*token 4"),
        ({"xyz": torch.zeros(6, 2)}, r"xyz must be \[6, 3\].*got \[6, 2\]"),
        ({"frame_of": torch.zeros(5, dtype=torch.int64)}, "frame_of must be"),
        ({"config": {"num_tokens": 7}}, "num_tokens=7 is more than the 6 tokens; give fewer"),
        ({"config": {"num_tokens": 4}, "cu_seqlens": torch.tensor([0, 3, 6])}, "num_tokens=4 is more .* 3"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must ascend from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, "cu_seqlens must ascend"),
        ({"config": {"scope": "frame"}}, "need frame_of"),
        ({"config": {"min_per_frame": 2}, "frame_of": torch.arange(6) // 2}, "min_per_frame=2 over 3 frames needs 6"),
        ({"config": {"gate": "radius", "gate_size": 1.0}}, "gate='radius' needs xyz"),
        ({"config": {"tau_sem": math.inf}, "geo": None}, "geo, the geometry features, is missing"),
        ({"config": {"scope": "frame", "allow_cross_frame": False}}, "need frame_of"),
        ({"scores": SCORES[:0], "sem": SEM[:0], "geo": GEO[:0]}, "no visual tokens"),
    ],
)
def test_bad_input_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    given = {"scores": SCORES, "sem": SEM, "geo": GEO, **changes}
    given["config"] = Merge3DConfig(**given.get("config", {}))
    with pytest.raises(ValueError, match=message) as error:
        plan_merge(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": SCORES.numpy()}, "scores must be a tensor, got a ndarray; convert it with torch.as_tensor"),
        ({"geo": GEO.numpy()}, "geo must be a tensor, got a ndarray"),
        ({"geo": Merge3DConfig()}, "geo must be a tensor, got a Merge3DConfig"),  # without a name, one place too early
        ({"geo": GEO.long()}, r"geo must be floating point, got torch.int64; convert it with .float\(\)"),
        ({"sem": SEM.to(torch.uint8)}, "sem must be floating point, got torch.uint8"),
        ({"config": "merge3d"}, r"config='merge3d': give knobs, as Merge3DConfig\(ratio=0.3\)"),
        ({"config": Merge3DConfig}, r"config=<class .*Merge3DConfig'>: give knobs"),
    ],
)
def test_what_is_no_stream_or_no_knobs_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        plan_merge(**{"scores": SCORES, "sem": SEM, "geo": GEO, **changes})
    assert "\n" not in str(error.value)


def test_what_is_missing_has_the_name_of_whoever_calls() -> None:
    """Hosts take geometry; only plan_merge and the baselines have an argument geo."""
    with pytest.warns(UserWarning, match=r"pass geo \(of a host: geometry\)"):
        plan_merge(SCORES, SEM, None)
    for config in (Merge3DConfig(tau_sem=math.inf), Merge3DConfig(gate="radius", gate_size=1.0, tau_geo=math.inf)):
        with pytest.raises(ValueError, match=r"; a host takes both as geometry=geometry_features"):
            plan_merge(SCORES, SEM, None, config)
    with pytest.raises(ValueError, match=r"^voxel needs xyz, .*; a host takes both as geometry="):
        BASELINES["voxel"]().plan(SCORES, SEM)


def test_an_infinite_score_is_a_wish() -> None:
    scores = torch.where(torch.arange(6) == 5, math.inf, SCORES)
    assert plan_merge(scores, SEM, GEO, Merge3DConfig(num_tokens=1)).keep.tolist() == [5]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratio": 0}, "ratio=0 is not in"),
        ({"ratio": 1.2}, "ratio=1.2 is not in"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"num_tokens": 2.5}, "num_tokens=2.5"),
        ({"ratio": 0.5, "num_tokens": 4}, "ratio=0.5 and num_tokens=4 contradict each other; give one"),
        ({"scope": "video"}, "scope='video'; known: clip, frame"),
        ({"min_per_frame": -1}, "min_per_frame=-1"),
        ({"metric": "l2"}, "metric='l2'; known: cosine, dot"),
        ({"reduce": "sum"}, "reduce='sum'; known: add_mean"),
        ({"tau_sem": 0}, "tau_sem=0 must be positive"),
        ({"allow_cross_frame": "no"}, "allow_cross_frame='no' must be true or false"),
        ({"tau_geo": math.nan}, "tau_geo=nan must be positive"),
        ({"tau_sem": math.inf, "tau_geo": math.inf}, "nothing is left"),
        ({"gate": "ball", "gate_size": 1}, "gate='ball'; known: radius, voxel"),
        ({"gate": "radius"}, "give a positive size"),
        ({"gate_size": 1.0}, "give a positive size"),
        ({"allow_cross_frame": False}, "a frame may keep no token"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merge3DConfig(**knobs)


def test_a_plan_refuses_what_does_not_fit() -> None:
    plan = plan_merge(SCORES, SEM, GEO)
    with pytest.raises(ValueError, match=r"this plan takes \[6, ...\], got \[5, 2\]"):
        plan.apply(FUSED[:5])
    with pytest.raises(ValueError, match="this plan takes"):
        plan.gather(FUSED[0])
    for longer in (torch.cat([FUSED, FUSED[:1]]), FUSED.repeat(2, 1)):  # an index would find its rows in them
        for change in (plan.apply, plan.gather):
            with pytest.raises(ValueError, match=rf"this plan takes \[6, ...\], got \[{len(longer)}, 2\]"):
                change(longer)
    with pytest.raises(ValueError, match="reduce='max'; known"):
        plan.apply(FUSED, "max")  # type: ignore[arg-type]
    bare = TokenPlan(plan.keep, plan.owner, plan.lengths, plan.source_lengths)
    with pytest.raises(ValueError, match="lacks; use 'mean'"):
        bare.apply(FUSED, "weighted")
    with pytest.raises(ValueError, match="lengths that sum"):
        TokenPlan(plan.keep, plan.owner, (2,), (6,))
