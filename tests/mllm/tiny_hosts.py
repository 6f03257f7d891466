"""Tiny random Qwen2.5-VL and Qwen3-VL models, and batches for them without a processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
IMAGE_GRID, OTHER_GRID, VIDEO_GRID = (1, 4, 6), (1, 6, 4), (2, 4, 4)
"""6, 6 and 8 tokens."""

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def configuration(family: str) -> Any:
    """Of a host with three blocks."""
    if family == "qwen2_5_vl":
        text = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        vision = {**_VISION, "fullatt_block_indexes": [1, 2], "window_size": 16, "tokens_per_second": 2}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
    text = {**_TEXT, "head_dim": 8, "rope_parameters": rope}
    vision = {**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_TOKENS)


def tiny_host(family: str, kind: type | None = None) -> Any:
    """A model with sharp random weights, so that positions and features matter."""
    stock = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (kind or getattr(transformers, stock[family]))(configuration(family)).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.1, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def cache_argument(model: Any) -> str:
    """What the installed transformers calls the cache among the arguments of a model."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in names)


Part = int | tuple[int, int, int]


def prompt(family: str, *parts: Part | str) -> tuple[list[int], list[Part], list[Part]]:
    """Ids of a prompt, and its grids: of images, and of videos.

    Args:
        family: Qwen3-VL has delimiters around every step of a video, with text between.
        parts: Numbers are that many words; a grid is an image, and a video where it has several steps.
    """
    ids: list[int] = []
    images: list[Part] = []
    videos: list[Part] = []
    for part in parts:
        if isinstance(part, int):
            ids += [1 + (7 * len(ids) + step) % 80 for step in range(part)]
            continue
        steps, height, width = part  # type: ignore[misc]
        kind, grids = (IMAGE, images) if steps == 1 else (VIDEO, videos)
        grids.append(part)  # type: ignore[arg-type]
        tokens = int(height) * int(width) // 4
        blocks = int(steps) if family == "qwen3_vl" else 1
        for block in range(blocks):
            ids += [*([5 + block] if blocks > 1 else []), START, *[kind] * (tokens * int(steps) // blocks), END]
    return ids, images, videos


def batch(family: str, *prompts: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    """What a processor would give for prompts, padded on the left."""
    parts = [prompt(family, *one) for one in prompts]
    longest = max(len(ids) for ids, _, _ in parts)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[PAD] * (longest - len(one)) + one for one, _, _ in parts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one, _, _ in parts])
    found = {"input_ids": ids, "attention_mask": mask}
    found["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for place, pixels, grids in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        listed = [grid for one in parts for grid in one[place]]  # type: ignore[union-attr]
        if listed:
            found[grids] = torch.tensor(listed)
            count = int(found[grids].prod(-1).sum())
            found[pixels] = torch.randn(count, 3 * 2 * 4 * 4, generator=generator)
    if family == "qwen2_5_vl" and "video_grid_thw" in found:
        found["second_per_grid_ts"] = torch.full((len(found["video_grid_thw"]),), 1.5)
    return found


CASES = {
    "single": [(3, IMAGE_GRID, 4)],
    "two images": [(2, IMAGE_GRID, 3, OTHER_GRID, 4)],
    "image first": [(IMAGE_GRID, OTHER_GRID, 5)],
    "video": [(2, VIDEO_GRID, 3)],
    "image and video": [(2, VIDEO_GRID, 3, IMAGE_GRID, 1, OTHER_GRID, 2)],
    "batched": [(3, IMAGE_GRID, 4), (3, OTHER_GRID, 4)],
    "left-padded": [(3, IMAGE_GRID, 2, OTHER_GRID, 4), (1, OTHER_GRID, 2)],
    "left-padded, mixed": [(1, IMAGE_GRID, 2), (2, VIDEO_GRID, 1, IMAGE_GRID, 3), (4,), (VIDEO_GRID, 7)],
}
"""Prompts by name: words, images and videos in order."""


def generated(model: Any, inputs: Any, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Greedy answer [B, steps], and the logits [B, steps, vocabulary] that it is from."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, -steps:], torch.stack(out.logits, dim=1)
