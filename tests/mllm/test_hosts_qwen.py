"""transformers' Qwen2.5-VL and Qwen3-VL with fewer visual tokens: the stock model at ratio 1, a manual one below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_hosts import CASES, FAMILIES, IMAGE, IMAGE_GRID, OTHER_GRID, VIDEO, VIDEO_GRID, batch, generated, tiny_host
from torch import Tensor

from geoaccel.mllm import BASELINES, GeometryTokens, Merge3DConfig, SaliencyProbe, TokenPlan, plan_merge
from geoaccel.mllm.hosts import patch, reduce_for_generate, reduce_inputs
from geoaccel.mllm.hosts.qwen import positions

HOSTS = {family: tiny_host(family) for family in FAMILIES}
STEPS = 10


def count(inputs: dict[str, Tensor]) -> int:
    return int((inputs["mm_token_type_ids"] > 0).sum())


def geometry(inputs: dict[str, Any]) -> Tensor:
    return torch.randn(count(inputs), 12, generator=torch.Generator().manual_seed(5))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_is_the_stock_model(family: str, case: str) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES[case])
    short = reduce_for_generate(model, inputs, Merge3DConfig(ratio=1), geometry=geometry)
    assert short["input_ids"].equal(inputs["input_ids"])
    assert short["position_ids"][0].equal((inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    with torch.no_grad():
        stock, ours = model(**inputs).logits, model(**short).logits
    attended = inputs["attention_mask"].bool()
    close(ours[attended], stock[attended])
    stock_ids, stock_logits = generated(model, inputs, STEPS)
    ids, logits = generated(model, short, STEPS)
    assert ids.equal(stock_ids)
    close(logits, stock_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_not_needed(family: str) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES["two images"])
    config = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
    expected = generated(model, reduce_for_generate(model, inputs, config), 3)[1]
    del inputs["attention_mask"]
    close(generated(model, reduce_for_generate(model, inputs, config), 3)[1], expected)


def encoded(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Visual tokens [n, C], DeepStack's levels and saliency [n], prompt by prompt in the order of the slots."""
    images, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
    with SaliencyProbe.for_model(model) as probe, torch.no_grad():
        image = None if images is None else model.get_image_features(images, inputs["image_grid_thw"])
        video = None if videos is None else model.get_video_features(videos, inputs["video_grid_thw"])
    queues = {}
    for kind, out in ((IMAGE, image), (VIDEO, video)):
        if out is not None:
            levels = [torch.cat(list(level)) for level in getattr(out, "deepstack_features", None) or []]
            queues[kind] = (torch.cat(list(out.pooler_output)), levels)
    sizes = {kind: len(rows) for kind, (rows, _) in queues.items()}
    scores = dict(zip(queues, probe.scores.split(list(sizes.values())), strict=True))
    taken = dict.fromkeys(queues, 0)
    rows, levels, saliency = [], [], []
    for token in inputs["input_ids"].flatten().tolist():
        if token in queues:
            at = taken[token]
            rows.append(queues[token][0][at])
            levels.append([level[at] for level in queues[token][1]])
            saliency.append(scores[token][at])
            taken[token] += 1
    assert taken == sizes
    return torch.stack(rows), [torch.stack(list(level)) for level in zip(*levels, strict=True)], torch.stack(saliency)


def manual(model: Any, inputs: dict[str, Tensor], plan: TokenPlan) -> tuple[list[list[int]], Tensor]:
    """Greedy answer and logits [B, steps, vocabulary] of each prompt alone, without cache, mask or padding.

    Every slot is listed by hand: text with its own position, a token that stays with its triple, nothing for others.
    """
    rows, levels, _ = encoded(model, inputs)
    short, short_levels = plan.apply(rows), [plan.apply(level) for level in levels]
    triples = positions(model, inputs)
    place = dict(zip(plan.keep.tolist(), range(plan.num_kept), strict=True))
    embed = model.get_input_embeddings()
    answers, logits, token = [], [], 0
    for row, mask in enumerate(inputs["attention_mask"].tolist()):
        vectors, where, visual, chosen, last = [], [], [], [], 0
        for slot, attended in enumerate(mask):
            if not attended:
                continue
            word, triple = inputs["input_ids"][row, slot], triples[:, row, slot]
            last = max(last, *triple.tolist())
            if int(word) in (IMAGE, VIDEO):
                token += 1
                if token - 1 not in place:
                    continue
                chosen.append(place[token - 1])
                vectors.append(short[chosen[-1]])
            else:
                vectors.append(embed(word))
            where.append(triple)
            visual.append(int(word) in (IMAGE, VIDEO))
        answer, found = [], []
        for _ in range(STEPS):
            more: dict[str, Any] = {}
            if short_levels:
                more["visual_pos_masks"] = torch.tensor(visual)[None]
                more["deepstack_visual_embeds"] = [level[chosen] for level in short_levels]
            with torch.no_grad():
                hidden = model.model.language_model(
                    inputs_embeds=torch.stack(vectors)[None],
                    position_ids=torch.stack(where, dim=-1)[:, None],
                    use_cache=False,
                    **more,
                )
                found.append(model.lm_head(hidden[0][0, -1]))
            answer.append(int(found[-1].argmax()))
            last += 1
            vectors.append(embed(torch.tensor(answer[-1])))
            where.append(torch.full((3,), last))
            visual.append(False)
        answers.append(answer)
        logits.append(torch.stack(found))
    return answers, torch.stack(logits)


