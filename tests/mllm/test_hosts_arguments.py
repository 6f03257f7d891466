"""What a host hands over under other names and in other places, whatever transformers is installed."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_hosts import Fused4, old_style
from tiny_hosts import CASES, FAMILIES, IMAGE, VIDEO, batch, tiny_host
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.mllm import Merge3DConfig, SaliencyProbe
from geoaccel.mllm.handed import by_name, handed_cache, returned_cache
from geoaccel.mllm.hosts import patch, reduce_for_generate

transformers = pytest.importorskip("transformers")

CONFIG = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
NAMES = ("cache", "past_key_values")
HOSTS = {name: Fused4(name).eval() for name in NAMES}
INPUTS = old_style(batch("qwen2_5_vl", *CASES["left-padded"]))
OTHER = old_style(batch("qwen2_5_vl", *CASES["single"]))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def two_turns(host: Fused4) -> Tensor:
    """Logits [B, steps, vocabulary] of an answer, and of a second turn behind its cache."""
    cache = transformers.DynamicCache()
    with patch(host, CONFIG):
        ids, first = host.generate(**INPUTS, past_key_values=cache, without=(IMAGE, VIDEO))
        words = torch.cat([INPUTS["input_ids"], ids, torch.tensor([[11, 12]]).expand(len(ids), -1)], dim=1)
        more = torch.ones(len(ids), words.shape[1] - INPUTS["input_ids"].shape[1], dtype=torch.int64)
        mask = torch.cat([INPUTS["attention_mask"], more], dim=1)
        second = host.generate(words, mask, past_key_values=cache)[1]
        afresh = host.generate(**{**INPUTS, "input_ids": words, "attention_mask": mask})[1]
    close(second, afresh)
    return torch.cat([first, second], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_may_have_either_name(name: str) -> None:
    found = two_turns(HOSTS[name])
    close(found, two_turns(HOSTS["past_key_values"]))
    model = tiny_host("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", *CASES["left-padded"])
    with patch(model, CONFIG) as patched:
        model.generate(**inputs, max_new_tokens=1)
    assert patched.source is not None
    assert patched.source.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_the_language_model_made_is_its_prompt_s(name: str) -> None:
    host = HOSTS[name]
    count, word = torch.arange(INPUTS["input_ids"].shape[1]), torch.tensor([[5], [6]])
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    logits = []
    with patch(host, CONFIG), torch.no_grad():
        for between in (False, True):
            cache = host(**INPUTS, cache_position=count).past_key_values
            rope = host.rope_deltas
            if between:
                host(**OTHER, cache_position=torch.arange(OTHER["input_ids"].shape[1]))
                host.rope_deltas = rope
            step = host(input_ids=word, attention_mask=mask, past_key_values=cache, cache_position=count[-1:] + 1)
            logits.append(step.logits)
    close(logits[1], logits[0])


def test_arguments_may_come_without_names() -> None:
    """The host's own, and those of its language model."""
    host = Fused4().eval()
    expected = two_turns(host)
    inner = host.model
    order = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.embed_tokens, self.cache = inner.layers, inner.embed_tokens, inner.cache

        def __call__(self, **kwargs: Any) -> Any:
            kwargs.pop("input_ids")
            return super().__call__(*[kwargs.pop(name) for name in order], **kwargs)

        def forward(
            self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, **more: Any
        ) -> Any:
            given = (inputs_embeds, attention_mask, position_ids, past_key_values)
            return inner(input_ids=None, **dict(zip(order, given, strict=True)), **more)

    host.model = Positional()
    close(two_turns(host), expected)
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    count = torch.arange(ids.shape[1])
    rest = {name: INPUTS[name] for name in ("pixel_values", "image_grid_thw", "images_vggt")}
    with patch(host, CONFIG) as patched, torch.no_grad():
        host(ids, mask, None, count, **rest)
        assert patched.source is not None
        with pytest.raises(UserError, match="a patched model cannot train"):
            host(ids, mask, None, count, *rest.values(), ids)


