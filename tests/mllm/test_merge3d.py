"""Merge3D's plan against hand-made cases, against brute force, and on bad input."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from merge3d_tokens import FUSED, GEO, SCORES, SEM, random_tokens
from torch import Tensor

from geoaccel.mllm import Merge3DConfig, plan_merge
from geoaccel.mllm.joint import Stream, best_partner

ONLY_2D, ONLY_3D = {"tau_geo": math.inf}, {"tau_sem": math.inf}


def brute_force(scores: Tensor, sem: Tensor, geo: Tensor, config: Merge3DConfig) -> tuple[Tensor, Tensor]:
    """Kept tokens, and the kept token of every token, in float64 and all at once."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    keep = torch.tensor(sorted(order[: config.kept(len(scores))]))
    total: Any = 0
    for x, tau in ((sem.double(), config.tau_sem), (geo.double(), config.tau_geo)):
        if config.metric == "cosine":
            x = x / x.norm(dim=-1, keepdim=True)
        total = total + x @ x[keep].T / tau
    owner = keep[total.argmax(dim=-1)]
    owner[keep] = keep
    return keep, owner


@pytest.mark.parametrize(
    ("knobs", "owners", "add_mean", "mean"),
    [
        ({}, [0, 0, 3, 3, 3, 0], [(3, 30), (6, 60)], [(2, 20), (3, 30)]),
        (ONLY_2D, [0, 0, 3, 3, 0, 3], [(2.5, 25), (6.5, 65)], [(5 / 3, 50 / 3), (10 / 3, 100 / 3)]),
        (ONLY_3D, [0, 3, 0, 3, 3, 0], [(3.5, 35), (5.5, 55)], [(7 / 3, 70 / 3), (8 / 3, 80 / 3)]),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_golden_case(knobs: Any, owners: list[int], add_mean: Any, mean: Any, metric: Any) -> None:
    plan = plan_merge(SCORES, SEM, GEO, Merge3DConfig(num_tokens=2, metric=metric, **knobs))
    assert plan.keep.tolist() == [0, 3]
    assert plan.keep[plan.owner].tolist() == owners
    assert plan.assign is plan.owner
    assert plan.count.tolist() == [2, 2]
    torch.testing.assert_close(plan.apply(FUSED), torch.tensor(add_mean, dtype=torch.float32))
    torch.testing.assert_close(plan.apply(FUSED, "mean"), torch.tensor(mean, dtype=torch.float32))
    assert plan.apply(FUSED, "drop").equal(FUSED[[0, 3]])


def test_gather_keeps_the_position_triple_of_the_slot() -> None:
    """Two images of three tokens between text, the first token of each stays."""
    positions = [0, 1, 2, (3, 3, 3), (3, 3, 4), (3, 3, 5), 6, 7, (8, 8, 8), (8, 8, 9), (8, 8, 10), 11, 12, 13]
    triples = torch.tensor([(p, p, p) if isinstance(p, int) else p for p in positions])
    visual = torch.tensor([3, 4, 5, 8, 9, 10])
    plan = plan_merge(
        torch.tensor([1.0, 0, 0, 1, 0, 0]),
        SEM,
        GEO,
        Merge3DConfig(num_tokens=1, scope="frame"),
        frame_of=torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    stays = torch.ones(14, dtype=torch.bool)
    stays[visual] = False
    stays[plan.gather(visual)] = True
    wanted = [0, 1, 2, (3, 3, 3), 6, 7, (8, 8, 8), 11, 12, 13]
    assert triples[stays].tolist() == [list((p, p, p) if isinstance(p, int) else p) for p in wanted]
    assert int(triples.max()) + 1 - int(stays.sum()) == 4


def test_a_ratio_of_one_changes_nothing() -> None:
    scores, sem, geo = random_tokens(40)
    plan = plan_merge(scores, sem, geo, Merge3DConfig(ratio=1.0))
    for reduce in ("add_mean", "mean", "weighted", "drop"):
        assert plan.apply(sem, reduce).equal(sem)  # type: ignore[arg-type]
    assert plan.keep.equal(torch.arange(40))
    assert plan.effective_ratio == 0


@pytest.mark.parametrize(("ratio", "kept"), [(0.3, 453), (0.1, 151), (0.05, 75), (1.0, 1512), (0.0001, 1)])
def test_budget_of_six_frames(ratio: float, kept: int) -> None:
    assert Merge3DConfig(ratio=ratio).kept(1512) == kept
    scores, sem, geo = random_tokens(1512, 4, 4)
    plan = plan_merge(scores, sem, geo, Merge3DConfig(ratio=ratio))
    assert (plan.num_kept, plan.num_tokens, plan.lengths, plan.source_lengths) == (kept, 1512, (kept,), (1512,))
    assert plan.effective_ratio == 1 - kept / 1512


def test_scores_count_to_their_last_digit() -> None:
    scores = torch.tensor([0.5, 0.5 + 1e-12, 0.1], dtype=torch.float64)
    assert plan_merge(scores, SEM[:3], GEO[:3], Merge3DConfig(num_tokens=1)).keep.tolist() == [1]


def test_the_share_is_exact_as_written() -> None:
    assert int(0.29 * 100) == 28
    for number in (float, np.float64, np.float32):
        config = Merge3DConfig(ratio=number("0.29"))
        assert config.kept(100) == 29
        assert type(config.ratio) is float
    assert Merge3DConfig(ratio=1).kept(7) == 7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("knobs", [{}, {"tau_sem": 0.07, "tau_geo": 0.3}, {"metric": "dot"}, {"chunk": 7}])
def test_equals_brute_force(seed: int, knobs: Any) -> None:
    tokens = random_tokens(300, seed=seed)
    config = Merge3DConfig(ratio=0.2, **knobs)
    plan = plan_merge(*tokens, config)
    keep, owner = brute_force(*tokens, config)
    assert plan.keep.equal(keep)
    assert plan.keep[plan.owner].equal(owner)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1512, 4032, 6048])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_equals_brute_force_on_a_clip(n: int, metric: Any) -> None:
    tokens = random_tokens(n, 64, 64, seed=n)
    config = Merge3DConfig(metric=metric)
    plan = plan_merge(*tokens, config)
    keep, owner = brute_force(*tokens, config)
    assert plan.keep.equal(keep)
    assert plan.keep[plan.owner].equal(owner)


def test_what_float32_cannot_tell_apart_is_decided_in_float64() -> None:
    """The better of two candidates is so by 1e-9, against the order of indices."""
    sem = torch.eye(4, dtype=torch.float64)[[0, 0, 1]]
    sem[0, 1], sem[1, 1] = 0.5, 0.5 + 1e-9
    scores = torch.tensor([1.0, 1.0, 0.0])
    assert sem[0].float().equal(sem[1].float())
    plan = plan_merge(scores, sem, config=Merge3DConfig(num_tokens=2, **ONLY_2D))
    assert plan.owner.tolist() == [0, 1, 1]


def test_narrow_products_do_not_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as coarse as bfloat16's, and the setting that says so: only close rows are computed again."""
    tokens = random_tokens(300)
    plan = plan_merge(*tokens)
    inner = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor,
        "addmm_",
        lambda x, a, b: inner(x, a, b) if a.dtype == torch.float64 else inner(x, a.bfloat16().float(), b).mul_(1.001),
    )
    assert not plan_merge(*tokens).owner.equal(plan.owner)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert plan_merge(*tokens).owner.equal(plan.owner)

    def no_answer() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", no_answer)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="bf16"), raising=False)
    assert plan_merge(*tokens).owner.equal(plan.owner)


