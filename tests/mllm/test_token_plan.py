"""What a plan does to tokens: reductions, gradients, travel."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from merge3d_tokens import random_tokens

from geoaccel.mllm import Merge3DConfig, plan_merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reductions_against_loops(dtype: torch.dtype) -> None:
    scores, sem, geo = random_tokens(60)
    plan = plan_merge(scores, sem, geo, Merge3DConfig(num_tokens=25))
    assert int((plan.count == 0).sum()) > 0
    x = torch.randn(60, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    similarity = torch.nn.functional.normalize(sem) @ torch.nn.functional.normalize(sem).T
    similarity = (similarity + torch.nn.functional.normalize(geo) @ torch.nn.functional.normalize(geo).T).double()
    for row, token in enumerate(plan.keep.tolist()):
        others = [i for i in range(60) if int(plan.owner[i]) == row and i != token]
        group = [token, *others]
        wide = x.double()
        add = wide[token] + (wide[others].mean(0) if others else 0)
        weight = similarity[group, token].softmax(0)
        expected = {
            "add_mean": add,
            "mean": wide[group].mean(0),
            "weighted": (wide[group] * weight[:, None, None]).sum(0),
            "drop": wide[token],
        }
        for reduce, value in expected.items():
            actual = plan.apply(x, reduce)[row]  # type: ignore[arg-type]
            assert actual.dtype == dtype
            tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
            torch.testing.assert_close(actual.double(), value, rtol=tolerance, atol=tolerance)
    assert plan.gather(x).equal(x[plan.keep])
    assert plan.apply(x[:, 0, 0]).shape == (25,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduce", ["add_mean", "mean", "weighted", "drop"])
def test_apply_is_differentiable(reduce: Any) -> None:
    scores, sem, geo = random_tokens(12)
    plan = plan_merge(scores, sem.requires_grad_(), geo, Merge3DConfig(num_tokens=4))
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: plan.apply(value, reduce), x)
    assert torch.autograd.gradcheck(plan.gather, x)


def test_a_plan_travels() -> None:
    scores, sem, geo = random_tokens(30)
    plan = plan_merge(scores, sem, geo)
    before = plan.apply(sem)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.apply(sem).equal(before)
    assert plan.to("cpu").apply(sem, "weighted").equal(plan.apply(sem, "weighted"))
