"""``--max-memory``: what is chosen is said, and a limit that cannot be met is refused with what works."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)

import geoaccel
from geoaccel import memory
from geoaccel.errors import UserError
from geoaccel.memory import Limit, check_memory, estimate_bytes, read_size

SMALL = ("--formats", "npz", "--size", "56")


def fits_only_in_parts(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Less memory than everything at once takes; of networks as small as these the heads take most, with any plan."""

    def activation_bytes(self: Any, frames: int, size: tuple[int, int], *, plan: Any = None, **_: Any) -> int:
        return 10**12 if plan is None else 10**6

    monkeypatch.setattr(type(model), "activation_bytes", activation_bytes)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr("geoaccel.dry_run.free_bytes", lambda device: 10**9)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MB", 512 * 10**6), (10**9, 10**9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["24", "much", "-1GB", "3TB", "0GB", 0, 16, 999_999, True])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(UserError, match="max_memory"):
        Limit.of(text)


def test_a_bare_number_is_bytes_and_a_small_one_is_a_slip() -> None:
    with pytest.raises(UserError, match=r"^max_memory 16 is not a size; give a number with a unit, such as 16GB$"):
        Limit.of(16)
    assert read_size(10**6) == 10**6


def test_small_sizes_are_said_in_megabytes(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [memory.readable(size) for size in (0, 12.34e6, 2**30, 2.5 * 2**30)] == [
        "0 MB", "12.34 MB", "1.0 GiB", "2.5 GiB"
    ]  # fmt: skip
    monkeypatch.setattr(memory, "in_use", lambda device: 10**9)
    with pytest.raises(UserError, match=r"need about [\d.]+ MB on cpu, 1.001 GB leave 0.8\d* MB; "):
        check_memory(tiny, frames=9, size=(70, 98), limit=Limit(1001 * 10**6))


def test_a_plan_is_taken_where_all_at_once_does_not_fit(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", 3)
    dense = geoaccel.reconstruct(photos, model=tiny, size=56)
    assert "memory" not in dense.found
    fits_only_in_parts(monkeypatch, tiny)
    seen = []
    limited = geoaccel.reconstruct(dense.images, model=tiny, on_read=seen.append)
    assert seen[0].plan == tiny.memory_plans("cpu")[0]
    assert limited.found["memory"] == str(seen[0].plan)
    for name in ("cam_from_world", "intrinsics", "depth", "points_world", "conf"):
        assert torch.equal(getattr(limited, name), getattr(dense, name)), name
    assert all(module.memory_plan is None for module in tiny.modules() if hasattr(module, "memory_plan"))


def test_a_limit_counts_what_is_in_use(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_use", lambda device: 10**9)
    size = (70, 98)
    needed = estimate_bytes(tiny, frames=5, size=size)
    enough = int(memory.HEADROOM * needed) + 10**9 + 2
    assert check_memory(tiny, frames=5, size=size, limit=Limit(enough)) is None
    least = min(estimate_bytes(tiny, frames=5, size=size, plan=plan) for plan in tiny.memory_plans("cpu"))
    with pytest.raises(UserError, match=r"at most \d frames fit \(--max-frames \d\), or give more memory"):
        check_memory(tiny, frames=9, size=size, limit=Limit(int(memory.HEADROOM * least) + 10**9 + 2))


def test_the_device_that_it_goes_to_is_asked(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one where the model still is."""
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device.type) or 1000)
    monkeypatch.setattr(memory, "in_use", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"on cuda, 0\.001 MB are free"):
        geoaccel.reconstruct(torch.rand(3, 3, 70, 98), model=tiny, device="cuda")
    assert asked[0] == "cuda"


def test_layers_that_wait_need_a_host_with_room(tiny: Any) -> None:
    size, plans = (70, 98), tiny.memory_plans("cuda")
    limit = Limit(device=torch.device("cuda"))
    assert memory.choose(tiny, 5, size, limit, 0, host=math.inf).plan in plans
    found = memory.choose(tiny, 5, size, limit, 0, host=0).plan
    assert found is None or not found.host_layers
    assert tiny.host_bytes(10, size, plans[-1]) == 2 * tiny.host_bytes(5, size, plans[-1]) > 0


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, model = write_images(tmp_path / "photos", 3), geoaccel.load_model(checkpoint)
    command = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL)
    refused(
        capsys,
        *command,
        "--max-memory",
        "24",
        says="--max-memory 24 is not a size; give a number",
    )
    code, out, err = run(capsys, *command, "--dry-run", "--max-memory", "1000GB")
    assert code == 0, err
    whole = json.loads(out)
    assert whole["memory_plan"] is None
    assert whole["fits"]
    assert "everything runs at once" in err
    fits_only_in_parts(monkeypatch, model)
    code, out, err = run(capsys, *command, "--dry-run")
    assert code == 0, err
    assert json.loads(out)["memory_plan"] is not None
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "memory plan: blocks on" in err
    assert json.loads(out)["memory"].startswith("blocks on")


def test_what_a_refusal_advises_works(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_use", lambda device: 10**9)
    photos = write_images(tmp_path / "photos", 3)
    command = ("reconstruct", photos, "--out", tmp_path / "scene", "--model", checkpoint, *SMALL)
    code, _, err = run(capsys, *command, "--max-memory", "1GB")
    assert code == 2
    advice = re.search(r"--max-memory (\d+MB)", err)
    assert advice, err
    code, _, err = run(capsys, *command, "--max-memory", advice[1])
    assert code == 0, err


def test_quantized_weights_count_where_they_are_not_yet(tiny: Any) -> None:
    """Codes and scales are buffers."""
    there, size = torch.device("cuda"), (70, 98)
    found = {}
    for quantization in (None, "w4a16"):
        model = geoaccel.accelerate(tiny, quantization=quantization)
        state = sum(tensor.nbytes for tensor in model.state_dict().values())
        found[quantization] = estimate_bytes(model, frames=2, size=size, device=there)
        assert found[quantization] >= state + memory.activation_bytes(model, 2, size, "cuda") - 1
    assert found["w4a16"] < found[None]
