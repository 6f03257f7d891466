"""Where a model may run, and in which type."""

from __future__ import annotations

import pytest
import torch

import geoaccel
from geoaccel.fingerprint import of_networks
from geoaccel.runtime import hardware, in_words, machine, pick_device, pick_dtype, processor, versions


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cpu:0", "cuda:", "cuda:-1", "cudacuda:0", "1"])
def test_devices_that_are_not_for_us(device: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown device '{device}'; known: auto, cpu, cuda, cuda:N"):
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