@pytest.mark.parametrize("ratio", [0.3, 0.1])
@pytest.mark.parametrize("case", ["two images", "image and video", "left-padded, mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_explicit_positions(family: str, case: str, ratio: float) -> None:
    """Prefill and ten steps."""
    model, inputs, config = HOSTS[family], batch(family, *CASES[case]), Merge3DConfig(ratio=ratio)
    rows, _, scores = encoded(model, inputs)
    sizes = (inputs["mm_token_type_ids"] > 0).sum(-1)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    plan = plan_merge(scores, rows, geometry(inputs), config, cu_seqlens=edges)
    short = reduce_for_generate(model, inputs, config, geometry=geometry)
    answers, expected = manual(model, inputs, plan)
    ids, logits = generated(model, short, STEPS)
    assert plan.num_kept < count(inputs)
    assert int(torch.isin(short["input_ids"], torch.tensor([IMAGE, VIDEO])).sum()) == plan.num_kept
    close(logits, expected)
    assert ids.tolist() == answers
    stock = generated(model, inputs, STEPS)[1]
    assert float((stock - logits).abs().max()) > 1e-2  # a test that could not fail would show nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_continues_behind_the_original_maximum(family: str) -> None:
    model, inputs = HOSTS[family], batch(family, (2, (1, 12, 12), 3))
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    short = reduce_for_generate(model, inputs, Merge3DConfig(ratio=0.1, tau_geo=float("inf")))
    generated(model, short, 4)
    handle.remove()
    top = int(positions(model, inputs).max())
    assert top == 3 + 6 + 1 + 3 - 1
    assert [step[1:, 0, -1].tolist() for step in seen] == [[top + step] * 3 for step in range(4)]
    prompt = short["input_ids"].shape[1]
    assert [int(step[0, 0, -1]) for step in seen] == [prompt - 1 + step for step in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_batch_do_not_mix(family: str) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES["left-padded, mixed"])
    config = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
    together = reduce_inputs(model, inputs, config)
    assert together.plan.source_lengths == (6, 14, 0, 8)
    assert together.plan.lengths == (1, 4, 0, 2)
    logits = generated(model, together.arguments, 3)[1]
    alone = batch(family, CASES["left-padded, mixed"][1])
    alone["pixel_values"] = inputs["pixel_values"][24:]
    alone["pixel_values_videos"] = inputs["pixel_values_videos"][:32]
    close(logits[1:2], generated(model, reduce_for_generate(model, alone, config), 3)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_method_and_any_plan(family: str) -> None:
    model, inputs = HOSTS[family], batch(family, (2, IMAGE_GRID, 3, OTHER_GRID, 4))
    tokens = GeometryTokens(
        geometry(inputs), torch.zeros(12), (2, 3), torch.tensor([0, 12]), xyz=torch.randn(12, 3).double()
    )
    for name, method in BASELINES.items():
        short = reduce_inputs(model, inputs, method(ratio=0.5), geometry=tokens)
        assert short.plan.num_kept == 6, name
        assert generated(model, short.arguments, 2)[1].isfinite().all()
    ranked = replace(tokens, scores=torch.arange(12.0))
    zipped = BASELINES["visionzip-3d"](ratio=0.5)
    expected = zipped.plan(torch.arange(12.0), tokens.features, tokens.features)
    assert reduce_inputs(model, inputs, zipped, geometry=ranked).plan.keep.equal(expected.keep)
    assert not reduce_inputs(model, inputs, zipped, geometry=tokens).plan.keep.equal(expected.keep)
    gated = reduce_inputs(model, inputs, Merge3DConfig(ratio=0.5, gate="radius", gate_size=0.1), geometry=tokens)
    assert gated.plan.num_kept == 6
    framed = reduce_inputs(model, inputs, Merge3DConfig(ratio=0.34, scope="frame"), geometry=tokens)
    assert [int((framed.plan.keep // 6 == frame).sum()) for frame in (0, 1)] == [2, 2]
    again = reduce_for_generate(model, inputs, plan=gated.plan)
    close(generated(model, again, 2)[1], generated(model, gated.arguments, 2)[1])


@pytest.mark.parametrize(("budget", "kept_tokens"), [({"num_tokens": 5}, 5), ({"ratio": 0.5}, 6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_that_of_the_layer_asked_for(family: str, budget: dict[str, Any], kept_tokens: int) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES["two images"])
    kept = []
    for layer in (-1, -2):
        with SaliencyProbe.for_model(model, layer=layer) as probe, torch.no_grad():
            model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        config = Merge3DConfig(**budget, saliency_layer=layer, tau_geo=float("inf"))
        expected = probe.scores.sort(descending=True, stable=True).indices[:kept_tokens].sort().values
        assert reduce_inputs(model, inputs, config).plan.keep.equal(expected)
        with patch(model, config) as patched:
            generated(model, inputs, 1)
        assert patched.plan is not None
        assert patched.plan.keep.equal(expected)
        kept.append(expected)
    assert not kept[0].equal(kept[1])
    config = Merge3DConfig(saliency="cls_attention")
    with pytest.raises(ValueError, match="cls_attention needs a class token"):
        reduce_inputs(model, inputs, config)
    with pytest.raises(ValueError, match="cls_attention needs a class token"):
        patch(model, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_of_a_video_are_frames(family: str) -> None:
    """One token of every step stays, and of every image, whatever their order in the prompt."""
    model, inputs = HOSTS[family], batch(family, (2, VIDEO_GRID, 3, IMAGE_GRID, 1))
    config = Merge3DConfig(num_tokens=3, min_per_frame=1, tau_geo=float("inf"))
    keep = reduce_inputs(model, inputs, config).plan.keep.tolist()
    assert [token // 4 if token < 8 else 2 for token in keep] == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_answers_to_a_prompt(family: str) -> None:
    """Beams repeat prompts and what the encoder made of them."""
    model, inputs = HOSTS[family], batch(family, *CASES["left-padded"])
    config = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
    wide = model.generate(**reduce_for_generate(model, inputs, config), max_new_tokens=4, num_beams=2, do_sample=False)
    assert wide.shape[0] == 2
    alone = batch(family, CASES["left-padded"][0])
    alone["pixel_values"] = inputs["pixel_values"][:48]
    one = model.generate(**reduce_for_generate(model, alone, config), max_new_tokens=4, num_beams=2, do_sample=False)
    assert wide[0, -4:].equal(one[0, -4:])


@pytest.mark.parametrize("case", ["two images", "left-padded, mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_reduction_serves_several_calls(family: str, case: str) -> None:
    """Beams repeat what the encoder made in place."""
    model, inputs = HOSTS[family], batch(family, *CASES[case])
    config = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
    short = reduce_for_generate(model, inputs, config)
    wide = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    beams = model.generate(**reduce_for_generate(model, inputs, config), **wide)
    expected = generated(model, reduce_for_generate(model, inputs, config), 3)[1]
    for _ in range(2):
        assert model.generate(**short, **wide).equal(beams)
        close(generated(model, short, 3)[1], expected)
    with torch.no_grad():
        model(**dict(short))
    assert (
        short["mm_encoder_outputs"]["image"].pooler_output[0] is short["mm_encoder_outputs"]["image"].pooler_output[0]
    )
    assert set(short) == {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs"}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_shortened_labels(family: str) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES["left-padded"])
    labels = torch.where(inputs["mm_token_type_ids"] > 0, -100, inputs["input_ids"])
    # The first token of a prompt has nothing in front of it but padding, on one side.
    inputs["labels"] = labels.masked_fill(inputs["attention_mask"].cumsum(-1) < 2, -100)
    stock = model(**inputs).loss
    whole = reduce_inputs(model, inputs, Merge3DConfig(ratio=1, tau_geo=float("inf")), padding_side="right")
    close(model(**whole.arguments).loss, stock)
    short = reduce_inputs(model, inputs, Merge3DConfig(ratio=0.3, tau_geo=float("inf")), padding_side="right")
    loss = model(**short.arguments).loss
    weight = next(model.model.visual.merger.parameters())
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.abs().max()) > 0


def without_argument(self: Any, input_ids: Any = None, pixel_values: Any = None) -> None:
    """The signature of an older transformers."""


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HOSTS["qwen2_5_vl"]
    good = batch("qwen2_5_vl", *CASES["two images"])
    semantic = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))

    def refused(inputs: dict[str, Tensor], message: str, **more: Any) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            reduce_for_generate(model, inputs, semantic, **more)
        assert message in str(error.value)

    ids = good["input_ids"].clone()
    ids[0, 3] = 7
    refused({**good, "input_ids": ids}, "11 image placeholders in input_ids but 12 image embeddings")
    video = torch.where(good["input_ids"] == IMAGE, VIDEO, good["input_ids"])
    refused({**good, "input_ids": video}, "0 image placeholders in input_ids but 12 image embeddings")
    refused(batch("qwen2_5_vl", (5,)), "these inputs have no image or video")
    refused(good, "11 rows of geometry features for 12 visual tokens", geometry=torch.ones(11, 3))
    last = int((good["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    cut = {name: good[name][:, :last] for name in ("input_ids", "attention_mask")}
    refused({**good, **cut}, "a prompt ends in a visual token")
    refused({**good, **cut, "attention_mask": None}, "a prompt ends in a visual token")
    plan = reduce_inputs(model, good, semantic).plan
    refused(batch("qwen2_5_vl", *CASES["single"]), "prompt 0 has 6 placeholders and the plan 12 tokens", plan=plan)
    monkeypatch.setattr(type(model), "forward", without_argument)
    refused(good, "forward does not accept mm_encoder_outputs (transformers")
    refused(good, "pip install 'transformers>=5.20'")
