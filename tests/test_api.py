"""The verbs on every backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from references import Golden
from torch import nn

import geoaccel
from geoaccel.attention import DENSE, AttentionContext, ForwardState
from geoaccel.attention_kernels import KERNELS
from geoaccel.layout import TokenLayout
from geoaccel.merging.fastvggt import FastVGGT
from geoaccel.merging.method import AttentionMerging, Effect, MergingMixer, MergingPacker, SpanMerging
from geoaccel.models.weights import save_model


def test_restore_is_bit_exact(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    with torch.no_grad():
        before = tiny(images)
        geoaccel.accelerate(tiny, attention="matmul")
        assert "matmul" in str(geoaccel.describe(tiny))
        geoaccel.restore(tiny)
        after = tiny(images)
    assert "matmul" not in str(geoaccel.describe(tiny))
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key


def test_accelerate_replaces_an_earlier_call(tiny: nn.Module) -> None:
    keys = list(tiny.state_dict())
    twice = geoaccel.accelerate(geoaccel.accelerate(tiny, attention="matmul"), attention="sdpa")
    assert twice is tiny
    assert str(geoaccel.describe(twice)) == str(geoaccel.describe(geoaccel.accelerate(twice)))
    assert list(tiny.state_dict()) == keys


@pytest.mark.parametrize("axis", ["merging", "quantization", "attention"])
def test_typos_name_what_there_is_and_change_nothing(tiny: nn.Module, axis: str) -> None:
    geoaccel.accelerate(tiny, attention="matmul")
    before = str(geoaccel.describe(tiny))
    with pytest.raises(ValueError, match=r"unknown .* 'htm'; known: "):
        geoaccel.accelerate(tiny, **{axis: "htm"})
    assert str(geoaccel.describe(tiny)) == before


def test_attention_typo_suggests() -> None:
    with pytest.raises(ValueError, match="Did you mean 'sdpa'"):
        geoaccel.accelerate(nn.Linear(1, 1), attention="sdp")


def test_describe_counts(tiny: nn.Module) -> None:
    description = geoaccel.describe(tiny)
    assert description.parameters == sum(p.numel() for p in tiny.parameters())
    assert sum(description.dtypes.values()) == description.parameters
    assert sum(description.mixers["global"].values()) == len(tiny.backbone.sites(tiny)["global"])
    with pytest.raises(ValueError, match="not a geoaccel model"):
        geoaccel.describe(nn.Linear(1, 1))


def test_no_global_state_is_touched(tiny: nn.Module, golden: Golden) -> None:
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    with torch.no_grad():
        geoaccel.accelerate(tiny, attention="matmul")(golden["inputs.images"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]


def test_lists_are_sorted_names() -> None:
    for names in (geoaccel.list_models(), geoaccel.list_merging(), geoaccel.list_quantization()):
        assert names == sorted(names)


# ------------------------------------------------------------------------------------------------------ merging


@dataclass(frozen=True)
class Nothing(AttentionMerging):
    """Merges nothing, also of packed rows."""

    name: ClassVar[str] = "nothing"
    takes_packed: ClassVar[bool] = True
    knob: int = 0

    def mixer(self, kernel: str) -> MergingMixer:
        return NothingMixer(self, kernel)


class NothingMixer(MergingMixer):
    def __call__(self, q: Any, k: Any, v: Any, x: Any, context: AttentionContext) -> Any:
        return self.dense(q, k, v, x, context, "it is a test")


@dataclass(frozen=True)
class Span(SpanMerging):
    """Leaves the stream as it is, or refuses the model."""

    name: ClassVar[str] = "span"
    refuse: bool = False

    def packer(self, model: nn.Module) -> Any:
        if self.refuse:
            raise ValueError("not this model")
        return SpanPacker(self, layer=0)


class SpanPacker(MergingPacker):
    def __call__(self, x: torch.Tensor, layout: TokenLayout, state: ForwardState) -> None:
        self.effect = Effect(layout.tokens_per_scene, layout.tokens_per_scene / 2, layout.tokens_per_scene / 4)


def packers(model: nn.Module) -> list[Any]:
    return [module.token_packer for module in model.modules() if hasattr(module, "token_packer")]


def test_methods_act_in_their_places_and_say_what_they_did(tiny: nn.Module, golden: Golden) -> None:
    geoaccel.accelerate(tiny, merging=[Nothing(knob=3), Span()], attention="matmul")
    span, nothing = sorted(geoaccel.describe(tiny).merging, key=lambda action: action.method.name, reverse=True)
    assert (span.effective_ratio, span.effective_key_ratio, span.bypassed) == (None, None, {})
    assert "no forward yet" in str(span)
    with torch.no_grad():
        tiny(golden["inputs.images"])
    sites = tiny.backbone.sites(tiny)
    assert {site.mixer.kernel for kind in sites for site in sites[kind]} == {"matmul"}
    description = geoaccel.describe(tiny)
    depth = len(sites["global"])
    assert description.mixers["global"] == {"nothing": depth}
    span, nothing = sorted(description.merging, key=lambda action: action.method.name, reverse=True)
    assert (span.place, span.method, span.effective_ratio, span.effective_key_ratio) == (
        "token stream",
        Span(),
        0.5,
        0.75,
    )
    assert (nothing.effective_ratio, nothing.bypassed) == (0, {"it is a test": depth})
    assert "50.0% of the queries and 75.0% of the keys removed" in str(description)
    assert "knob=3); in the last forward" in str(description)
    assert f"{depth} x dense (it is a test)" in str(description)
    geoaccel.restore(tiny)
    assert set(packers(tiny)) == {None}
    assert all(site.mixer is DENSE for kind in sites for site in sites[kind])


def test_names_methods_and_lists_mean_the_same(tiny: nn.Module) -> None:
    for merging in ("fastvggt", FastVGGT(), ["fastvggt"], (FastVGGT(),)):
        (action,) = geoaccel.describe(geoaccel.accelerate(tiny, merging=merging)).merging
        assert action.method == FastVGGT()
    assert geoaccel.describe(geoaccel.accelerate(tiny, merging=[])).merging == ()
    assert {"alike", "avggt", "come", "fastvggt", "httm", "litevggt"} <= set(geoaccel.list_merging())
    assert geoaccel.merging.FastVGGT is FastVGGT
    with pytest.raises(AttributeError, match="FastVGT"):
        _ = geoaccel.merging.FastVGT


@pytest.mark.parametrize(
    ("merging", "error", "message"),
    [
        (["fastvggt", "litevggt"], ValueError, "fastvggt and litevggt both merge in the global attention"),
        ([FastVGGT(), FastVGGT(ratio=0.5)], ValueError, "fastvggt and fastvggt both"),
        ([Span(), Span()], ValueError, "span and span both merge in the token stream"),
        ([Span(), FastVGGT()], ValueError, "fastvggt needs dense tokens, which span packs"),
        ([FastVGGT(), Span()], ValueError, "fastvggt needs dense tokens, which span packs"),
        ([Nothing(), Span(refuse=True)], ValueError, "not this model"),
        (["fastvggt", "litevgt"], ValueError, "Did you mean 'litevggt'"),
        (3, TypeError, "got int 3"),
        (FastVGGT, TypeError, "got the class FastVGGT; call it"),
        ([None], TypeError, "got NoneType None"),
        ({"fastvggt": {}}, TypeError, "got dict"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(
    tiny: nn.Module, merging: Any, error: type[Exception], message: str
) -> None:
    geoaccel.accelerate(tiny, merging=Nothing(), attention="matmul")
    before, mixers = str(geoaccel.describe(tiny)), [getattr(module, "mixer", None) for module in tiny.modules()]
    with pytest.raises(error, match=message) as caught:
        geoaccel.accelerate(tiny, merging=merging)
    assert "\n" not in str(caught.value)
    assert str(geoaccel.describe(tiny)) == before
    assert all(getattr(module, "mixer", None) is mixer for module, mixer in zip(tiny.modules(), mixers, strict=True))


def test_a_kernel_is_changed_without_touching_the_default(tiny: nn.Module) -> None:
    geoaccel.accelerate(tiny, merging=Nothing(), attention="matmul")
    geoaccel.accelerate(tiny, merging=Nothing())
    sites = tiny.backbone.sites(tiny)
    assert {site.mixer.kernel for kind in sites for site in sites[kind]} == {"sdpa"}


def test_heads_do_not_round(tiny: nn.Module) -> None:
    """With a kernel that rounds the trunk's attentions have it, those of the heads torch's; describe says so."""
    sites = [site for sites in tiny.backbone.sites(tiny).values() for site in sites]
    heads = [module for module in tiny.modules() if hasattr(module, "mixer") and module not in sites]
    assert heads
    for kernel in KERNELS:
        geoaccel.accelerate(tiny, attention=kernel)
        assert {site.mixer.kernel for site in sites} == {kernel}
        own = "sdpa" if kernel == "fp8" else kernel
        assert {head.mixer.kernel for head in heads} == {own}
        mixers = geoaccel.describe(tiny).mixers
        assert mixers["head"] == {f"DenseMixer(kernel={own!r})": len(heads)}
        assert mixers["global"] == {f"DenseMixer(kernel={kernel!r})": len(tiny.backbone.sites(tiny)["global"])}
    geoaccel.accelerate(tiny, merging=Nothing(), attention="fp8")
    assert {head.mixer.kernel for head in heads} == {"sdpa"}


@pytest.mark.parametrize("verb", ["accelerate", "restore", "describe", "adopt", "save_model"])
@pytest.mark.parametrize(("given", "named"), [("vggt-mini", "'vggt-mini'"), (None, "a NoneType")])
def test_what_is_no_model_is_one_line(verb: str, given: Any, named: str) -> None:
    calls = {"save_model": lambda model: save_model(model, "nowhere.safetensors", dtype=torch.float32)}
    with pytest.raises(TypeError, match=f"^model is {named}; load it first: geoaccel.load_model"):
        calls.get(verb, getattr(geoaccel, verb, None))(given)
