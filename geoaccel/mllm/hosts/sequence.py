"""A prompt without the slots of merged visual tokens: ids, mask, positions, labels, embeddings.

Positions are taken from the long prompt and never recomputed: a merged token has the slot and the position of the kept
token, text keeps its own, and positions of the output continue as without merging.

Tensors only, for any host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.token_plan import TokenPlan

Side = Literal["left", "right"]
IGNORED = -100
"""Label ignored by losses."""


@dataclass(frozen=True, eq=False)
class ShortSequence:
    """A batch of shortened prompts. Rows that are shorter than the longest are padded.

    Attributes:
        plan: Plan of the visual tokens.
        source: [B, M], slot of the long prompt that each slot is from; -1 for padding.
        visual: [B, L], which slots of the long prompt are visual tokens.
        input_ids: [B, M].
        attention_mask: [B, M], int64, 0 for padding.
        position_ids: [.., B, M], 0 for padding.
        rope_delta: [B, 1], added to a number of tokens to get the next position, as positions have gaps.
        labels: [B, M], or None.
        inputs_embeds: [B, M, C], visual tokens merged, or None.
    """

    plan: TokenPlan
    source: Tensor
    visual: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rope_delta: Tensor
    labels: Tensor | None = None
    inputs_embeds: Tensor | None = None

    def gather(
        self,
        x: Tensor,  # [B, L, ...]
        fill: float = 0,
    ) -> Tensor:  # [B, M, ...]
        """The slots that stay, from any tensor parallel to the long prompt."""
        return gather_slots(x, self.source, fill)

    def apply(
        self,
        x: Tensor,  # [B, L, C]
    ) -> Tensor:  # [B, M, C]
        """Embeddings of the long prompt with visual tokens merged; differentiable."""
        return merge_slots(x, self.source, self.visual, self.plan)


def rewrite_sequence(
    input_ids: Tensor,  # [B, L], int64
    plan: TokenPlan,
    *,
    placeholder_ids: Sequence[int],
    position_ids: Tensor,  # [.., B, L]
    attention_mask: Tensor | None = None,  # [B, L]
    labels: Tensor | None = None,  # [B, L]
    inputs_embeds: Tensor | None = None,  # [B, L, C]
    padding_side: Side = "left",
    pad_id: int = 0,
) -> ShortSequence:
    """Remove the slots of merged visual tokens from a batch of prompts.

    Delimiters, timestamps and all other text stay. Padding is moved to the requested side.

    Args:
        input_ids: Prompts in which each visual token has a slot with one of ``placeholder_ids``.
        plan: Plan of the visual tokens in the order of their slots, row by row; one sample per row, possibly empty.
        placeholder_ids: Ids of visual slots, of images and videos.
        position_ids: Those of the long prompts: [B, L], or [3, B, L] for M-RoPE.
        attention_mask: 0 for padding; None: no padding.
        labels: For visual slots the ignored label.
        inputs_embeds: Embeddings of the long prompts, visual ones in place.
        padding_side: Side of the padding: left to generate, either to train.
        pad_id: Id of padding.

    Raises:
        ValueError: If the plan does not match the visual slots of these prompts, or shapes differ.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, L], got {list(input_ids.shape)}")
    if padding_side not in ("left", "right"):
        raise UserError(f"padding_side={padding_side!r}; known: left, right")
    shape = input_ids.shape
    beside = {"position_ids": position_ids.shape[-2:]}
    for name, x in (("attention_mask", attention_mask), ("labels", labels)):
        if x is not None:
            beside[name] = x.shape
    if inputs_embeds is not None:
        beside["inputs_embeds"] = inputs_embeds.shape[:2]
    for name, found in beside.items():
        if found != shape:
            raise ValueError(f"{name} has {list(found)} slots and input_ids {list(shape)}; give those of one batch")
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    visual = torch.isin(input_ids, torch.tensor(list(placeholder_ids), device=input_ids.device))
    check_slots(visual, attended, plan)
    source = remaining_slots(visual, attended, plan, padding_side)
    mask = (source >= 0).long()
    highest = position_ids.masked_fill(~attended, -1).amax(dim=-1).view(-1, len(input_ids)).amax(dim=0)
    return ShortSequence(
        plan=plan,
        source=source,
        visual=visual,
        input_ids=gather_slots(input_ids, source, pad_id),
        attention_mask=mask,
        position_ids=gather_slots(position_ids.movedim((-2, -1), (0, 1)), source).movedim((0, 1), (-2, -1)),
        rope_delta=(highest + 1 - mask.sum(dim=-1))[:, None],
        labels=None if labels is None else gather_slots(labels, source, IGNORED),
        inputs_embeds=None if inputs_embeds is None else merge_slots(inputs_embeds, source, visual, plan),
    )


