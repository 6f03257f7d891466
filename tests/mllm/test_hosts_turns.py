"""What comes behind a shortened prompt: later turns, guessed words, steps by hand; and what a patch refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_hosts import Fused4, Fused5, old_style
from tiny_hosts import CASES, FAMILIES, IMAGE, IMAGE_GRID, OTHER_GRID, VIDEO, batch, cache_argument, tiny_host
from torch import Tensor

from geoaccel.mllm import Merge3DConfig
from geoaccel.mllm.handed import returned_cache
from geoaccel.mllm.hosts import patch, reduce_for_generate
from geoaccel.mllm.hosts.conversation import Conversation

transformers = pytest.importorskip("transformers")

CONFIG = Merge3DConfig(ratio=0.3, tau_geo=float("inf"))
HOSTS = {family: tiny_host(family) for family in FAMILIES}
FUSED5, FUSED4 = tiny_host("qwen2_5_vl", Fused5), Fused4().eval()
QUESTION = [11, 12, 13]
CACHE = cache_argument(FUSED5)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def answer(model: Any, inputs: Any, steps: int = 4, **options: Any) -> Any:
    """Greedy, without placeholders in the answer, which a real vocabulary hardly gives."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO], **options}
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **options
        )


def asked_again(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The whole conversation, and a question behind it."""
    rows = len(sequences)
    ids = torch.cat([sequences, torch.tensor(QUESTION).expand(rows, -1)], dim=1)
    later = torch.ones(rows, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], later], dim=1)}


def with_pixels(inputs: dict[str, Tensor], turn: dict[str, Tensor]) -> dict[str, Tensor]:
    """A later turn as a prompt of its own."""
    ids = turn["input_ids"]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return {**inputs, **turn, "mm_token_type_ids": kinds}


@pytest.mark.parametrize("case", ["single", "two images", "image first", "image and video", "left-padded"])
@pytest.mark.parametrize("host", [*FAMILIES, "fused"])
def test_a_second_and_third_turn_equal_the_conversation_afresh(host: str, case: str) -> None:
    family = "qwen2_5_vl" if host == "fused" else host
    if host == "fused" and case == "image and video":
        pytest.skip("this host fuses images only")
    model, inputs = HOSTS.get(host, FUSED5), batch(family, *CASES[case])
    with patch(model, CONFIG) as patched:
        conversations, expected = [], []
        words = answer(model, inputs).sequences
        for _ in range(2):
            conversations.append(asked_again(inputs, words))
            afresh = answer(model, with_pixels(inputs, conversations[-1]))
            expected.append(torch.stack(afresh.logits))
            words = afresh.sequences
        for manner in ("whole", "new", "with token types"):
            cache = returned_cache(answer(model, inputs))
            assert patched.source is not None
            assert cache.get_seq_length() == patched.source.shape[1] + 3 < inputs["input_ids"].shape[1] + 3
            for conversation, logits in zip(conversations, expected, strict=True):
                turn: dict[str, Any] = {**conversation, CACHE: cache}
                if manner == "new":
                    turn["input_ids"] = conversation["input_ids"][:, -4:]  # the last word of the answer is not cached
                if manner == "with token types":
                    turn["mm_token_type_ids"] = with_pixels(inputs, conversation)["mm_token_type_ids"]
                cached = cache.get_seq_length()
                close(torch.stack(answer(model, turn).logits), logits)
                assert cache.get_seq_length() == cached + 4 + 3


@pytest.mark.parametrize("case", ["single", "two images", "left-padded"])
def test_a_second_turn_as_transformers_4_cuts_it(case: str) -> None:
    inputs = old_style(batch("qwen2_5_vl", *CASES[case]))
    with patch(FUSED4, CONFIG):
        cache = transformers.DynamicCache()
        ids, _ = FUSED4.generate(**inputs, past_key_values=cache, without=(IMAGE, VIDEO))
        turn = asked_again(inputs, torch.cat([inputs["input_ids"], ids], dim=1))
        found = FUSED4.generate(**turn, past_key_values=cache)
        afresh = FUSED4.generate(**{**inputs, **turn})
    close(found[1], afresh[1])
    assert found[0].equal(afresh[0])


def test_conversations_may_take_turns() -> None:
    """Prompts with and without images in between, and two answers from copies of one cache."""
    model, words = HOSTS["qwen2_5_vl"], torch.arange(20, 29)[None]
    text = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    prompts = [batch("qwen2_5_vl", *CASES[case]) for case in ("single", "two images")]
    with patch(model, CONFIG):
        for between in (text, *prompts):
            firsts = [answer(model, inputs) for inputs in prompts]
            answer(model, between)
            for inputs, first in zip(prompts, firsts, strict=True):
                turn = asked_again(inputs, first.sequences)
                found = answer(model, {**turn, CACHE: returned_cache(first)})
                close(torch.stack(found.logits), torch.stack(answer(model, with_pixels(inputs, turn)).logits))
        with torch.no_grad():
            prefix = returned_cache(model(**prompts[0], use_cache=True))
        for more in ([31, 32], [33, 34, 35]):
            ids = torch.cat([prompts[0]["input_ids"], torch.tensor([more])], dim=1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found = answer(model, {**turn, CACHE: copy.deepcopy(prefix)})
            close(torch.stack(found.logits), torch.stack(answer(model, with_pixels(prompts[0], turn)).logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [True, False])
def test_steps_by_hand_equal_generate(family: str, masked: bool) -> None:
    """Without a mask the host takes positions from the length of its cache, which is short."""
    model, inputs = HOSTS[family], batch(family, *CASES["two images"])
    with patch(model, CONFIG), torch.no_grad():
        expected = answer(model, inputs, 5)
        out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        logits = [out.logits[:, -1]]
        for step in range(1, 5):
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            word = expected.sequences[:, inputs["input_ids"].shape[1] + step - 1][:, None]
            cache = {CACHE: returned_cache(out)}
            out = model(input_ids=word, attention_mask=mask if masked else None, **cache)
            logits.append(out.logits[:, -1])
    close(torch.stack(logits), torch.stack(expected.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_equals_one_word_at_a_time(family: str) -> None:
    """Guesses are in the prefill already where the prompt repeats itself; what is rejected leaves the cache again."""
    model, rejected = HOSTS[family], 0
    for seed in range(6):
        inputs = batch(family, (3, IMAGE_GRID, 8), seed=seed)
        inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
        with patch(model, CONFIG) as patched:
            expected = answer(model, inputs, 12)
            short = patched.source.shape[1]
            found = answer(model, inputs, 12, prompt_lookup_num_tokens=2)
            rejected += patched.source.shape[1] > short
        assert found.sequences.equal(expected.sequences)
        close(torch.stack(found.logits), torch.stack(expected.logits))
    assert rejected == 6


def test_what_does_not_come_next_is_one_line() -> None:
    model = HOSTS["qwen2_5_vl"]
    inputs, other = (batch("qwen2_5_vl", *CASES[case]) for case in ("two images", "single"))
    with patch(model, CONFIG) as patched:
        first = answer(model, inputs)
        turn = asked_again(inputs, first.sequences)
        length, removed = turn["input_ids"].shape[1], inputs["input_ids"].shape[1] - patched.source.shape[1]

        def refused(message: str, change: dict[str, Any], crop: int = 0, **options: Any) -> None:
            cache = copy.deepcopy(returned_cache(first))
            if crop:
                cache.crop(-crop)
            with pytest.raises(ValueError, match=message) as caught:
                answer(model, {**turn, CACHE: cache, **change}, **options)
            assert "\n" not in str(caught.value)

        edited = turn["input_ids"].clone()
        edited[:, length - 6] = 77  # in the first answer
        refused("input_ids differ from what is in the cache, somewhere from slot 19 to 27", {"input_ids": edited})
        mask = torch.ones(1, length - 1, dtype=torch.int64)
        mask[:, 0] = 0
        refused(f"tokens behind .* cached slots, from which {removed} were merged away", {"attention_mask": mask})
        refused("tokens behind .* do not make a conversation", {}, prefill_chunk_size=removed)
        refused("ends in 5 of text: crop no more than these", {}, crop=9)
        twice = {name: tensor.repeat(2, 1) for name, tensor in turn.items()}
        cache = copy.deepcopy(returned_cache(first))
        cache.batch_repeat_interleave(2)
        refused("2 rows after a prefill of 1", {**twice, CACHE: cache})
        answer(model, other)
        refused("differ from what is in the cache|do not make a conversation", {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "needs use_cache=True; without a cache, remove the patch and use reduce_for_generate"),
        (
            {"num_beams": 2},
            "one output per prompt, not 2; leave out num_beams and num_return_sequences, or remove the patch",
        ),
        ({"do_sample": True, "num_return_sequences": 3}, "one output per prompt, not 3; leave out num_beams"),
        (
            {"prefill_chunk_size": 4},
            "an unreduced prompt in one piece.*leave out prefill_chunk_size, or remove the patch",
        ),
    ],
)
@pytest.mark.parametrize("case", ["single", "image and video"])
def test_manners_of_generating_that_it_cannot_do(family: str, options: dict[str, Any], message: str, case: str) -> None:
    model, inputs = HOSTS[family], batch(family, *CASES[case])
    with patch(model, CONFIG), pytest.raises(ValueError, match=message) as caught:
        answer(model, inputs, 2, **options)
    assert "\n" not in str(caught.value)
    # What the message points at does it.
    short = reduce_for_generate(model, inputs, CONFIG)
    assert answer(model, short, 2, **options).sequences.shape[1] == short["input_ids"].shape[1] + 2


def test_one_forward_needs_no_cache() -> None:
    model, inputs = HOSTS["qwen3_vl"], batch("qwen3_vl", (2, IMAGE_GRID, 3, OTHER_GRID, 4))
    with patch(model, CONFIG), torch.no_grad():
        close(model(**inputs, use_cache=False).logits[:, -1], answer(model, inputs, 1).logits[0])


@pytest.mark.parametrize("repeated", [False, True])
def test_a_host_that_hands_its_own_count_and_no_mask(repeated: bool) -> None:
    """What is new, or also what it sees behind the length of its cache; older transformers count so."""
    ids = torch.arange(100, 110)[None]
    talk = Conversation(torch.arange(6)[None], ids, 10, 2, torch.tensor([9]), torch.Size([3]))
    new = torch.tensor([[201, 202, 203]])
    given = torch.cat([ids[:, 6:], new], dim=1) if repeated else new
    count = torch.arange(13)[-given.shape[1] :]
    kwargs = {"inputs_embeds": torch.zeros(1, given.shape[1], 8), "cache_position": count}
    changed = talk.go_on(kwargs, None, given, cached=6, counted=False)
    assert changed["inputs_embeds"].shape[1] == 3
    assert changed["cache_position"].tolist() == [6, 7, 8]
