"""Whole programs on the simulated device: a reconstruction from its images, and the day with a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runtime import why_not
from simulated_cuda import SimulatedCuda

import geoaccel
from geoaccel import memory, prediction
from geoaccel.cameras import unproject_depth
from geoaccel.kernels.fused import NAMES
from geoaccel.merging import MERGING, microbenchmarks
from geoaccel.merging.rates import Kind

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
DAY = ("--in-process", "--device", "cuda", "--models", "pi3-mini", "--size", "56", "70", "--kernel-tokens", "128",
       "--frames", "2", "--quantized-frames", "2", "--turns", "1")  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    monkeypatch.setenv("GEOACCEL_RATES", "built-in")
    with SimulatedCuda() as cuda:
        yield cuda


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("name", ["vggt-mini", "pi3-mini"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_reconstruction_comes_back_as_from_the_cpu(
    device: str, name: str, limited: bool, cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(3, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    model: Any = geoaccel.load_model(name)
    expected = geoaccel.reconstruct(images, model=model)
    if limited:
        own = memory.choose
        plan = model.memory_plans("cuda")[-1]

        def choose(*given: Any, **more: Any) -> memory.Choice:
            return memory.Choice(plan, 0, True, own(*given, **more).needed_for)

        monkeypatch.setattr(memory, "choose", choose)
    cuda.reset()
    found = geoaccel.reconstruct(images, model=model, device=device)
    assert cuda.launches
    assert ("memory" in found.found) == limited
    for field in ("cam_from_world", "intrinsics", "depth", "points_world", "conf"):
        ours = getattr(found, field)
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, getattr(expected, field), rtol=1e-3, atol=1e-3)


def test_points_lie_where_depth_and_cameras_say_whatever_products_are_allowed(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made on the device, a few frames at a time, and not in TF32."""
    monkeypatch.setattr(prediction, "FRAMES_AT_ONCE", 2)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    images = torch.rand(5, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    scene = geoaccel.reconstruct(images, model=geoaccel.load_model("vggt-mini"), device="cuda")
    wide = (x.double() for x in (scene.depth, scene.intrinsics, scene.cam_from_world))
    expected = unproject_depth(*wide)[scene.mask]
    torch.testing.assert_close(scene.points_world[scene.mask].double(), expected, rtol=1e-5, atol=1e-5)
    back = [n for (place, what), n in cuda.waits.items() if place.function == "_unprojected" and "to the host" in what]
    assert back == [3]


def test_the_day_runs_every_fused_kernel_with_it_and_without(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "gpu_day"))
    kernels: Any = importlib.import_module("gpu_kernels")
    calls = kernels.fused_calls(torch.device("cuda:0"), torch.bfloat16, 200)
    assert set(calls) == set(NAMES)
    for name, call in calls.items():
        for run, there in ((call, True), (kernels._without(call), False)):
            run()  # tries them
            cuda.reset()
            run()
            assert (name in {what for _, what in cuda.launches}) == there, name
    for name in [name for name in sys.modules if name.startswith("gpu_")]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rates_are_measured_on_the_device(
    dtype: torch.dtype, cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first forward with a merging method does so."""
    monkeypatch.setattr(microbenchmarks, "SPEED", {"cuda": 1e7})
    monkeypatch.setattr(microbenchmarks, "FRAMES", {"cuda": 4})
    rates = microbenchmarks.measure(Kind(torch.device("cuda:1"), dtype, 64, 16))
    assert all(value > 0 for value in dataclasses.asdict(rates).values())
    assert cuda.launches


def test_the_day_with_a_gpu_runs_to_its_end(
    cuda: SimulatedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for compilation: the blocks beside formats run as they are."""
    for folder in (SCRIPTS, SCRIPTS / "gpu_day"):
        monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    day = importlib.import_module("on_gpu")
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *DAY, "--out", str(tmp_path)])
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(SystemExit) as end:
            day.main()
    finally:
        torch.compiler.set_stance("default")
        for name in set(sys.modules) - before:
            if name.startswith(("gpu_", "on_gpu")):
                del sys.modules[name]
    assert end.value.code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "on_gpu.json").read_text())
    assert not found["failed"]
    kernels = {row["name"]: row for row in found["kernel"]}
    assert [name for name, row in kernels.items() if not row["runs"]] == ["attention xformers"]
    assert all(kernels[name]["difference"] < 0.02 and kernels[name]["not_compiled"] is None for name in NAMES)
    ran = {group: [row["candidate"] for row in found["forwards"] if row["group"] == group] for group in
           ("merging", "quantization")}  # fmt: skip
    assert set(ran["merging"]) == {"none", *MERGING}
    assert ran["quantization"] == ["none", "fp8", "w4a16"]
    assert all(row["peak_gib"] > 0 for row in found["forwards"])
    assert (tmp_path / "peaks.png").stat().st_size > 0
