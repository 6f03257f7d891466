"""The simulated device notices what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from device_numbers import WrongOnCuda
from device_runtime import why_not
from simulated_cuda import Simulated, SimulatedCuda
from torch import Tensor

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with SimulatedCuda() as cuda, torch.no_grad():
        yield cuda


def numbers(device: str = "cuda") -> Tensor:
    return torch.arange(6.0).reshape(2, 3).to(device)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.cat([x, torch.zeros(1, 3)]),
        lambda x: torch.zeros(2, 3)[x[0].long() % 2],
        lambda x: x @ torch.zeros(3, 2),
        lambda x: x + numbers("cuda:1"),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: x.numpy(),
    ],
)
def test_devices_do_not_mix(cuda: SimulatedCuda, mixed: Callable[[Tensor], Tensor]) -> None:
    x = numbers()
    assert x.device == torch.device("cuda:0")
    assert (x * torch.tensor(2.0)).cpu().tolist() == [[0, 2, 4], [6, 8, 10]]  # a number is no tensor of the CPU
    with pytest.raises(WrongOnCuda):
        mixed(x)


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.isnan().any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.new_tensor([1.0]), 1),
        (lambda x: torch.bincount(x.long().flatten()), 2),
        (lambda x: x[0].repeat_interleave(x[0].long()), 1),
        (lambda x: x.sort(), 0),
        (lambda x: x.masked_fill_(x > 0, 1), 0),
        (lambda x: x.to("cuda:1"), 0),
    ],
)
def test_waits_are_counted(cuda: SimulatedCuda, call: Callable[[Tensor], object], waits: int) -> None:
    x = numbers()
    cuda.reset()
    call(x)
    assert sum(cuda.waits.values()) == waits


def test_launches_are_counted_and_views_are_not(cuda: SimulatedCuda) -> None:
    x = numbers()
    cuda.reset()
    (x.t()[1:].unflatten(1, (2, 1)) * 2 + 1).softmax(-1)
    assert sorted(name for _, name in cuda.launches) == ["_softmax", "add", "mul"]


def test_live_bytes() -> None:
    with SimulatedCuda() as cuda, torch.no_grad():
        a = torch.zeros(1024, device="cuda")
        b = a[:512] + 1
        c = torch.cat([b, b])
        del b
        assert (cuda.alive, cuda.peak) == (8192, 10240)
        del a, c
        assert cuda.alive == 0


def test_products_are_in_tf32_where_that_is_allowed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 1), 1 + 2**-12).to("cuda")
    assert (x @ torch.ones_like(x)).item() == 1 + 2**-12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (x @ torch.ones_like(x)).item() == 1


def test_one_stream_must_wait_for_another(cuda: SimulatedCuda) -> None:
    x, side = numbers(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    with pytest.raises(WrongOnCuda, match="did not wait for"):
        y + 1
    torch.cuda.current_stream().wait_stream(side)
    assert isinstance(y + 1, Simulated)


def test_shapes_have_no_numbers_but_those_that_follow_from_shapes() -> None:
    with SimulatedCuda(shapes_only=True, answers={"": 7.0}) as cuda, torch.no_grad():
        x = torch.rand(1 << 20, 1 << 14, device="cuda")
        assert (x @ x.t()).shape == (1 << 20, 1 << 20)
        assert cuda.peak > 1 << 40
        assert torch.arange(4, device="cuda")[1:].tolist() == [1, 2, 3]
        assert x.sum().item() == 7
        assert x[:3].argsort(dim=0)[:, 5].tolist() == [0, 1, 2]
