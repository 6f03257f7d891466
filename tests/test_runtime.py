"""Where a model may run, and in which type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.fingerprint import of_networks
from geoaccel.runtime import auto_dtype, hardware, in_words, machine, pick_device, pick_dtype, processor, versions


@pytest.mark.parametrize("device", ["meta", "xpu", "cpu:0", "cuda:", "cuda:-1", "cudacuda:0", "1"])
def test_devices_that_are_not_for_us(device: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown device '{device}'; known: auto, cpu, cuda, cuda:N"):
        pick_device(device)


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_apples_gpus_are_refused_with_the_reason(device: str) -> None:
    with pytest.raises(ValueError, match=rf"device {device} is not supported .*lack float64.*; use --device cpu"):
        pick_device(device)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = ("auto", "cpu", "cuda", "cuda:1")
    assert [pick_device(name) for name in asked] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="cuda:2 is not available here; the last one is cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(ValueError, match="cuda:0 is not available here; use --device cpu"):
        pick_device("cuda:0")
    assert pick_device(torch.device("cpu", 0)) == "cpu"


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("mps", "device mps is not supported"),
        ("cuda", "device cuda is not available here"),
        (torch.device("cuda", 1), "device cuda:1 is not available here"),
        ("nowhere", "unknown device 'nowhere'; known: auto, cpu, cuda"),
    ],
)
def test_python_refuses_the_devices_that_the_command_refuses(
    device: str | torch.device, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before weights or photographs are looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        geoaccel.load_model("no/such-model", device=device)
    with pytest.raises(UserError, match=told):
        geoaccel.reconstruct("no-such-folder", model=nn.Identity(), device=device)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda:1", "bfloat16"),
        ("float16", "cpu", "float16"),
    ],
)
def test_dtypes(name: str, device: str, dtype: str) -> None:
    assert pick_dtype(name, device) == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_auto_on_cuda_goes_by_the_capability_of_that_device(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability, "cuda": (8, 6)}.__getitem__)
    assert pick_dtype("auto", "cuda:1") == pick_dtype("auto", "cuda:1", ask_processor=False) == dtype
    assert pick_dtype("auto", "cuda") == "bfloat16"
    assert f"compute capability {capability[0]}.{capability[1]}" in auto_dtype("cuda:1")[1]


@pytest.mark.parametrize(("gain", "dtype"), [(3.0, "bfloat16"), (1.2, "float32"), (0.1, "float32")])
def test_auto_on_a_cpu_goes_by_what_was_measured(gain: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOACCEL_RATES", "measured")
    monkeypatch.setattr("geoaccel.bfloat16.gain", lambda of, ask: gain)
    assert pick_dtype("auto", "cpu") == dtype
    assert auto_dtype("cpu") == (
        dtype,
        f"bfloat16 takes {1 / gain:.2f} times as long as float32 on this processor, measured",
    )
    assert pick_dtype("auto", "cpu", ask_processor=False) == "float32"
    assert pick_dtype("float32", "cpu") == "float32"


def test_auto_on_a_cpu_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_dtype("cpu") == ("float32", "not measured, GEOACCEL_RATES=built-in")
    monkeypatch.setenv("GEOACCEL_RATES", "measured")
    monkeypatch.setattr("geoaccel.bfloat16.gain", lambda of, ask: None)
    assert auto_dtype("cpu", ask=False) == ("float32", "bfloat16 was not measured on this processor yet")


def test_dtypes_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown dtype 'bfloat'; known: .*Did you mean 'bfloat16'"):
        pick_dtype("bfloat", "cpu")


def test_what_a_measurement_was_made_on() -> None:
    assert versions().keys() == {"geoaccel", "code", "torch", "python"}
    assert versions()["code"] == of_networks()
    assert versions()["geoaccel"] == geoaccel.__version__
    found = machine("cpu")
    assert found.keys() == {"processor", "instructions", "device", "threads"}
    assert all(found.values())
    assert hardware("cpu") == f"{torch.get_num_threads()} CPU threads, {processor()} ({found['instructions']})"
    assert in_words({**found, "device": "NVIDIA H200"}) == "NVIDIA H200"
