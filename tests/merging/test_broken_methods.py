"""The rules of ``geoaccel.testing`` find what is broken: one method holds them all, and others each break one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext, Restore
from geoaccel.attention_kernels import attend
from geoaccel.merging import AttentionMerging, Effect, SpanMerging
from geoaccel.merging.alike import Alike
from geoaccel.merging.method import MergingMixer, check_share
from geoaccel.testing import MERGING_RULES, Trial, check_merging_method, check_rule, tiny_network


@dataclass(frozen=True)
class StridedKeys(AttentionMerging):
    """Attention sees every special token, the first frame, and some patches of the others, evenly spread."""

    name: ClassVar[str] = "strided-keys"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, ratio=self.ratio)

    def mixer(self, kernel: str) -> MergingMixer:
        return StridedMixer(self, kernel)


class StridedMixer(MergingMixer):
    method: StridedKeys

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = context.layout
        assert layout is not None
        why = "one frame" if layout.frames == 1 else "ratio 0 merges nothing" if self.method.ratio == 0 else None
        if why is None and self.method.bypass and q.shape[2] < 4096:
            why = f"{q.shape[2]} tokens are few"
        if why is not None:
            return self.dense(q, k, v, x, context, why)
        place = torch.arange(q.shape[2], device=q.device)
        patch, kept = place % layout.tokens_per_frame - layout.num_special, 1 - self.method.ratio
        seen = (patch < 0) | (place < layout.tokens_per_frame) | ((patch * kept) % 1 < kept)
        self.effect = Effect(q.shape[2], q.shape[2], int(seen.sum()))
        return attend(q, k[:, :, seen], v[:, :, seen], kernel=self.kernel), None


def broken(change: Any) -> type[StridedKeys]:
    """The method with another mixer: ``change`` gets the mixer, what it made, and the layout."""

    class Mixer(StridedMixer):
        calls = 0

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> Any:
            made, restore = super().__call__(q, k, v, x, context)
            self.calls += 1
            return change(self, made), restore

    class Broken(StridedKeys):
        def mixer(self, kernel: str) -> MergingMixer:
            return Mixer(self, kernel)

    return Broken


def reseed(mixer: Any, out: Tensor) -> Tensor:
    torch.manual_seed(0)
    return out


def draw_numpy(mixer: Any, out: Tensor) -> Tensor:
    np.random.rand()  # noqa: NPY002
    return out


def change_a_flag(mixer: Any, out: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("high")
    return out


class Rescaling(Alike):
    """Changes a parameter of the model."""

    def packer(self, model: nn.Module) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return super().packer(model)


class OneForAll(StridedKeys):
    """Gives all attentions the same object."""

    def mixers(self, kernel: str, depth: int) -> list[MergingMixer]:
        return [self.mixer(kernel)] * depth


BROKEN: list[tuple[Any, str, str]] = [
    # parameters, and the state of the process
    (Rescaling, "parameters_are_left_alone", "changed"),
    (broken(reseed), "nothing_global_is_touched", "it changed torch's generator"),
    (broken(draw_numpy), "nothing_global_is_touched", "it changed NumPy's generator"),
    (broken(change_a_flag), "nothing_global_is_touched", "it changed precision of matrix products"),
    # shape and order of the output
    (broken(lambda mixer, out: out[:, :, 1:]), "parameters_are_left_alone", "raises RuntimeError"),
    (broken(lambda mixer, out: out.flip(2)), "every_token_gets_the_mean_of_its_group", "the mean of their queries"),
    (
        broken(lambda mixer, out: out.mean(2, keepdim=True).expand_as(out)),
        "every_token_gets_the_mean",
        "special tokens",
    ),
    (broken(lambda mixer, out: out * 1.01), "a_constant_comes_back", "come back changed"),
    # what one forward leaves to the next
    (
        broken(lambda mixer, out: out * (1 + mixer.calls / 100)),
        "a_forward_leaves_nothing_to_the_next",
        "second forward",
    ),
    (OneForAll, "every_attention_has_an_object_of_its_own", "attentions share an object"),
    # and others
    (broken(lambda mixer, out: out.detach()), "gradients_reach_every_attention", "gets no gradient"),
    (broken(lambda mixer, out: out.mean(0, keepdim=True).expand_as(out)), "scenes_do_not_see_each_other", "two scenes"),
    (broken(lambda mixer, out: out / 0), "it_acts_and_keeps_every_shape", "non-finite|NaN"),
    (lambda bypass=True, ratio=0.5: StridedKeys(ratio=0.0, bypass=bypass), "it_acts_and_keeps_every_shape", "dense"),
    (lambda **knobs: nn.Identity(), "knobs_are_checked", "neither an AttentionMerging nor a SpanMerging"),
]


@pytest.fixture(autouse=True)
def flags_come_back() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return tiny_network("pi3")


@pytest.mark.parametrize("rule", MERGING_RULES)
def test_a_method_of_thirty_lines_holds_every_rule(network: nn.Module, rule: str) -> None:
    applies = check_rule(rule, Trial(StridedKeys, network))
    assert applies != (rule == "packed_rows_are_means")


@pytest.mark.parametrize(("method", "rule", "why"), BROKEN, ids=[f"{rule}: {why}" for _, rule, why in BROKEN])
def test_what_is_broken_is_found(network: nn.Module, method: Any, rule: str, why: str) -> None:
    (name,) = (name for name in MERGING_RULES if name.startswith(rule))
    with pytest.raises(AssertionError, match=why) as caught:
        check_rule(name, Trial(method, network))
    assert f"on pi3 breaks the rule {name!r}: " in str(caught.value)


@pytest.mark.parametrize("method", [Rescaling, broken(reseed), broken(lambda mixer, out: out[:, :, 1:])])
def test_the_first_broken_rule_ends_the_check(method: Any) -> None:
    with pytest.raises(AssertionError, match="breaks the rule"):
        check_merging_method(method)
    assert issubclass(method, AttentionMerging | SpanMerging)


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'vgt'"):
        check_merging_method(StridedKeys, ["vgt"])