def test_ties_go_to_the_lower_index() -> None:
    alike = torch.ones(9, 3)
    plan = plan_merge(torch.ones(9), alike, alike, Merge3DConfig(num_tokens=4))
    assert plan.keep.tolist() == [0, 1, 2, 3]
    assert plan.owner.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0]
    scores, sem, geo = random_tokens(200, 96, 96)
    twice = [torch.cat([x, x]) for x in (scores, sem, geo)]  # every candidate exists twice, far apart
    plan = plan_merge(*twice, Merge3DConfig(ratio=0.5))
    away = torch.ones(400, dtype=torch.bool)
    away[plan.keep] = False
    assert bool((plan.keep[plan.owner[away]] < 200).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_the_plan_of_their_copies(dtype: torch.dtype) -> None:
    narrow = [x.to(dtype) for x in random_tokens(600)]
    plan, copy = plan_merge(*narrow), plan_merge(*(x.float() for x in narrow))
    assert plan.keep.equal(copy.keep)
    assert plan.owner.equal(copy.owner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plan_merge(*narrow).owner.equal(copy.owner)


def test_planted_clusters() -> None:
    """Two groups alike in one stream and apart in the other: only the joint score tells all four apart."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(4).repeat_interleave(20)
    look, place = torch.eye(8)[group // 2], torch.eye(8)[group % 2 + 4]
    sem = look + 0.05 * torch.randn(80, 8, generator=generator)
    geo = place + 0.05 * torch.randn(80, 8, generator=generator)
    scores = torch.zeros(80)
    scores[::20] = 1
    found = {}
    for name, knobs in (("joint", {}), ("2d", ONLY_2D), ("3d", ONLY_3D)):
        plan = plan_merge(scores, sem, geo, Merge3DConfig(num_tokens=4, **knobs))
        found[name] = plan.owner
    assert found["joint"].equal(group)
    assert (found["2d"] // 2).equal(group // 2)
    assert not found["2d"].equal(group)
    assert (found["3d"] % 2).equal(group % 2)
    assert not found["3d"].equal(group)


def test_frames_permuted() -> None:
    frames, per_frame = 5, 30
    scores, sem, geo = random_tokens(frames * per_frame)
    order = torch.tensor([3, 0, 4, 1, 2])
    tokens = (order[:, None] * per_frame + torch.arange(per_frame)).flatten()
    frame_of = torch.arange(frames).repeat_interleave(per_frame)
    config = Merge3DConfig(min_per_frame=2)
    plan = plan_merge(scores, sem, geo, config, frame_of=frame_of)
    other = plan_merge(scores[tokens], sem[tokens], geo[tokens], config, frame_of=frame_of)
    assert tokens[other.keep].sort().values.equal(plan.keep)
    represents = torch.empty(150, dtype=torch.int64)
    represents[tokens] = tokens[other.keep[other.owner]]
    assert represents.equal(plan.keep[plan.owner])


def test_samples_never_mix() -> None:
    scores, sem, geo = random_tokens(170)
    edges = torch.tensor([0, 100, 100, 170])
    plan = plan_merge(scores, sem, geo, cu_seqlens=edges)
    assert plan.lengths == (30, 0, 21)
    assert plan.source_lengths == (100, 0, 70)
    assert plan.cu_seqlens.tolist() == [0, 30, 30, 51]
    alone = [plan_merge(scores[part], sem[part], geo[part]) for part in (slice(0, 100), slice(100, 170))]
    assert plan.keep.equal(torch.cat([alone[0].keep, alone[1].keep + 100]))
    assert plan.owner.equal(torch.cat([alone[0].owner, alone[1].owner + 30]))
    assert plan.apply(sem, "weighted").equal(
        torch.cat([alone[0].apply(sem[:100], "weighted"), alone[1].apply(sem[100:], "weighted")])
    )


def test_budget_of_each_frame_and_the_least_number() -> None:
    scores, sem, geo = random_tokens(100)
    scores[50:] -= 5
    frame_of = torch.arange(100) // 50
    clip = plan_merge(scores, sem, geo, Merge3DConfig(ratio=0.2), frame_of=frame_of)
    assert (frame_of[clip.keep] == 0).all()
    least = plan_merge(scores, sem, geo, Merge3DConfig(ratio=0.2, min_per_frame=3), frame_of=frame_of)
    assert torch.bincount(frame_of[least.keep]).tolist() == [17, 3]
    assert least.keep[-3:].equal((scores[50:].topk(3).indices + 50).sort().values)
    each = plan_merge(scores, sem, geo, Merge3DConfig(ratio=0.2, scope="frame"), frame_of=frame_of)
    assert torch.bincount(frame_of[each.keep]).tolist() == [10, 10]
    within = Merge3DConfig(ratio=0.2, scope="frame", allow_cross_frame=False)
    plan = plan_merge(scores, sem, geo, within, frame_of=frame_of)
    assert frame_of[plan.keep[plan.owner]].equal(frame_of)
    assert not frame_of[each.keep[each.owner]].equal(frame_of)


@pytest.mark.parametrize("gate", ["radius", "voxel"])
def test_gate(gate: Any) -> None:
    """The twin in looks stands far off: a gate gives the token to its neighbour, and a lone one to the nearest."""
    xyz = torch.tensor([(0.1, 0, 0), (5.1, 0, 0), (0.2, 0, 0), (0.3, 0, 0), (9.1, 0, 0)])
    sem = torch.tensor([(1.0, 0), (0, 1), (0, 1), (1, 0.1), (1, 0)])
    scores = torch.tensor([1.0, 1, 0, 0, 0])
    free = plan_merge(scores, sem, sem, Merge3DConfig(num_tokens=2))
    assert free.owner.tolist() == [0, 1, 1, 0, 0]
    config = Merge3DConfig(num_tokens=2, gate=gate, gate_size=1.0)
    for chunk in (4096, 1):
        gated = plan_merge(scores, sem, sem, Merge3DConfig(**{**vars(config), "chunk": chunk}), xyz=xyz)
        assert gated.owner.tolist() == [0, 1, 0, 0, 1]


def test_without_geometry_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="tau_geo=inf"):
        plan = plan_merge(SCORES, SEM, None, Merge3DConfig(num_tokens=2))
    assert plan.keep[plan.owner].tolist() == [0, 0, 3, 3, 0, 3]


@pytest.mark.parametrize("chunk", [16, 64, 1024])
def test_memory_is_linear_in_the_chunk(chunk: int) -> None:
    """The largest tensor made while matching has ``chunk`` rows or one row a candidate, never one a token."""
    _, sem, geo = random_tokens(2000, 8, 8)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    target = torch.arange(0, 2000, 10)
    with Sizes():
        best_partner(
            [Stream(sem, 1.0), Stream(geo, 1.0)], torch.arange(1, 2000, 2), target, metric="cosine", chunk=chunk
        )
    assert max(sizes) <= max(min(chunk, 1000) * 200, 2000 * 8)


@pytest.mark.slow
def test_sixteen_frames_in_time() -> None:
    """4032 tokens of width 2048 in both streams. Processor time, which a busy machine does not stretch much: half a
    second on two cores is one second of it."""
    scores, sem, geo = random_tokens(4032, 2048, 2048)
    plan_merge(scores, sem, geo).apply(sem)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        plan_merge(scores, sem, geo).apply(sem)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