def test_an_unknown_name_of_a_cache_is_said() -> None:
    host = Fused4("memory").eval()
    with patch(host, CONFIG):
        with pytest.raises(UserError, match=r"^LanguageModel has a cache in memory, .*cache or past_key_values[^\n]*$"):
            host.generate(**INPUTS)
        count = torch.arange(INPUTS["input_ids"].shape[1])
        with pytest.raises(UserError, match="SimpleNamespace has a cache in memory"), torch.no_grad():
            host(**INPUTS, cache_position=count)  # the language model makes one


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_cache_is_said(name: str) -> None:
    host, pairs = HOSTS[name], ((torch.ones(1), torch.ones(1)),)
    with patch(host, CONFIG), pytest.raises(UserError, match=rf"^{name} of LanguageModel is a tuple without get_seq"):
        host(**INPUTS, cache_position=torch.arange(9), past_key_values=pairs)
    one, two = transformers.DynamicCache(), transformers.DynamicCache()
    assert handed_cache({"cache": one, "past_key_values": one, "use_cache": True}, host) is one
    assert handed_cache({"cache": None, "past_key_values": one}, host) is one
    with pytest.raises(UserError, match="Fused4 has two caches, one in each of cache and past_key_values"):
        handed_cache({"cache": one, "past_key_values": two}, host)
    assert returned_cache((torch.ones(1), one)) is one
    assert returned_cache((torch.ones(1),)) is returned_cache(torch.ones(1)) is None


