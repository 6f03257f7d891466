"""Launches, and bytes read and written, of a block whose small operations are kernels; counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from geoaccel.attention import AttentionContext
from geoaccel.kernels import twins
from geoaccel.layout import TokenLayout
from geoaccel.merging import HTTM, headwise
from geoaccel.models.layers import compiled
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.rope import rope_tables
from geoaccel.quantization import FP8
from geoaccel.quantization.formats import fp8

TOKENS, WIDTH, HEADS = 2048, 64, 2
FREE = {"empty", "empty_like", "detach", "_unsafe_view", "alias"}


class Counted(TorchDispatchMode):
    """Counts what is no view by name; ``launch`` counts a function of several operations as one."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE:
            self.note(name, args, kwargs, out)
        return out

    def note(self, name: str, *tensors: Any) -> None:
        self.launches[name] += 1
        self.bytes[name] += sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))

    def launch(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def one(*given: Any, **more: Any) -> Any:
            with _disable_current_modes():
                out = run(*given, **more)
            self.note(name, given, more, out)
            return out

        return one


def scaled_mm(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return ((a.float() * scale_a) @ (b.float() * scale_b) + bias).to(out_dtype)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """As on a GPU on which all kernels run."""
    count = Counted()
    with monkeypatch.context() as patch, torch.no_grad(), count:
        for module in (compiled, fp8, headwise):
            patch.setattr(module, "fused", lambda name, x: count.launch(name, getattr(twins, name)))
        patch.setattr(fp8.FP8Linear, "_why_decoded", lambda self: None)
        patch.setattr(fp8, "missing_bias", lambda kind, index: None)
        patch.setattr(torch, "_scaled_mm", count.launch("_scaled_mm", scaled_mm))
        # Looking for NaN is a CPU's own.
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield count


def run(block: Block, monkeypatch: pytest.MonkeyPatch) -> Counted:
    positions = torch.cartesian_prod(torch.arange(32), torch.arange(64))
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = rope_tables(positions, WIDTH // HEADS, 100.0, torch.bfloat16)
    with counting(monkeypatch) as count:
        block(x, AttentionContext("frame", rope=rope))
    return count


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block(WIDTH, HEADS, qk_norm=True).bfloat16().eval()


def test_a_dense_block_is_twelve_launches(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, where a scaled residual sum is one operation, eleven."""
    count = run(block, monkeypatch)
    assert count.launches["rotate_heads"] == count.launches["add_norm"] == 1
    assert count.launches["addmm"] == 4
    assert sum(count.launches.values()) <= 12, count.launches


def test_fp8_moves_no_more_than_bfloat16(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = run(block, monkeypatch)
    method = FP8()
    for parent in (block.attn, block.mlp):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, method.quantize(layer.float()).bfloat16())
    rounded = run(block, monkeypatch)
    assert rounded.launches["quantize_rows"] == rounded.launches["_scaled_mm"] == 4
    assert "gelu" not in rounded.launches
    assert sum(rounded.launches.values()) == sum(dense.launches.values()) + 3
    assert rounded.bytes["_scaled_mm"] < 0.85 * dense.bytes["addmm"]
    assert sum(rounded.bytes.values()) <= sum(dense.bytes.values())


def test_the_launches_of_httm_do_not_grow_with_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with the blocks: ten times as many here."""
    mixer, found = HTTM(block=(12, 2), adaptive=False, bypass=False).mixer("sdpa"), []
    for frames in (4, 40):
        layout = TokenLayout(1, frames, (4, 6), 5)
        context, shape = AttentionContext("global", 0, layout), (1, HEADS, layout.tokens_per_scene, 16)
        q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
        x = torch.zeros(1, layout.tokens_per_scene, HEADS * 16)
        mixer(q, k, v, x, context)  # makes the splits
        with counting(monkeypatch) as count:
            mixer(q, k, v, x, context)
        assert count.launches["match_blocks"] == 2
        assert count.launches["deviation"] == 1
        found.append(sum(count.launches.values()))
    assert found[0] == found[1] < 80
