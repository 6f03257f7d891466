"""One scene over several processes: the numbers of one process, what is exchanged, what is refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Ended, in_processes
from torch import Tensor, nn

import geoaccel
from geoaccel.layout import TokenLayout
from geoaccel.merging import Asymmetric
from geoaccel.merging.key_subset import KeySubset
from geoaccel.models import BACKBONES, build
from geoaccel.sharding import model as sharing
from geoaccel.sharding.attention import Shares
from geoaccel.sharding.watch import Verdict, Watch

COUNTS = {2: (4, 1), 3: (1, 3, 2)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the other processes have: of more threads each rounds its own sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(backbone: str, seed: int = 0, **config: Any) -> nn.Module:
    """A tiny one whose special tokens, layer scales and camera head matter, so that a mistake shows."""
    torch.manual_seed(seed)
    tiny = BACKBONES[backbone].tiny
    sizes = {name: getattr(tiny, name) for name in type(tiny).names()}
    if backbone == "vggt":
        sizes["heads"] = ("camera", "depth", "point")
    model = build(backbone, **{**sizes, "layer_scale": 0.5, **config}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "token" in name or name.endswith("gamma"):
            parameter.normal_(std=0.5)
    return model


def scene(frames: int, side: int = 56, batch: int = 1) -> Tensor:
    return torch.rand(batch, frames, 3, side, side + 14, generator=torch.Generator().manual_seed(frames))


def forward(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        found = model(images)
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "images"}


def part(images: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
    return images.split(counts, dim=1)[rank]


def all_well(ended: list[Ended]) -> list[Any]:
    assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.said for one in ended)
    return [one.result for one in ended]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("backbone", ["vggt", "pi3"])
def test_the_numbers_of_one_process(backbone: str, size: int, tmp_path: Path) -> None:
    counts = COUNTS[size]
    images = scene(sum(counts), batch=2)
    choices: dict[str, Any] = {
        "dense": {},
        "matmul": {"attention": "matmul"},
        "asymmetric": {"merging": Asymmetric(stride=3, bypass=False)},
        "asymmetric without anchor": {"merging": Asymmetric(stride=4, anchor=False, log_bias=False, bypass=False)},
        "bypassed": {"merging": Asymmetric(stride=3, min_gain=1e6)},
        "layers": {"layers": {0: "frame-only", 1: Asymmetric(stride=2, bypass=False)}},
    }
    model = network(backbone)
    alone = {}
    for name, choice in choices.items():
        alone[name] = forward(geoaccel.accelerate(model, **choice), images)
        geoaccel.restore(model)

    def work(rank: int) -> dict[str, dict[str, Tensor]]:
        found = {}
        for name, choice in choices.items():
            shared = geoaccel.parallel(geoaccel.accelerate(model, **choice))
            forward(shared, part(images, counts, rank)[:1])  # a forward before leaves nothing behind
            found[name] = forward(shared, part(images, counts, rank))
            geoaccel.restore(model)
        found["alone again"] = forward(model, images)
        return found

    results = all_well(in_processes(size, work, tmp_path))
    for name in choices:
        for key, expected in alone[name].items():
            got = torch.cat([result[name][key] for result in results], dim=1)
            error = float((got - expected).norm() / expected.norm())
            assert error < 1e-5, f"{name}: {key} differs by {error:.2g}"
    for result in results:  # restore takes the model out of the group
        for key, expected in alone["dense"].items():
            assert torch.equal(result["alone again"][key], expected)
    assert not torch.allclose(alone["dense"]["depth" if backbone == "vggt" else "conf"][:, 1:],
                              alone["asymmetric"]["depth" if backbone == "vggt" else "conf"][:, 1:])  # fmt: skip


def test_each_layer_gathers_its_own_keys_of_every_head(tmp_path: Path) -> None:
    model, images = network("pi3", decoder_depth=8, head_decoder_depth=1), scene(5)
    ours, uniform = (Asymmetric(keys=3, depth_profile=differ, bypass=False) for differ in (True, False))
    alone = forward(geoaccel.accelerate(model, merging=ours), images)
    assert not torch.allclose(alone["conf"], forward(geoaccel.accelerate(model, merging=uniform), images)["conf"])

    def work(rank: int) -> dict[str, Tensor]:
        shared = geoaccel.parallel(geoaccel.accelerate(model, merging=ours))
        return forward(shared, part(images, (2, 3), rank))

    results = all_well(in_processes(2, work, tmp_path))
    for key, expected in alone.items():
        got = torch.cat([result[key] for result in results], dim=1)
        assert float((got - expected).norm() / expected.norm()) < 1e-5, key


def test_asymmetric_exchanges_a_sixth_of_dense_and_both_are_counted(tmp_path: Path) -> None:
    frames, side = 20, 224
    model = network("pi3", decoder_depth=2, head_decoder_depth=1, vit_depth=1)
    images = torch.rand(1, 2 * frames, 3, side, side)

    def work(rank: int) -> list[dict[tuple[str, int], int]]:
        found = []
        for choice in ({}, {"merging": Asymmetric(stride=8, bypass=False)}):
            shared: Any = geoaccel.parallel(geoaccel.accelerate(model, **choice))
            with torch.inference_mode():
                shared(images[:, rank * frames : (rank + 1) * frames], heads=["camera"])
            found.append(shared.sharing.received())
            geoaccel.restore(model)
        return found

    first, second = all_well(in_processes(2, work, tmp_path))
    tokens = frames * (side // 14) ** 2 + frames * model.config.num_register_tokens
    assert first[0] == second[0] == {("global", 0): 2 * tokens * model.config.decoder_dim * 4}
    dense, asymmetric = (first[choice][("global", 0)] + second[choice][("global", 0)] for choice in (0, 1))
    assert asymmetric <= dense / 6  # the anchor included, which rank 0 sends to the other


def test_each_rank_chooses_its_own_of_the_keys_of_the_scene() -> None:
    layout, counts = TokenLayout(1, 7, (5, 6), 3), (3, 1, 3)
    subset = KeySubset(7, (5, 6), 3, 4, True, 2)
    shares = [Shares(subset, layout, counts, rank) for rank in range(3)]
    starts = [0, 3, 4]
    each = torch.cat([one.own + start * 33 for one, start in zip(shares, starts, strict=True)], dim=1)
    assert torch.equal(each.sort(dim=1).values, subset.index.sort(dim=1).values)
    found = each[1]
    assert len(found.unique()) == len(found)
    assert all(int(one.own.max()) < count * 33 for one, count in zip(shares, counts, strict=True))
    assert len(found) == sum(sum(pair) for pair in shares[0].lengths)
    assert shares[0].lengths[0][0] == 33 + 2 * 3  # the anchor is rank 0's alone
    assert shares[1].lengths[1][0] == 3


def test_who_dies_is_named_and_ends_the_others(tmp_path: Path) -> None:
    model = network("pi3")
    images = scene(3)

    def work(rank: int) -> None:
        shared = geoaccel.parallel(model)
        forward(shared, images[:, rank : rank + 1])
        if rank == 1:
            (tmp_path / "died").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        forward(shared, images[:, rank : rank + 1])

    began = time.monotonic()
    ended = in_processes(3, work, tmp_path)
    died = float((tmp_path / "died").read_text()) - began
    assert ended[1].code == -signal.SIGKILL
    for rank in (0, 2):
        assert ended[rank].code == 1
        assert ended[rank].seconds - died < 10
        assert ended[rank].said.startswith("geoaccel: rank 1 (process ")
        assert len(ended[rank].said.splitlines()) == 1, ended[rank].said


@pytest.mark.parametrize("what", ["checkpoint", "method", "shape", "no frame"])
def test_what_differs_is_refused_on_every_rank(what: str, tmp_path: Path) -> None:
    models = [network("pi3"), network("pi3", seed=int(what == "checkpoint"))]
    for rank, model in enumerate(models):
        geoaccel.accelerate(model, merging=Asymmetric(stride=2 + int(rank == 1 and what == "method")))

    def work(rank: int) -> None:
        odd = rank == 1
        shared = geoaccel.parallel(models[rank])
        frames = 0 if odd and what == "no frame" else 2
        forward(shared, scene(2, side=56 + 14 * int(odd and what == "shape"))[:, :frames])

    ended = in_processes(2, work, tmp_path)
    says = {"checkpoint": "rank 1 has a different checkpoint", "method": "rank 1 has a different choice of methods",
            "shape": "rank 1 has a different shape of images", "no frame": "rank 1 has no frames"}  # fmt: skip
    for one in ended:
        assert one.code == 2, one.said
        assert one.said.startswith(says[what])
        assert len(one.said.splitlines()) == 1
    assert abs(ended[0].seconds - ended[1].seconds) < 10


@pytest.mark.parametrize("what", ["fastvggt", "httm", "come", "fp8", "da3", "gradients", "twice", "accelerate", "part"])
def test_what_needs_all_tokens_at_once_is_refused(what: str, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if what == "da3":
            geoaccel.parallel(network("da3"))
        model = network("vggt")
        merging: Any = {"come": geoaccel.merging.CoMe(choose="random")}.get(what)
        merging = what if what in ("fastvggt", "httm") else merging
        model = geoaccel.accelerate(model, merging=merging, attention="fp8" if what == "fp8" else None)
        shared: Any = geoaccel.parallel(model)
        if what == "twice":
            geoaccel.parallel(shared)
        if what == "accelerate":
            geoaccel.accelerate(shared)
        if what == "part":
            shared.aggregator(scene(2))
        shared.requires_grad_(True)(scene(2))

    says = {
        "fastvggt": "fastvggt (layer 0) needs all tokens of a scene in one process",
        "httm": "httm (layer 0) needs all tokens of a scene in one process",
        "come": "come",
        "fp8": "attention='fp8' does not run on several processes",
        "da3": "da3 needs all frames in one process",
        "gradients": "no gradients",
        "twice": "already split over processes",
        "accelerate": "split over several processes",
        "part": "call the whole model",
    }
    (ended,) = in_processes(1, work, tmp_path)
    assert ended.code == 2
    assert says[what] in ended.said


def test_without_a_group_one_is_asked_for() -> None:
    with pytest.raises(geoaccel.errors.UserError, match="there is no process group"):
        geoaccel.parallel(network("pi3"))


def test_shares_of_frames() -> None:
    assert [(s.start, s.stop) for s in sharing.shares(7, 3)] == [(0, 3), (3, 5), (5, 7)]
    with pytest.raises(ValueError, match="2 frames are too few for 3 processes"):
        sharing.shares(2, 3)


class Lines:
    """A store in memory."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.lines[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.lines[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.lines for key in keys)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"is": "alive", "host": "elsewhere", "pid": 7, "born": 1.0, "beat": 1}', "(process 7 on elsewhere) does not"),
        (
            '{"is": "failed", "line": "rank 1: no such file", "code": 2, "host": "x", "pid": 7, "beat": 1}',
            "rank 1: no such",
        ),
        ('{"is": "done", "host": "x", "pid": 7, "beat": 1}', "ended while others still needed it"),
    ],
)
def test_what_a_watch_says_of_another_machine(line: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoaccel.sharding.watch.TICK_S", 0.01)
    store, verdicts = Lines(), []
    store.set("geoaccel/1", line)
    watch = Watch(store, 0, 2, verdicts.append)  # type: ignore[arg-type]
    with watch.waiting():
        for _ in range(500):
            time.sleep(0.02)
            if verdicts:
                break
    watch.close()
    verdict: Verdict = verdicts[0]
    assert says in verdict.line
    assert verdict.code == (2 if "failed" in line else 1)