@pytest.mark.parametrize(
    ("shape", "refused"),
    [
        ((-1,), True),
        ((2, -1), True),
        ((2, -1, 4), True),
        ((3, 2, -1), True),
        ((2, 1, -1, -1), True),
        ((2, 4), False),
        ((7,), False),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_an_unknown_argument_along_the_prompt_is_said(shape: tuple[int, ...], refused: bool, listed: bool) -> None:
    """Under another name a mask, positions or types of tokens would stay long."""
    host, length = Fused4().eval(), INPUTS["input_ids"].shape[1]
    tensor = torch.ones([length if side < 0 else side for side in shape])
    host.beside = {"beside": [tensor] if listed else tensor}
    with patch(host, CONFIG):
        if refused:
            with pytest.raises(UserError, match=rf"LanguageModel got beside \[.*\[2, {length}\][^\n]*$"):
                host.generate(**INPUTS)
        else:
            host.generate(**INPUTS)


# A patch makes the positions of later tokens itself.
@pytest.mark.parametrize(("name", "step"), [("inputs_embeds", 0), ("inputs_embeds", 1), ("position_ids", 0)])
def test_a_missing_argument_is_said(name: str, step: int) -> None:
    host, calls = Fused4().eval(), []

    def rename(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        calls.append(1)
        return args, {("renamed" if key == name and len(calls) > step else key): x for key, x in kwargs.items()}

    host.model.register_forward_pre_hook(rename, with_kwargs=True)
    with patch(host, CONFIG), pytest.raises(UserError, match=rf"got no {name}, only .*renamed[^\n]*$"):
        host.generate(**INPUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_encoder_is_handed_and_returns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_host(family), batch(family, *CASES["two images"])
    tower = model.model.visual
    with SaliencyProbe.for_model(model) as probe, torch.no_grad():
        tower(inputs["pixel_values"], inputs["image_grid_thw"])
        tower(hidden_states=inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    first, second = probe.scores.chunk(2)
    close(first, second)
    with (
        patch(model, CONFIG),
        pytest.raises(UserError, match=f"{type(tower).__name__} got no grid_thw, only hid"),
    ):
        tower(inputs["pixel_values"], grids=inputs["image_grid_thw"])
    attention = probe.attention
    with probe, pytest.raises(UserError, match=f"{type(attention).__name__} got no cu_seqlens, only hidden_st"):
        attention(torch.ones(4, 16), edges=torch.tensor([0, 4]), position_embeddings=(torch.ones(4, 8),) * 2)
    tower.register_forward_hook(lambda module, args, output: (output.pooler_output, []))
    with patch(model, CONFIG), pytest.raises(UserError, match="returned a tuple without pooler_output"):
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    monkeypatch.setattr(model, "get_image_features", lambda *args, **kwargs: SimpleNamespace(tokens=torch.ones(12, 32)))
    with pytest.raises(UserError, match=f"{type(model).__name__} returned a SimpleNamespace without pooler_output"):
        reduce_for_generate(model, inputs, CONFIG)


def test_deepstack_without_its_features_is_said() -> None:
    model, inputs = tiny_host("qwen3_vl"), batch("qwen3_vl", *CASES["two images"])

    def rename(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {key.replace("deepstack_visual_embeds", "levels"): value for key, value in kwargs.items()}

    model.model.language_model.register_forward_pre_hook(rename, with_kwargs=True)
    with patch(model, CONFIG), pytest.raises(UserError, match=r"no deepstack_visual_embeds, only .*levels"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("config", ["httm", Merge3DConfig, "merge3d", None])
def test_a_config_that_is_no_method_is_said_before_anything_is_hooked(config: Any) -> None:
    model = tiny_host("qwen2_5_vl")
    inputs = batch("qwen2_5_vl", *CASES["single"])
    for reduce in (lambda: patch(model, config), lambda: reduce_for_generate(model, inputs, config)):
        with pytest.raises(UserError, match=r"^config=.*: give a method with its knobs, .* one of .*divprune[^\n]*$"):
            reduce()
    patch(model, CONFIG).remove()  # it has no patch


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_processor_returns_is_one_line(family: str) -> None:
    model, good = tiny_host(family), batch(family, *CASES["single"])

    def refused(message: str, inputs: Any = good, host: Any = model, **more: Any) -> None:
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            reduce_for_generate(host, inputs, CONFIG, **more)

    refused(r"inputs is a Tensor; give all that the processor returns", good["input_ids"])
    for name in ("input_ids", "image_grid_thw"):
        rest = {key: value for key, value in good.items() if key != name}
        refused(rf"inputs have no {name}, only .*pixel_values", rest)
        refused(rf"inputs have no {name}, only", {**good, name: None})
    whole = r"; give transformers' whole Qwen2_5_VLForConditionalGeneration or Qwen3VL"
    refused(rf"model is a {type(model.model).__name__}{whole}", host=model.model)
    refused(rf"model is a dict{whole}", model, good)  # the wrong way round
    refused(rf"model is a Linear{whole}", host=nn.Linear(2, 2))
    refused(
        r"geometry is a ndarray; give what geometry_features returns, or a tensor", geometry=torch.ones(6, 3).numpy()
    )
    refused(r"geometry is a list; give what", geometry=[1, 2])
    refused(r"geo must be floating point, got torch.int64", geometry=torch.ones(6, 3, dtype=torch.int64))


def test_arguments_get_their_names() -> None:
    class Named(nn.Module):
        def forward(self, x: int, *, y: int = 0) -> None: ...

    assert by_name(Named(), (1,), {"y": 2}) == {"x": 1, "y": 2}
    with pytest.raises(UserError, match=r"^Named\.forward got 2 positional arguments but names only 1"):
        by_name(Named(), (1, 2), {})


def test_what_is_logged_as_deprecated_would_be_seen(deprecations: list[str]) -> None:
    for logger in ("transformers", "transformers.generation.utils"):
        for _ in range(2):
            logging.getLogger(logger).warning_once("`this` is deprecated")  # type: ignore[attr-defined]
        logging.getLogger(logger).warning("a common warning")
    assert deprecations == ["`this` is deprecated"] * 2
    deprecations.clear()
    with pytest.raises(FutureWarning, match="is deprecated"):
        warnings.warn("`this` is deprecated", FutureWarning, stacklevel=1)
