"""Multimodal LLMs with random weights for timing token reduction: published sizes, and tiny ones for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoaccel.errors import MissingPackage
from geoaccel.registry import Registry

SCALES = Registry("merge3d.scale", {"tiny": 0, "full": 1})


@dataclass(frozen=True)
class Host:
    """A model family at one size.

    Attributes:
        name: Name in reports.
        config: Name of its configuration in transformers.
        text, vision: Keyword arguments of its parts.
        tokens: Ids of placeholders and delimiters.
    """

    name: str
    config: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: Mapping[str, int]

    @property
    def patch(self) -> int:
        """Pixels along the side of a patch."""
        return int(self.vision["patch_size"])

    @property
    def cell(self) -> int:
        """Pixels along the side of a visual token."""
        return 2 * self.patch

    def build(self, device: str, dtype: torch.dtype) -> Any:
        """The model, which never stops early.

        Raises:
            MissingPackage: Without transformers.
        """
        try:
            import transformers
        except ImportError:
            raise MissingPackage("suite=merge3d needs transformers: pip install 'geoaccel[mllm]'") from None
        kind = getattr(transformers, self.config)
        config = kind(
            text_config=dict(self.text), vision_config=dict(self.vision), tie_word_embeddings=True, **self.tokens
        )
        devices = [torch.device(device)] if device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(0)
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model


def frame_prompt(
    host: Host, frames: int, grid: tuple[int, int], text_tokens: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Frames as separate images, each between delimiters, then a question; pixels are noise.

    Args:
        host: Host for which the inputs are made.
        frames: Number of images.
        grid: (h, w) visual tokens per image.
        text_tokens: Tokens of the question.
        device, dtype: Device and dtype of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = host.tokens
    slots = [tokens["image_token_id"]] * (grid[0] * grid[1])
    image = [tokens["vision_start_token_id"], *slots, tokens["vision_end_token_id"]]
    words = torch.randint(1, 1000, (text_tokens,), generator=generator).tolist()
    ids = torch.tensor([[*image * frames, *words]])
    patches = (2 * grid[0], 2 * grid[1])
    pixels = torch.randn(frames * patches[0] * patches[1], 3 * 2 * host.patch**2, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
        "image_grid_thw": torch.tensor([[1, *patches]] * frames).to(device),
    }


def _ids(first: int) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, (first, first + 1, first + 3, first + 4), strict=True))


def _text(hidden: int, layers: int, heads: int, kv: int, middle: int, words: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": middle,
        "vocab_size": words,
        "max_position_embeddings": 128_000,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def _vision(hidden: int, depth: int, heads: int, middle: int, out: int, patch: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "depth", "num_heads", "intermediate_size", "out_hidden_size", "patch_size")
    sizes = dict(zip(names, (hidden, depth, heads, middle, out, patch), strict=True))
    return {**sizes, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _rope(section: tuple[int, int, int], theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [*section], "rope_theta": theta, **more}}


_WORDS, _FIRST = 151_936, 151_652
_WINDOWS = {"window_size": 112, "tokens_per_second": 2}
_QWEN2_5 = (
    Host(
        "qwen2.5-vl-tiny",
        "Qwen2_5_VLConfig",
        _text(256, 6, 4, 2, 704, 2048, **_rope((8, 12, 12), 1e6)),
        _vision(128, 4, 4, 344, 256, 14, fullatt_block_indexes=[1, 3], **_WINDOWS),
        _ids(2000),
    ),
    Host(
        "qwen2.5-vl-3b",
        "Qwen2_5_VLConfig",
        _text(2048, 36, 16, 2, 11_008, _WORDS, **_rope((16, 24, 24), 1e6)),
        _vision(1280, 32, 16, 3420, 2048, 14, fullatt_block_indexes=[7, 15, 23, 31], **_WINDOWS),
        _ids(_FIRST),
    ),
)
_QWEN3 = (
    Host(
        "qwen3-vl-tiny",
        "Qwen3VLConfig",
        _text(256, 6, 4, 2, 704, 2048, head_dim=64, **_rope((12, 10, 10), 5e6, mrope_interleaved=True)),
        _vision(128, 4, 4, 344, 256, 16, num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2]),
        _ids(2000),
    ),
    Host(
        "qwen3-vl-4b",
        "Qwen3VLConfig",
        _text(2560, 36, 32, 8, 9728, _WORDS, head_dim=128, **_rope((24, 20, 20), 5e6, mrope_interleaved=True)),
        _vision(1024, 24, 16, 4096, 2560, 16, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]),
        _ids(_FIRST),
    ),
)
HOSTS: Registry[tuple[Host, Host]] = Registry("host", {"qwen2.5-vl": _QWEN2_5, "qwen3-vl": _QWEN3})
"""Tiny and full, in the order of :data:`SCALES`."""
