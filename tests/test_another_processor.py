"""The switch that lets tests meet other orders of sums than this machine's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from another_processor import ORDER, AnotherProcessor
from torch import Tensor, nn


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_it_errs_as_much_as_an_order_of_sums_does(this_processor: None) -> None:
    """Summing one term after the other, in float32, errs as much as what is added."""
    a, b = normal(40, 100), normal(100, 30)
    exact = a.double() @ b.double()
    one_by_one = torch.zeros(40, 30)
    for term in range(100):
        one_by_one += a[:, term, None] * b[term]
    with AnotherProcessor(1):
        elsewhere = a @ b
    mine, theirs = (float((found - exact).square().mean().sqrt()) for found in (one_by_one, elsewhere))
    assert 0.5 * mine < theirs < 2 * mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits_and_another_shape_does_not(dtype: torch.dtype) -> None:
    a, b = normal(64, 512, dtype=dtype), normal(512, 30, dtype=dtype)
    with AnotherProcessor(1):
        product, again, rows = a @ b, a @ b, a[:7] @ b
    with AnotherProcessor(2):
        other = a @ b
    assert product.dtype == dtype
    assert torch.equal(product, again)
    assert not torch.equal(product[:7], rows)
    assert not torch.equal(product, other)
    # Five standard deviations, and the last rounding.
    bound = 5 * ORDER * 2**-23 * 512 * 1.5
    torch.testing.assert_close(product, a @ b, rtol=0 if dtype == torch.float32 else 2**-7, atol=bound)


def test_every_sum_of_a_network_is_met_and_gradients_too() -> None:
    x, q = normal(2, 3, 9, 9), normal(1, 2, 20, 8)
    calls = {
        "linear": lambda: nn.functional.linear(q, q[0, 0]),
        "convolution": lambda: F.conv2d(x, x[:, :, :3, :3]),
        "transposed": lambda: F.conv_transpose2d(x, x[0].view(3, 3, 3, 9)[..., :3]),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "norm": lambda: F.layer_norm(q, (8,)),
        "softmax": lambda: q.softmax(-1),
        "sum": lambda: q.sum((1, 2)),
        "mean": lambda: q.mean(),
    }
    for name, call in calls.items():
        here = call()
        with AnotherProcessor(1):
            there = call()
        assert not torch.equal(here, there), name
        assert (here.shape, here.dtype) == (there.shape, there.dtype)
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    weight = q[0, 0].clone().requires_grad_()
    gradients = []
    for seed in (1, 2):
        with AnotherProcessor(seed):
            (gradient,) = torch.autograd.grad(F.linear(q, weight).square().sum(), weight)
        gradients.append(gradient)
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_what_is_no_sum_of_floats_is_left_alone() -> None:
    with AnotherProcessor(1):
        assert torch.equal(torch.zeros(3, 4) @ torch.zeros(4, 3), torch.zeros(3, 3))
        assert torch.arange(5).sum() == 10
        assert torch.empty(0, 3).sum() == 0
        assert (normal(3).bool().sum()).item() == 3
