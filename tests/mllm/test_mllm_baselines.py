"""The baselines: each does what its paper says, all answer with the same plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from geoaccel.mllm.baselines import BASELINES, RandomChoice, ToMe, VisionZip2D, VisionZip3D, VoxelPooling

METHODS = sorted(BASELINES)


def random_tokens(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.rand(n, generator=generator),
        "sem": torch.randn(n, 16, generator=generator),
        "geo": torch.randn(n, 12, generator=generator),
        "xyz": torch.randn(n, 3, generator=generator),
    }


def test_which_there_are() -> None:
    assert METHODS == ["divprune", "random", "tome", "visionzip-2d", "visionzip-3d", "voxel"]
    with pytest.raises(ValueError, match=r"unknown baseline 'divprun'.*Did you mean 'divprune'"):
        BASELINES["divprun"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [1, 2, 37, 100])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 1.0])
def test_a_plan_like_any_other(name: str, n: int, ratio: float) -> None:
    tokens = random_tokens(n)
    plan = BASELINES[name](ratio=ratio).plan(**tokens)
    kept = max(1, int(ratio * n + 1e-9))
    assert plan.lengths == (kept,)
    assert plan.keep.equal(plan.keep.unique())
    assert plan.owner[plan.keep].equal(torch.arange(kept))
    assert int(plan.owner.min()) >= (-1 if plan.reduce == "drop" or kept == 1 else 0)
    assert int(plan.count.sum()) == int((plan.owner >= 0).sum()) - kept
    assert plan.apply(tokens["sem"]).shape == (kept, 16)
    if ratio == 1:
        torch.testing.assert_close(plan.apply(tokens["sem"]), tokens["sem"])


@pytest.mark.parametrize("name", METHODS)
def test_samples_never_mix(name: str) -> None:
    tokens = random_tokens(90)
    method = BASELINES[name](ratio=0.25)
    plan = method.plan(**tokens, cu_seqlens=torch.tensor([0, 50, 50, 90]))
    first, second = (method.plan(**{k: v[part] for k, v in tokens.items()}) for part in (slice(50), slice(50, 90)))
    assert plan.lengths == (first.num_kept, 0, second.num_kept)
    assert plan.keep.equal(torch.cat([first.keep, second.keep + 50]))
    shifted = torch.where(second.owner < 0, -1, second.owner + first.num_kept)
    assert plan.owner.equal(torch.cat([first.owner, shifted]))


@pytest.mark.parametrize("name", METHODS)
def test_narrow_inputs_give_the_plan_of_their_copies(name: str) -> None:
    tokens = {k: v.bfloat16() for k, v in random_tokens(80).items()}
    plan = BASELINES[name]().plan(**tokens)
    copy = BASELINES[name]().plan(**{k: v.float() for k, v in tokens.items()})
    assert plan.keep.equal(copy.keep)
    assert plan.owner.equal(copy.owner)


def test_random_depends_on_its_seed_alone() -> None:
    state = torch.get_rng_state()
    plans = [RandomChoice(seed=seed).plan(**random_tokens(50, seed=7 * seed)) for seed in (0, 0, 1)]
    assert plans[0].keep.equal(plans[1].keep)
    assert not plans[0].keep.equal(plans[2].keep)
    assert torch.get_rng_state().equal(state)
    tokens = random_tokens(50)
    assert plans[0].apply(tokens["sem"]).equal(tokens["sem"][plans[0].keep])
    assert plans[0].apply(tokens["sem"], "mean").equal(tokens["sem"][plans[0].keep])


@pytest.mark.parametrize(("method", "stream"), [(VisionZip2D, "sem"), (VisionZip3D, "geo")])
def test_visionzip(method: Any, stream: str) -> None:
    """Dominant tokens untouched; contextual ones at even distances, each with the others most like it."""
    tokens = random_tokens(40)
    plan = method(num_tokens=10, contextual_share=0.4).plan(**tokens)
    dominant = tokens["scores"].topk(6).indices.sort().values
    rest = torch.tensor([i for i in range(40) if i not in dominant.tolist()])
    targets = rest[[0, 34 // 4, 2 * 34 // 4, 3 * 34 // 4]]
    assert plan.keep.equal(torch.cat([dominant, targets]).sort().values)
    x = torch.nn.functional.normalize(tokens[stream], dim=-1)
    for token in rest.tolist():
        expected = token if token in targets.tolist() else int(targets[(x[token] @ x[targets].T).argmax()])
        assert int(plan.keep[plan.owner[token]]) == expected
    out = plan.apply(tokens["sem"])
    assert out[torch.isin(plan.keep, dominant)].equal(tokens["sem"][dominant])
    row = int((plan.keep == targets[0]).nonzero())
    others = [i for i in rest.tolist() if int(plan.owner[i]) == row and i != int(targets[0])]
    torch.testing.assert_close(out[row], tokens["sem"][targets[0]] + tokens["sem"][others].mean(0))


def test_tome_merges_the_most_similar_pair_first() -> None:
    sem = torch.tensor([(1, 0), (0, 1), (0.6, 0.8), (1, 0.1), (0.1, 1)])
    plan = ToMe(num_tokens=4).plan(torch.rand(5), sem)
    # Sets are tokens 0, 2, 4 and 1, 3; the closest of all pairs between them are 0-3 and 4-1, nearly alike.
    assert plan.keep[plan.owner].tolist() == [3, 1, 2, 3, 4]


def test_tome_weighs_by_size_over_rounds() -> None:
    """Six alike tokens and two alike tokens end as two groups, each the plain mean of its members."""
    sem = torch.tensor([(1.0, 0), (1, 0), (1, 0.01), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1)])
    plan = ToMe(num_tokens=2).plan(torch.rand(8), sem)
    groups = plan.keep[plan.owner]
    assert len(groups[:6].unique()) == len(groups[6:].unique()) == 1
    torch.testing.assert_close(plan.apply(sem), torch.stack([sem[:6].mean(0), sem[6:].mean(0)]))
    assert plan.reduce == "mean"


def test_tome_against_loops() -> None:
    tokens = random_tokens(33)
    plan = ToMe(num_tokens=7).plan(**tokens)
    groups = [[i] for i in range(33)]
    stands = list(range(33))
    while len(groups) > 7:
        means = torch.stack([tokens["sem"][group].double().mean(0) for group in groups])
        unit = torch.nn.functional.normalize(means, dim=-1)
        pairs = []
        for a in range(0, len(groups), 2):
            similarity = unit[a] @ unit[1::2].T
            pairs.append((-float(similarity.max()), a, 2 * int(similarity.argmax()) + 1))
        for _, a, b in sorted(pairs)[: len(groups) - 7]:
            groups[b] = groups[b] + groups[a]
            groups[a] = []
        stands = [stands[i] for i in range(len(groups)) if groups[i]]
        groups = [group for group in groups if group]
    assert plan.keep.tolist() == stands
    for row, group in enumerate(groups):
        assert sorted(group) == (plan.owner == row).nonzero()[:, 0].tolist()


def test_divprune_against_loops() -> None:
    tokens = random_tokens(30)
    plan = BASELINES["divprune"](num_tokens=9).plan(**tokens)
    unit = torch.nn.functional.normalize(tokens["sem"].double(), dim=-1)
    distance = 1 - unit @ unit.T
    nearest = [min(float(distance[i, j]) for j in range(30) if j != i) for i in range(30)]
    chosen = [nearest.index(max(nearest))]
    while len(chosen) < 9:
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    assert plan.keep.tolist() == sorted(chosen)


def test_divprune_takes_one_of_each_cluster() -> None:
    sem = torch.eye(5)[torch.arange(5).repeat_interleave(8)] + 0.01 * random_tokens(40)["sem"][:, :5]
    plan = BASELINES["divprune"](num_tokens=5).plan(torch.rand(40), sem)
    assert (plan.keep // 8).tolist() == [0, 1, 2, 3, 4]


def test_voxels_of_planted_blobs() -> None:
    """Four blobs, four tokens: each blob is one group, and its most salient token keeps the slot."""
    corner = torch.tensor([(0.0, 0, 0), (10, 0, 0), (0, 10, 0), (0, 0, 10)])
    tokens = random_tokens(40)
    xyz = corner.repeat_interleave(10, dim=0) + 0.1 * torch.rand(40, 3, generator=torch.Generator().manual_seed(3))
    plan = VoxelPooling(num_tokens=4).plan(tokens["scores"], tokens["sem"], xyz=xyz)
    assert plan.owner.equal(torch.arange(4).repeat_interleave(10))
    assert plan.keep.equal(tokens["scores"].view(4, 10).argmax(1) + 10 * torch.arange(4))
    torch.testing.assert_close(plan.apply(tokens["sem"]), tokens["sem"].view(4, 10, -1).mean(1))
    torch.testing.assert_close(plan.apply(xyz), xyz.view(4, 10, 3).mean(1))


def test_voxels_get_smaller_with_the_budget() -> None:
    tokens = random_tokens(400)
    spread = []
    for kept in (10, 100, 300):
        plan = VoxelPooling(num_tokens=kept).plan(**tokens)
        spread.append(float((tokens["xyz"] - tokens["xyz"][plan.keep][plan.owner]).norm(dim=-1).mean()))
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2] > 0


def test_voxels_of_one_point() -> None:
    """All tokens in one place: the spare budget goes to the most salient."""
    plan = VoxelPooling(num_tokens=3).plan(torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.rand(4, 2), xyz=torch.ones(4, 3))
    assert plan.keep.tolist() == [1, 2, 3]
    assert plan.owner.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "without", "message"),
    [("visionzip-3d", "geo", "visionzip-3d needs geo"), ("voxel", "xyz", "voxel needs xyz")],
)
def test_what_a_method_needs(name: str, without: str, message: str) -> None:
    tokens = random_tokens(20)
    del tokens[without]
    with pytest.raises(ValueError, match=message):
        BASELINES[name]().plan(**tokens)


def test_bad_knobs() -> None:
    with pytest.raises(ValueError, match="contextual_share=1"):
        VisionZip2D(contextual_share=1)
    with pytest.raises(ValueError, match="ratio=2"):
        ToMe(ratio=2)
    with pytest.raises(ValueError, match="num_tokens=9 is more than the 5 tokens"):
        ToMe(num_tokens=9).plan(torch.rand(5), torch.rand(5, 2))
