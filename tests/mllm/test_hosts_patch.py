"""A patch on hosts that fuse 2D and 3D features themselves, as VG-LLM does, wired as under transformers 4 and 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_hosts import STEPS, Fused4, Fused5, old_style
from tiny_hosts import CASES, FAMILIES, IMAGE, IMAGE_GRID, OTHER_GRID, VIDEO, batch, configuration, generated, tiny_host
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.mllm import Merge3DConfig, SaliencyProbe, TokenPlan, plan_merge
from geoaccel.mllm.hosts import patch, reduce_for_generate

transformers = pytest.importorskip("transformers")

CONFIG = Merge3DConfig(ratio=0.3)
NEW, OLD = tiny_host("qwen2_5_vl", Fused5), Fused4().eval()
IMAGES = ["single", "two images", "image first", "batched", "left-padded"]


def reference_plan(inputs: dict[str, Tensor], config: Merge3DConfig) -> TokenPlan:
    """From the streams themselves: 2D tokens without geometry, geometry features, saliency."""
    with torch.no_grad(), SaliencyProbe.for_model(NEW) as probe:
        sem = NEW.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        geo = NEW.geometry_merger(NEW.geometry_encoder(inputs["pixel_values"].view(-1, 4 * 96)).sin())
    sizes = (inputs["input_ids"] == IMAGE).sum(-1)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return plan_merge(probe.scores, sem, geo, config, cu_seqlens=edges)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("case", IMAGES)
def test_both_manners_equal_explicit_reduction(case: str) -> None:
    inputs = batch("qwen2_5_vl", *CASES[case])
    plan = reference_plan(inputs, CONFIG)
    # The encoder outputs of this host are fused already, so the same plan merges the sums.
    expected_ids, expected = generated(NEW, reduce_for_generate(NEW, inputs, plan=plan), STEPS)
    with patch(NEW, CONFIG) as patched:
        ids, logits = generated(NEW, inputs, STEPS)
    assert patched.plan is not None
    assert patched.plan.keep.equal(plan.keep)
    assert patched.plan.owner.equal(plan.owner)
    close(logits, expected)
    assert ids.equal(expected_ids)
    with patch(OLD, CONFIG) as patched:
        ids, logits = OLD.generate(**old_style(inputs))
    assert patched.plan is not None
    assert patched.plan.keep.equal(plan.keep)
    close(logits, expected)
    assert ids.equal(expected_ids)


@pytest.mark.parametrize("case", IMAGES)
def test_ratio_one_changes_nothing(case: str) -> None:
    inputs = batch("qwen2_5_vl", *CASES[case])
    stock_ids, stock = OLD.generate(**old_style(inputs))
    new_ids, new = generated(NEW, inputs, STEPS)
    close(new, stock)
    with patch(OLD, Merge3DConfig(ratio=1)):
        ids, logits = OLD.generate(**old_style(inputs))
    close(logits, stock)
    assert ids.equal(stock_ids)
    with patch(NEW, Merge3DConfig(ratio=1)):
        ids, logits = generated(NEW, inputs, STEPS)
    close(logits, new)
    assert ids.equal(new_ids)


def test_it_is_undone() -> None:
    inputs = batch("qwen2_5_vl", *CASES["two images"])
    stock = generated(NEW, inputs, STEPS)[1]
    hooks = hooks_of(NEW)
    patched = patch(NEW, CONFIG)
    assert not generated(NEW, inputs, STEPS)[1].equal(stock)
    with pytest.raises(ValueError, match=r"already patched; remove\(\) that patch first"):
        patch(NEW, CONFIG)
    patched.remove()
    patched.remove()
    assert generated(NEW, inputs, STEPS)[1].equal(stock)
    assert hooks_of(NEW) == hooks
    with pytest.raises(RuntimeError, match="stop"), patch(NEW, CONFIG):
        raise RuntimeError("stop")
    assert generated(NEW, inputs, STEPS)[1].equal(stock)


@pytest.mark.parametrize("host", [NEW, OLD], ids=["new", "old"])
def test_one_prompt_after_another(host: Any) -> None:
    """A prompt without images, one that failed, features asked for in between: none leaves a trace."""

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        if host is NEW:
            return generated(NEW, inputs, STEPS)[1]
        return OLD.generate(**(old_style(inputs) if "pixel_values" in inputs else inputs))[1]

    first, second = (batch("qwen2_5_vl", *CASES[case], seed=seed) for case, seed in (("single", 1), ("left-padded", 2)))
    text = {name: x for name, x in batch("qwen2_5_vl", (9,)).items() if name != "mm_token_type_ids"}
    plain = answer(text)
    with patch(host, CONFIG):
        expected = [answer(first), answer(second)]
        close(answer(text), plain)
        close(answer(first), expected[0])
        wrong = {**first, "input_ids": torch.where(first["input_ids"] == IMAGE, VIDEO, first["input_ids"])}
        with pytest.raises((ValueError, RuntimeError)):
            answer(wrong)
        close(answer(second), expected[1])
        if host is OLD:
            host.visual(first["pixel_values"], grid_thw=first["image_grid_thw"])
        close(answer(first), expected[0])


class NoMoreHooks(nn.Linear):
    """A module that takes no hooks, as a compiled one may."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")


