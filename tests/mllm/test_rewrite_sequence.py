"""Prompts without the slots of merged tokens: golden positions, padding, labels, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from geoaccel.mllm.hosts import ShortSequence, rewrite_sequence
from geoaccel.mllm.token_plan import TokenPlan

X, VS, VE, P, Q = 1, 2, 3, 8, 9


def plan_of(keep: list[int], owner: list[int], lengths: tuple[int, ...], before: tuple[int, ...]) -> TokenPlan:
    return TokenPlan(torch.tensor(keep, dtype=torch.int64), torch.tensor(owner), lengths, before)


def golden() -> tuple[Tensor, Tensor, TokenPlan]:
    """Two images of three tokens, the first of each stays."""
    ids = torch.tensor([[X, X, VS, P, P, P, VE, VS, P, P, P, VE, 5, 6]])
    triples = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4), (3, 3, 5), (6, 6, 6), (7, 7, 7)]
    triples += [(8, 8, 8), (8, 8, 9), (8, 8, 10), (11, 11, 11), (12, 12, 12), (13, 13, 13)]
    return ids, torch.tensor(triples).T[:, None], plan_of([0, 3], [0, 0, 0, 1, 1, 1], (2,), (6,))


def rewrite(ids: Tensor, plan: TokenPlan, positions: Tensor, **more: Any) -> ShortSequence:
    return rewrite_sequence(ids, plan, placeholder_ids=[P, Q], position_ids=positions, **more)


def test_golden_positions() -> None:
    ids, positions, plan = golden()
    short = rewrite(ids, plan, positions)
    assert short.input_ids.tolist() == [[X, X, VS, P, VE, VS, P, VE, 5, 6]]
    expected = [0, 1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert short.position_ids.tolist() == [[expected]] * 3
    assert short.source.tolist() == [expected]
    assert short.attention_mask.tolist() == [[1] * 10]
    assert short.rope_delta.tolist() == [[4]]
    assert int(short.rope_delta) + short.input_ids.shape[1] == 14


def test_a_token_keeps_its_own_triple() -> None:
    ids, positions, _ = golden()
    short = rewrite(ids, plan_of([2, 4, 5], [0, 0, 0, 1, 1, 2], (3,), (6,)), positions)
    assert short.position_ids[:, 0].T.tolist()[3:8] == [[3, 3, 5], [6, 6, 6], [7, 7, 7], [8, 8, 9], [8, 8, 10]]


def test_an_image_may_lose_all_its_tokens() -> None:
    ids, positions, _ = golden()
    short = rewrite(ids, plan_of([1], [0] * 6, (1,), (6,)), positions)
    assert short.input_ids.tolist() == [[X, X, VS, P, VE, VS, VE, 5, 6]]
    assert short.rope_delta.tolist() == [[5]]


def padded() -> tuple[Tensor, Tensor, TokenPlan]:
    """Three prompts, the last one without images."""
    rows = [[X, P, P, P, 4, Q, Q, 5], [0, 0, 0, X, P, P, 6, 7], [0, 0, 0, 0, 0, 0, 6, 7]]
    ids = torch.tensor(rows)
    plan = plan_of([1, 2, 4, 5, 6], [0, 0, 1, 2, 2, 3, 4], (3, 2, 0), (5, 2, 0))
    return ids, (ids > 0).long(), plan


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_where_it_is_asked_for(side: str) -> None:
    ids, mask, plan = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * 10
    labels = torch.where(mask.bool(), ids, -100)
    short = rewrite(ids, plan, positions, attention_mask=mask, labels=labels, padding_side=side, pad_id=77)
    rows = [[X, P, P, 4, Q, 5], [X, P, P, 6, 7], [6, 7]]
    places = [[0, 20, 30, 40, 60, 70], [0, 10, 20, 30, 40], [0, 10]]

    def pad(row: list[int], fill: int) -> list[int]:
        return [fill] * (6 - len(row)) + row if side == "left" else row + [fill] * (6 - len(row))

    assert short.input_ids.tolist() == [pad(row, 77) for row in rows]
    assert short.position_ids.tolist() == [pad(row, 0) for row in places]
    assert short.attention_mask.tolist() == [pad([1] * len(row), 0) for row in rows]
    assert short.labels is not None
    assert short.labels.tolist() == [pad(row, -100) for row in rows]
    assert short.rope_delta.tolist() == [[71 - 6], [41 - 5], [11 - 2]]


def test_right_padding_is_taken_out_too() -> None:
    ids = torch.tensor([[X, P, P, 4, 0, 0], [X, P, P, P, P, 5]])
    plan = plan_of([0, 3], [0, 0, 1, 1, 1, 1], (1, 1), (2, 4))
    short = rewrite(ids, plan, torch.arange(6).expand(2, 6), attention_mask=(ids > 0).long())
    assert short.input_ids.tolist() == [[X, P, 4], [X, P, 5]]
    assert short.source.tolist() == [[0, 1, 3], [0, 2, 5]]
    assert short.rope_delta.tolist() == [[1], [3]]


def test_embeddings_are_merged_in_their_slots() -> None:
    ids, mask, plan = padded()
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    short = rewrite(ids, plan, positions, attention_mask=mask, inputs_embeds=x)
    assert short.inputs_embeds is not None
    assert short.source[0].tolist() == [0, 2, 3, 4, 6, 7]
    expected = short.gather(x).clone()
    expected[0, 1] += x[0, 1]
    expected[0, 4] += x[0, 5]
    torch.testing.assert_close(short.inputs_embeds, expected)
    assert not bool(short.inputs_embeds[short.source < 0].any())
    short.inputs_embeds.sum().backward()
    assert x.grad is not None
    assert bool((x.grad[mask.bool()] != 0).all())
    assert not bool(x.grad[~mask.bool()].any())
    assert short.apply(x).equal(short.inputs_embeds)
    assert short.gather(ids, fill=0).equal(short.input_ids)


def test_everything_stays_at_ratio_one() -> None:
    ids, mask, _ = padded()
    plan = plan_of(list(range(7)), list(range(7)), (5, 2, 0), (5, 2, 0))
    positions = torch.arange(24).view(1, 3, 8) * mask
    x = torch.randn(3, 8, 4)
    short = rewrite(ids, plan, positions, attention_mask=mask, inputs_embeds=x)
    assert short.input_ids.equal(ids)
    assert short.position_ids.equal(positions)
    assert short.attention_mask.equal(mask)
    assert short.inputs_embeds is not None
    assert short.inputs_embeds.equal(x * mask[..., None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": plan_of([0], [0] * 5, (1,), (5,))}, "prompt 0 has 6 placeholders and the plan 5 tokens"),
        (
            {"plan": plan_of([0, 3], [0, 0, 0, 1, 1, 1], (1, 1), (3, 3))},
            "1 prompts but a plan of 2: give plan_merge cu",
        ),
        ({"attention_mask": torch.tensor([[1] * 10 + [0] * 4])}, "hides visual tokens of prompt 0"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask has [1, 9] slots and input_ids [1, 14]"),
        ({"labels": torch.ones(2, 14)}, "labels has [2, 14] slots"),
        ({"inputs_embeds": torch.ones(1, 13, 4)}, "inputs_embeds has [1, 13] slots"),
        ({"positions": torch.ones(3, 1, 10)}, "position_ids has [1, 10] slots"),
        ({"ids": torch.ones(14, dtype=torch.int64)}, "input_ids must be [B, L], got [14]"),
        ({"padding_side": "middle"}, "padding_side='middle'; known: left, right"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    ids, positions, plan = golden()
    arguments = {"ids": ids, "plan": plan, "positions": positions, **change}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        rewrite(**arguments)
    assert message in str(error.value)
