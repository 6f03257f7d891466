"""Memory: what is predicted against what is counted on shapes of full width, limits, and copies beside the forward."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from combinations import METHODS as ACTING
from combinations import difference, photographs, prepared
from device_runtime import why_not
from memory_peaks import HEADS as CAMERAS_AND_DEPTH
from memory_peaks import METHODS, measured
from simulated_cuda import Simulated, SimulatedCuda, WrongOnCuda

from full_size import FEW_BLOCKS, HEADS, full_size
from geoaccel.memory import GIB, planned
from geoaccel.memory_plan import MemoryPlan
from geoaccel.merging import HTTM, Asymmetric
from geoaccel.merging.alike import Alike
from geoaccel.models.layers.block import MLP_CHUNK_TOKENS, GatedMlp, Mlp
from geoaccel.models.layers.track_head import QUERIES

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

CLOSE = 0.1
"""Of the counted peak."""

FRAMES = (pytest.param(10), pytest.param(100), pytest.param(300, marks=pytest.mark.slow),
          pytest.param(1000, marks=pytest.mark.slow))  # fmt: skip
FEW = {"pi3": ("dense", "fastvggt"), "da3": ("dense", "asymmetric"), "vggt": tuple(METHODS)}
ROWS = [
    pytest.param(backbone, method, marks=() if method in FEW[backbone] else pytest.mark.slow)
    for backbone in FEW
    for method in METHODS
]


@pytest.fixture(autouse=True)
def _built_in_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOACCEL_RATES", "built-in")


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize(("backbone", "method"), ROWS)
def test_the_estimate_is_close(backbone: str, method: str, frames: int) -> None:
    heads = CAMERAS_AND_DEPTH if backbone == "vggt" else HEADS[backbone]
    found = full_size(backbone, METHODS[method](), frames, config=FEW_BLOCKS[backbone], heads=heads)
    assert abs(found.off) <= CLOSE, str(found)


@pytest.mark.parametrize("plan", [None, MemoryPlan(4096, 2, 4)])
@pytest.mark.parametrize("sizes", ["da3", "da3 giant"])
@pytest.mark.parametrize("heads", [("depth", "camera"), ("ray",), HEADS["da3"]])
def test_the_estimate_of_depth_anything_3(heads: tuple[str, ...], sizes: str, plan: MemoryPlan | None) -> None:
    """Gated or not; of rays, too, of which nothing of the depth is left."""
    found = full_size("da3", None, 8, plan=lambda model: plan, config=FEW_BLOCKS[sizes], heads=heads)
    assert abs(found.off) <= CLOSE, str(found)


@pytest.mark.parametrize("plan", [None, MemoryPlan(4096, 2, 4)])
@pytest.mark.parametrize("merging", [None, Asymmetric(bypass=False), HTTM(bypass=False)])
@pytest.mark.parametrize("kernel", ["fp8", "matmul"])
def test_the_estimate_counts_what_kernels_take(kernel: str, merging: Any, plan: MemoryPlan | None) -> None:
    """All weights, or codes and what is rounded; of the tokens that a method leaves."""
    chosen: dict[str, Any] = {"attention": kernel, "config": FEW_BLOCKS["vggt"], "heads": ("camera",)}
    found = full_size("vggt", merging, 40, plan=lambda model: plan, **chosen)
    assert -CLOSE <= found.off <= 2 * CLOSE, str(found)


@pytest.mark.parametrize("frames", [40, 100])
def test_the_estimate_of_tokens_that_every_block_packs(frames: int) -> None:
    """All of them at once, whatever the plan."""
    merging = Alike(variant="direct", bypass=False, log_bias=False)
    chosen: dict[str, Any] = {"config": FEW_BLOCKS["vggt"], "heads": ("camera",)}
    found = full_size("vggt", merging, frames, plan=lambda model: MemoryPlan(2048, 1, 4), **chosen)
    assert abs(found.off) <= CLOSE, str(found)


@pytest.mark.parametrize("plan", [None, MemoryPlan(16_384, 8, 4)])
def test_the_estimate_counts_tracks(plan: MemoryPlan | None) -> None:
    config = FEW_BLOCKS["vggt"] | {"heads": ("camera", "depth", "track"), "track_depth": 1}
    given: dict[str, Any] = {"heads": ("track",), "query_points": torch.zeros(1, QUERIES, 2)}
    found = full_size("vggt", None, 16, plan=lambda model: plan, config=config, **given)
    assert abs(found.off) <= CLOSE, str(found)


@pytest.mark.parametrize(
    ("method", "frames", "limit", "most"),
    [
        ("dense", 100, "6GB", 5.0),
        ("litevggt", 100, "8GB", 6.5),
        *(pytest.param(method, 300, "12GB", 10.0, marks=pytest.mark.slow) for method in METHODS),
        *(pytest.param(method, 1000, "24GB", 22.0, marks=pytest.mark.slow) for method in METHODS),
    ],
)
def test_a_limit_is_kept(method: str, frames: int, limit: str, most: float) -> None:
    row = measured(method, frames, limit)
    assert row["plan"] is not None
    assert row["peak_gib"] <= most, row
    assert row["peak_gib"] == pytest.approx(row["predicted_gib"], rel=CLOSE), row


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        *itertools.product(("vggt", "pi3"), sorted(ACTING)),
        ("da3", "dense"),
        ("da3", "asymmetric"),
        ("da3", "come+httm"),
    ],
)
def test_plans_run_on_the_device(backbone: str, method: str) -> None:
    """No tensors of two devices meet, nothing is read before it is there, and the numbers are those without a plan."""
    images = photographs()
    with SimulatedCuda() as cuda, torch.no_grad():
        model = prepared(backbone, method, "float32", "cuda:0")
        whole = {name: _numbers(x) for name, x in model(images.to("cuda:0")).items()}
        for plan in (MemoryPlan(50, 2, 4), MemoryPlan(100, 8, 1)):
            with planned(model, plan):
                cuda.reset()
                found = model(images)
            assert all(not isinstance(found[name], Simulated) for name in ("depth", "points") if name in found)
            assert difference(found, whole) < 1e-5


def copied_beside() -> tuple[Any, torch.Tensor, Any]:
    """A tensor of the device, pinned memory that it is being copied to, and the stream that does it."""
    x = torch.zeros(100, device="cuda:0")
    host, side = torch.empty(100, pin_memory=True), torch.cuda.Stream("cuda:0")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
    return x, host, side


def test_what_is_being_copied_must_not_change() -> None:
    with SimulatedCuda(), torch.no_grad():
        x, host, side = copied_beside()
        with pytest.raises(WrongOnCuda, match="still reads"):
            x.add_(1)
        with pytest.raises(WrongOnCuda, match="did not wait for"):
            host.to("cuda:0", non_blocking=True)
        torch.cuda.current_stream().wait_event(side.record_event())
        x.add_(1)
        assert host.to("cuda:0", non_blocking=True).shape == (100,)


def test_what_is_being_copied_must_not_be_given_away() -> None:
    for recorded in (True, False):
        with SimulatedCuda(), torch.no_grad():
            x, _host, side = copied_beside()
            if recorded:
                x.record_stream(side)
            torch.zeros(1, device="cuda:0")
            del x
            with nullcontext() if recorded else pytest.raises(WrongOnCuda, match=r"freed that .* still reads"):
                torch.zeros(1, device="cuda:0")


@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_holds_the_hidden_layer_of_one_chunk(gated: bool) -> None:
    """8 numbers for each of the chunk's own, beside what enters and, of all chunks, what leaves."""
    width, tokens = 48, 3 * MLP_CHUNK_TOKENS
    with torch.device("meta"):
        mlp: Any = (GatedMlp if gated else Mlp)(width, 4 * width)
    with SimulatedCuda(shapes_only=True) as cuda, torch.no_grad():
        mlp = mlp.to_empty(device="cuda:0")
        x = torch.empty(1, tokens, width, device="cuda:0")
        cuda.reset()
        weights = cuda.alive - x.nbytes
        mlp(x)
        chunk = MLP_CHUNK_TOKENS * width * 4
        assert cuda.peak - weights <= (3 + 8 + 3) * chunk + 2**20


def test_fewer_bytes_with_each_plan() -> None:
    """From what costs least time to what takes least memory."""
    with torch.device("meta"):
        from geoaccel.models import build

        model: Any = build("vggt", **FEW_BLOCKS["vggt"])
    plans = model.memory_plans("cuda")
    took = [model.activation_bytes(500, (392, 518), plan=plan, device="cuda") for plan in (None, *plans)]
    assert took == sorted(took, reverse=True)
    assert took[-1] < took[0] / 3
    assert took[0] > 10 * GIB


def _numbers(x: Any) -> Any:
    return x.inner if isinstance(x, Simulated) else x