def check_slots(
    visual: Tensor,  # [B, L], bool
    attended: Tensor,  # [B, L], bool
    plan: TokenPlan,
) -> None:
    """Refuse a plan that does not match these slots.

    Raises:
        ValueError: If a visual slot is masked, or the number of slots in a row differs from its sample of the plan.
    """
    hidden = (visual & ~attended).any(dim=-1)
    if bool(hidden.any()):
        row = int(hidden.nonzero()[0])
        raise UserError(f"attention_mask hides visual tokens of prompt {row}; mask padding only")
    counts = visual.sum(dim=-1).tolist()
    if len(counts) != len(plan.source_lengths):
        raise ValueError(
            f"{len(counts)} prompts but a plan of {len(plan.source_lengths)}: give plan_merge cu_seqlens, the start "
            "of each prompt's visual tokens"
        )
    for row, (count, length) in enumerate(zip(counts, plan.source_lengths, strict=True)):
        if count != length:
            raise ValueError(
                f"prompt {row} has {count} placeholders and the plan {length} tokens; plan the embeddings of these "
                "prompts, in the order of the placeholders"
            )


def remaining_slots(
    visual: Tensor,  # [B, L], bool
    attended: Tensor,  # [B, L], bool
    plan: TokenPlan,
    padding_side: Side = "left",
) -> Tensor:  # [B, M], int64
    """Slot of the long prompt for each slot of the short one, ascending; -1 for padding."""
    kept = torch.zeros(plan.num_tokens, dtype=torch.bool, device=visual.device)
    kept[plan.keep.to(visual.device)] = True
    stays = attended.clone()
    stays[visual] = kept
    lengths = stays.sum(dim=-1, keepdim=True)
    column = torch.arange(int(lengths.max()), device=visual.device)
    filled = column >= len(column) - lengths if padding_side == "left" else column < lengths
    source = torch.full(filled.shape, -1, device=visual.device)
    source[filled] = stays.nonzero()[:, 1]
    return source


def gather_slots(
    x: Tensor,  # [B, L, ...]
    source: Tensor,  # [B, M]
    fill: float = 0,
) -> Tensor:  # [B, M, ...]
    """The slots in ``source``, and ``fill`` for padding."""
    source = source.to(x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    padding = (source < 0).view(*source.shape, *[1] * (x.ndim - 2))
    return x[rows, source.clamp(min=0)].masked_fill(padding, fill)


def merge_slots(
    x: Tensor,  # [B, L, C]
    source: Tensor,  # [B, M]
    visual: Tensor,  # [B, L], bool
    plan: TokenPlan,
) -> Tensor:  # [B, M, C]
    """The slots in ``source``, visual ones merged."""
    visual = visual.to(x.device)
    place = gather_slots(visual, source, False)
    return gather_slots(x, source).masked_scatter(place[..., None], plan.apply(x[visual]))


def text_positions(
    attention_mask: Tensor,  # [B, M]
) -> Tensor:  # [B, M], int64
    """0, 1, 2 .. along the attended tokens; 0 for padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).masked_fill(attention_mask == 0, 0)