def test_a_refused_patch_leaves_no_hooks() -> None:
    before = hooks_of(NEW)
    with pytest.raises(UserError, match=r"^no language model in a \w+: [^\n]*; patch the whole model"):
        patch(NEW.model.visual)
    with pytest.raises(UserError, match=r"^geometry is a str; give the module [^\n]*merger by name"):
        patch(NEW, geometry="geometry_merger")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no hooks here"):
        patch(NEW, geometry=NoMoreHooks(2, 2))
    assert hooks_of(NEW) == before
    patch(NEW, CONFIG).remove()  # and it can be patched


def test_cached_slots_are_counted_short() -> None:
    """What the language model is told agrees with what is in its cache."""
    inputs = old_style(batch("qwen2_5_vl", *CASES["left-padded"]))
    seen: list[tuple[list[int], tuple[int, ...], int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(
            (
                kwargs["cache_position"].tolist(),
                tuple(kwargs["attention_mask"].shape),
                kwargs["past_key_values"].get_seq_length(),
            )
        )

    with patch(OLD, CONFIG) as patched:
        handle = OLD.model.register_forward_pre_hook(note, with_kwargs=True)
        OLD.generate(**inputs)
        handle.remove()
    assert patched.source is not None
    short = patched.source.shape[1]
    assert short < inputs["input_ids"].shape[1]
    assert seen[0] == (list(range(short)), (2, short), 0)
    assert seen[1:] == [([short + step], (2, short + step + 1), short + step) for step in range(STEPS - 1)]


def test_deepstack_is_merged_by_the_same_plan() -> None:
    """Qwen3-VL has no geometry here; its early layers get visual features once more."""
    model, config = tiny_host("qwen3_vl"), Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
    for case in ("image and video", "left-padded, mixed"):
        inputs = batch("qwen3_vl", *CASES[case])
        expected_ids, expected = generated(model, reduce_for_generate(model, inputs, config), STEPS)
        with patch(model, config):
            ids, logits = generated(model, inputs, STEPS)
        close(logits, expected)
        assert ids.equal(expected_ids)


def test_a_merger_may_be_named() -> None:
    inputs = batch("qwen2_5_vl", *CASES["two images"])
    with patch(NEW, CONFIG) as by_name:
        generated(NEW, inputs, 1)
    with patch(NEW, CONFIG, geometry=NEW.geometry_encoder) as given:
        generated(NEW, inputs, 1)
    assert by_name.plan is not None
    assert given.plan is not None
    assert by_name.plan.keep.equal(given.plan.keep)  # saliency alone decides that
    assert not by_name.plan.owner.equal(given.plan.owner)


def test_bad_use_is_one_line() -> None:
    inputs = old_style(batch("qwen2_5_vl", (3, IMAGE_GRID, 2, OTHER_GRID, 4)))
    count = torch.arange(inputs["input_ids"].shape[1])
    with patch(OLD, CONFIG), torch.no_grad():
        for change, message in (
            ({"labels": inputs["input_ids"]}, "a patched model cannot train"),
            ({"attention_mask": torch.ones(1, 1, 23, 23)}, "generate without a static cache"),
        ):
            with pytest.raises(ValueError, match=message):
                OLD(**{**inputs, "cache_position": count, **change})
        text = {name: inputs[name][:, -3:] for name in ("input_ids", "attention_mask")}
        cache = OLD(**text, cache_position=count[:3], past_key_values=transformers.DynamicCache()).past_key_values
        with pytest.raises(ValueError, match="images after a cached conversation"):
            OLD(**inputs, cache_position=count + 3, past_key_values=cache)
    with pytest.raises(ValueError, match="no supported 2D encoder"):
        patch(nn.Linear(2, 2))
    for family in FAMILIES:
        assert configuration(family).image_token_id == IMAGE
