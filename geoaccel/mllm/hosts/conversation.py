"""Continuation of a shortened prompt: later tokens of the output, and later turns.

A host counts the slots of the long conversation, but its cache has those of the short one. A host that considers the
tokens after the length of its cache as new, as ``generate`` does in a second turn, passes some that are in the cache
already. They are counted, compared and dropped here. Positions continue from the highest one of the prompt, as for
text, whatever the host derived from the length of its cache.

Tensors only, for any host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.hosts.sequence import text_positions

ANEW = "or start over without a cache"


@dataclass(eq=False)
class Conversation:
    """Contents of a cache since the last prefill with visual tokens.

    Attributes:
        source: [B, M], slot of the long prompt for each slot of the short one; -1 for padding.
        ids: [B, N], of the long conversation, as far as they are known.
        prompt: Slots of the long prompt.
        tail: Slots of text after its last visual token or padding; at most these may be cropped from the cache.
        highest: [B], highest position of the prompt; the output continues from it.
        planes: Leading axes of the host's positions: (3,) or (4,) for M-RoPE.
    """

    source: Tensor
    ids: Tensor
    prompt: int
    tail: int
    highest: Tensor
    planes: torch.Size

    @classmethod
    def begin(
        cls,
        source: Tensor,  # [B, M]
        ids: Tensor,  # [B, L]
        text: Tensor,  # [B, L], bool: neither visual nor padding
        attended: Tensor,  # [B, L], bool
        position_ids: Tensor,  # [.., B, L]
    ) -> Conversation:
        """Start with a shortened prompt."""
        seen = position_ids[1:] if _counts_text(position_ids) else position_ids
        highest = seen.masked_fill(~attended, -1).amax(dim=-1).view(-1, len(ids)).amax(dim=0)
        tail = int(text.all(dim=0).flip(0).long().cumprod(0).sum())
        return cls(source, ids, ids.shape[1], tail, highest, position_ids.shape[:-2])

    @property
    def removed(self) -> int:
        """Number of slots that the host counts in addition to those in the cache."""
        return self.prompt - self.source.shape[1]

    def go_on(
        self,
        kwargs: dict[str, Any],
        mask: Tensor | None,  # [B, N + n], of the long conversation
        ids: Tensor | None,  # [B, n]
        cached: int,
        counted: bool,
    ) -> dict[str, Any]:
        """Arguments of the language model for the tokens that are not in its cache.

        Args:
            kwargs: The host's arguments, in long counts: ``inputs_embeds`` [B, n, C], and those parallel to it.
            mask: None: nothing is padding.
            ids: None: the host was given embeddings.
            cached: Slots in the cache.
            counted: The host was given positions, so they do not come from the length of the cache.

        Raises:
            ValueError: If these are not the next tokens.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        short = min(self.source.shape[1], cached)
        cropped = self.source.shape[1] - short  # prompt lookup puts guessed output tokens into the prefill
        if len(embeds) != len(self.source):
            raise UserError(
                f"{len(embeds)} rows after a prefill of {len(self.source)}: a patch allows one output per prompt; "
                "continue with the same rows, or remove the patch and use reduce_for_generate"
            )
        if cropped > self.tail:
            raise UserError(
                f"{cached} slots in the cache, and a shortened prompt of {self.source.shape[1]}, which ends in "
                f"{self.tail} of text: crop no more than these, {ANEW}"
            )
        surplus = self._surplus(kwargs, mask, ids, cached, counted)
        new = embeds.shape[1] - surplus
        self._remember(ids, cached, new)
        prompt_mask = (self.source[:, :short] >= 0).long()
        if mask is None:
            later = prompt_mask.new_ones(len(prompt_mask), cached + new - short)
        else:
            later = mask[:, self.prompt - cropped :].to(prompt_mask)
        whole = torch.cat([prompt_mask, later], dim=1)
        given = kwargs.get("position_ids")
        planes = self.planes if given is None else given.shape[:-2]
        positions = self.highest[:, None] - cropped + later.cumsum(dim=-1).to(self.highest)
        changed: dict[str, Any] = {
            "inputs_embeds": embeds[:, surplus:],
            "position_ids": count_again(positions[:, -new:].expand(*planes, -1, -1), whole),
            "attention_mask": None if mask is None and bool(prompt_mask.all()) else whole,
        }
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = kwargs["cache_position"][surplus:] - self.removed
        return {**kwargs, **changed}

    def _surplus(
        self, kwargs: dict[str, Any], mask: Tensor | None, ids: Tensor | None, cached: int, counted: bool
    ) -> int:
        """Number of leading tokens that are already in the cache: none, or the error of the host's count."""
        given = kwargs["inputs_embeds"].shape[1]
        total = everything = cached + self.removed + given
        count, positions = kwargs.get("cache_position"), kwargs.get("position_ids")
        if mask is not None:
            total = mask.shape[1]
        elif given == 1:  # nothing to drop, no need to synchronise
            pass
        elif count is not None:
            total = int(count[-1]) + 1
        elif counted and positions is not None and _counts_text(positions):
            total = int(positions[0, 0, -1]) + 1
        elif counted and positions is not None:
            # These continue the last prompt of the host, so ids are more reliable.
            total = int(positions[..., 0, -1].max() - self.highest[0]) + self.prompt
            total = everything - self.removed if self._repeats(ids, cached) else total
        surplus = everything - total
        if surplus not in (0, self.removed) or surplus >= given:
            raise UserError(
                f"{given} tokens behind {cached} cached slots, from which {self.removed} were merged away, do not make "
                f"a conversation of {total}: give all of it, with an attention_mask over all of it, {ANEW}"
            )
        if surplus and not self._repeats(ids, cached):
            raise UserError(
                f"input_ids differ from what is in the cache, somewhere from slot {cached} to "
                f"{cached + surplus - 1} of the conversation: continue the cached one unchanged, {ANEW}"
            )
        return surplus

    def _repeats(self, ids: Tensor | None, cached: int) -> bool:
        """Whether ids begin with what a host sees behind the length of its cache, and what the cache has."""
        seen = self.ids[:, cached : cached + self.removed]
        return ids is not None and seen.shape[1] == self.removed and seen.equal(ids[:, : self.removed])

    def _remember(self, ids: Tensor | None, cached: int, new: int) -> None:
        """Append new ids to those in the cache; -1, which equals none, if there are only embeddings."""
        known = self.ids[:, : cached + self.removed]
        missing = known.new_full((len(known), cached + self.removed - known.shape[1]), -1)
        fresh = known.new_full((len(known), new), -1) if ids is None else ids[:, -new:]
        self.ids = torch.cat([known, missing, fresh], dim=1)


def count_again(
    position_ids: Tensor,  # [3 or 4, B, n]
    attention_mask: Tensor,  # [B, M], M >= n
) -> Tensor:
    """The first of four planes, which counts the tokens that the language model sees."""
    if not _counts_text(position_ids):
        return position_ids
    counted = text_positions(attention_mask)[:, -position_ids.shape[-1] :]
    return torch.cat([counted[None].to(position_ids), position_ids[1:]])


def _counts_text(position_ids: Tensor) -> bool:
    """Whether the first plane is the token index: transformers 5 puts it before time, height and width."""
    return position_ids.ndim == 3 and len(position_ids) == 4
