"""Tiny hosts that fuse 2D and 3D features themselves, as VG-LLM does, wired as under transformers 4 and 5."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_hosts import IMAGE, cache_argument, tiny_host
from torch import Tensor, nn

from geoaccel.mllm.handed import returned_cache

transformers = pytest.importorskip("transformers")

STEPS = 6


class Fused5(transformers.Qwen2_5_VLForConditionalGeneration):
    """VG-LLM as one would write it for transformers 5: encoder outputs with geometry features added."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.geometry_encoder = nn.Linear(3 * 2 * 4 * 4 * 4, 24)
        self.geometry_merger = nn.Linear(24, 32)
        plain = self.model.get_image_features

        def fused(pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
            out = plain(pixel_values, image_grid_thw, **kwargs)
            extra = self.geometry_merger(self.geometry_encoder(pixel_values.view(-1, 4 * 96)).sin())
            sizes = [len(rows) for rows in out.pooler_output]
            out.pooler_output = tuple(
                rows + more for rows, more in zip(out.pooler_output, extra.split(sizes), strict=True)
            )
            return out

        self.model.get_image_features = fused


class LanguageModel(nn.Module):
    """The installed language model behind a ``forward`` that takes and returns its cache under a given name."""

    def __init__(self, inner: Any, cache: str) -> None:
        super().__init__()
        self.inner, self.cache = inner, cache
        self.layers, self.embed_tokens = inner.layers, inner.embed_tokens

    def forward(self, *, inputs_embeds: Tensor, **kwargs: Any) -> SimpleNamespace:
        kwargs[cache_argument(self.inner)] = kwargs.pop(self.cache)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("beside", "cache_position")}
        out = self.inner(inputs_embeds=inputs_embeds, **kwargs)
        return SimpleNamespace(last_hidden_state=out.last_hidden_state, **{self.cache: returned_cache(out)})


class Fused4(nn.Module):
    """VG-LLM's wiring under transformers 4: one forward for everything, positions from a count of cached slots.

    Args:
        cache: Name under which it hands its language model the cache.
    """

    def __init__(self, cache: str = "past_key_values") -> None:
        super().__init__()
        stock = tiny_host("qwen2_5_vl", Fused5)
        self.visual, self.lm_head = stock.model.visual, stock.lm_head
        self.model = LanguageModel(stock.model.language_model, cache)
        self.beside: dict[str, Any] = {}  # more arguments for the language model
        self.vggt, self.merger = stock.geometry_encoder, stock.geometry_merger
        self.config, self.rope_deltas = stock.config, None
        self.stock = [stock]  # a list hides it from modules(), as get_rope_index is no module's

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        images_vggt: list[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        assert input_ids is not None
        assert cache_position is not None
        embeds = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            assert images_vggt is not None
            rows = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
            rows = rows + torch.cat([self.merger(self.vggt(one).sin()) for one in images_vggt])
            embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], rows)
        if int(cache_position[0]) == 0:
            position_ids, _ = self.stock[0].model.get_rope_index(
                input_ids,
                mm_token_type_ids=(input_ids == IMAGE).int(),
                image_grid_thw=image_grid_thw,
                attention_mask=attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None,
            )
            self.rope_deltas = position_ids.amax((0, 2)) + 1 - input_ids.shape[1]
        else:
            steps = torch.arange(input_ids.shape[1]) + cache_position[0]
            position_ids = (steps + self.rope_deltas[:, None]).expand(3, -1, -1)
        out = self.model(
            input_ids=None,
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache_position=cache_position,
            use_cache=True,
            **{self.model.cache: past_key_values},
            **self.beside,
        )
        return SimpleNamespace(
            logits=self.lm_head(out.last_hidden_state), past_key_values=getattr(out, self.model.cache)
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,
        without: tuple[int, ...] = (),
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Greedy, counting slots as transformers 4 does: the mask grows by one, the count of cached slots too.

        With a cache, what is new begins where the cache ends. Ids in ``without`` are not answered.
        """
        cache = transformers.DynamicCache() if past_key_values is None else past_key_values
        count = torch.arange(attention_mask.shape[1])[cache.get_seq_length() :]
        input_ids = input_ids[:, -len(count) :]
        answer, logits = [], []
        for _ in range(STEPS):
            with torch.no_grad():
                out = self(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    cache_position=count,
                    **inputs,
                )
            logits.append(out.logits[:, -1])
            answer.append(logits[-1].index_fill(-1, torch.tensor(without, dtype=torch.int64), -torch.inf).argmax(-1))
            input_ids, inputs, count = answer[-1][:, None], {}, count[-1:] + 1
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
        return torch.stack(answer, dim=1), torch.stack(logits, dim=1)


def old_style(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The same batch with VG-LLM's extra input, a list with the images of each prompt."""
    tokens = (inputs["input_ids"] == IMAGE).sum(-1).tolist()
    images = inputs["pixel_values"].view(-1, 4 * 96).split(tokens)
    kept = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    return {name: inputs[name] for name in kept} | {"images_vggt": list(images)}
