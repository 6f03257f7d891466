"""Whatever the caller has set: autocast, TF32, deterministic algorithms, another device, another stream."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from combinations import METHODS, PRECISIONS, photographs, prepared
from costs import rows
from device_runtime import why_not
from simulated_cuda import Simulated, SimulatedCuda
from torch import Tensor

from geoaccel import attention_kernels, kept
from geoaccel.kernels import choice, fp8
from geoaccel.quantization.formats import fp8 as fp8_linears

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

KERNELS = {"come": "segment_mean", "w4a16": "decode_groups", "attention in fp8": "flash"}
"""By method or precision, the kernel that it should not lose."""


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with SimulatedCuda() as cuda, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # kernels that are left out
        yield cuda


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device() -> Iterator[None]:
    with torch.device("cuda"):
        yield


SETTINGS = [autocast, tf32, deterministic, default_device]


def launched(cuda: SimulatedCuda) -> set[str]:
    return {name for _, name in cuda.launches}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_kernels_are_tried_whatever_the_caller_has_set(cuda: SimulatedCuda, setting: type, device: str) -> None:
    x = torch.zeros(2, 2, device=device)
    with setting():
        assert choice.why_not(x.device) is None
        assert fp8.missing_kernel(x.device.index) is None
        assert fp8_linears.missing_product("cuda", x.device.index) is None
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("setting", SETTINGS[:3])
@pytest.mark.parametrize(
    ("method", "precision"),
    [("come", "float32"), ("dense", "w4a16"), ("dense", "attention in fp8"), ("httm", "float32"), ("fastvggt", "fp8")],
)
def test_forwards_keep_their_kernels(cuda: SimulatedCuda, setting: type, method: str, precision: str) -> None:
    with setting():
        prepared("vggt", method, precision, "cuda:0")(photographs().to("cuda:0"))
    wanted = KERNELS.get(precision) or KERNELS.get(method)
    assert wanted is None or wanted in launched(cuda)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_algorithms_refuse_nothing(cuda: SimulatedCuda, method: str) -> None:
    model = prepared("pi3", method, "bfloat16", "cuda:0")
    with deterministic():
        predictions = model(photographs().to("cuda:0"))
        model.backbone.geometry(predictions, (84, 98))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("method", "precision"),
    [("come", "w4a16"), ("come+httm", "bfloat16"), ("fastvggt", "attention in fp8"), ("litevggt", "fp8")],
)
def test_on_another_device_than_the_current_one(cuda: SimulatedCuda, method: str, precision: str) -> None:
    out = prepared("vggt", method, precision, "cuda:1")(photographs().to("cuda:1"))
    assert {str(value.device) for value in out.values() if isinstance(value, Tensor)} == {"cuda:1"}
    assert torch.cuda.current_device() == 0


def test_two_streams_share_nothing_that_one_is_still_writing(cuda: SimulatedCuda) -> None:
    model, images = prepared("da3", "httm", "bfloat16", "cuda:0"), photographs().to("cuda:0")
    for _ in range(2):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(images)


def test_weights_of_packed_keys_are_looked_at_once_a_forward(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in every layer: long sequences are attended to in groups of keys of one weight.

    Six frames in front of the aggregator and six in it, where the special tokens are others, and one scene.
    """
    monkeypatch.setattr(attention_kernels, "JOINED_FROM", 1)
    prepared("vggt", "come", "bfloat16", "cuda:0")(photographs().to("cuda:0"))
    found = {what: n for (place, what), n in cuda.waits.items() if place.function == "keys_by_bias"}
    assert found == {"_unique2": 26, "tolist": 13}
    assert "_scaled_dot_product_flash_attention" in launched(cuda)


@pytest.mark.parametrize("method", ["come", "fastvggt", "httm"])
@pytest.mark.parametrize("precision", ["bfloat16", "w4a16"])
def test_without_triton(method: str, precision: str) -> None:
    with SimulatedCuda(kernels=False) as cuda, torch.no_grad(), warnings.catch_warnings(action="ignore"):
        prepared("vggt", method, precision, "cuda:0")(photographs().to("cuda:0"))
        assert not launched(cuda) & {"best_match", "segment_mean", "decode_groups"}


def test_what_is_kept_is_bounded(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @kept.kept
    def table(size: int, device: torch.device) -> Tensor:
        made.append(size)
        return torch.zeros(size, device=device)

    monkeypatch.setattr(kept, "LIMIT_BYTES", 5000)
    device = torch.device("cuda:0")
    for size in (1000, 100, 1000, 200, 1000, 100):  # of four bytes each; what was used longest ago goes
        assert isinstance(table(size, device), Simulated)
    assert made == [1000, 100, 200, 100]
    assert kept.kept_bytes() == 4400
    with torch.cuda.stream(torch.cuda.Stream()):
        table(100, device)
    assert made[-2:] == [100, 100]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "method", "precision"),
    sorted(set(itertools.product(("da3", "pi3", "pi3x", "vggt"), METHODS, PRECISIONS)) - set(rows())),
)
def test_every_combination_runs(cuda: SimulatedCuda, backbone: str, method: str, precision: str) -> None:
    """Those that have no row in the table."""
    prepared(backbone, method, precision, "cuda:0")(photographs().to("cuda:0"))
