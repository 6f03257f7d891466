"""Fewer visual tokens for transformers' Qwen2.5-VL and Qwen3-VL, through the public arguments of their ``generate``.

    inputs = processor(...)                                # as always
    short = reduce_for_generate(model, inputs, Merge3DConfig(ratio=0.1), geometry=tokens)
    output = model.generate(**short, max_new_tokens=100)[:, short["input_ids"].shape[1] :]

The 2D encoder runs here, once. ``generate`` gets its merged output, the shortened prompt and the position of each slot,
but no pixels. The model is not changed, and ``short`` can be used for several calls.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.mllm.handed import pooled
from geoaccel.mllm.hosts.sequence import ShortSequence, Side, rewrite_sequence, text_positions
from geoaccel.mllm.hosts.streams import Geometry, Method, VisualSlots, check_method, frame_numbers, plan_slots
from geoaccel.mllm.merge3d import DEFAULT, Merge3DConfig
from geoaccel.mllm.saliency import SaliencyProbe
from geoaccel.mllm.token_plan import TokenPlan

ARGUMENT = "mm_encoder_outputs"
"""Argument that a host must accept: outputs of its encoder instead of pixels."""

GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Pixels, and what says how they lie in images and videos."""


class GenerateArguments(UserDict[str, Any]):
    """Keyword arguments for ``generate`` and for calls of the model, reusable any number of times.

    They are ``input_ids`` and ``attention_mask`` [B, M], ``position_ids`` [4, B, M] (the number of the token in its
    prompt, then time, height and width), ``mm_encoder_outputs``, and ``labels`` [B, M] if there were any.

    Each read of ``mm_encoder_outputs`` gives new objects with the same tensors: for beams and several outputs
    ``generate`` repeats their contents in place.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return {kind: copy(output) for kind, output in value.items()} if name == ARGUMENT else value


@dataclass(frozen=True, eq=False)
class ReducedInputs:
    """Inputs of a host with fewer visual tokens.

    Attributes:
        plan: Plan of the visual tokens, in the order of their slots.
        sequence: The prompts.
        arguments: Arguments for the host.
    """

    plan: TokenPlan
    sequence: ShortSequence
    arguments: GenerateArguments


@torch.no_grad()
def reduce_for_generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: Method = DEFAULT,
    *,
    geometry: Geometry | Callable[[Mapping[str, Any]], Geometry] | None = None,
    plan: TokenPlan | None = None,
) -> GenerateArguments:
    """Keyword arguments for ``model.generate``, from :func:`reduce_inputs`, without gradients.

    Unpack them with ``**`` in each call: one reduction serves several, with beams or without.

    Raises:
        ValueError: As there; and if a prompt ends in a visual token, since the output continues from the last position.
    """
    reduced = reduce_inputs(model, inputs, config, geometry=geometry, plan=plan)
    visual, mask = reduced.sequence.visual, inputs.get("attention_mask")
    attended = torch.ones_like(visual) if mask is None else mask.to(visual.device)
    last = (attended.long() * torch.arange(visual.shape[1], device=visual.device)).argmax(dim=-1, keepdim=True)
    if bool(visual.gather(1, last).any()):
        raise UserError("a prompt ends in a visual token, from which the output cannot continue; put text after it")
    return reduced.arguments


def reduce_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: Method = DEFAULT,
    *,
    geometry: Geometry | Callable[[Mapping[str, Any]], Geometry] | None = None,
    plan: TokenPlan | None = None,
    padding_side: Side = "left",
) -> ReducedInputs:
    """Encode, plan, merge and shorten. Differentiable in what the encoder computes.

    Visual tokens and DeepStack's features are merged by the same plan; positions are those of the long prompt. Each
    prompt of a batch has its own budget.

    Args:
        model: transformers' ``Qwen2_5_VLForConditionalGeneration`` or ``Qwen3VLForConditionalGeneration``.
        inputs: From its processor: ``input_ids`` with ``pixel_values`` and ``image_grid_thw``, ``pixel_values_videos``
            and ``video_grid_thw``, or both; optionally ``attention_mask``, ``second_per_grid_ts``, ``labels``.
        config: The method with its knobs.
        geometry: Features of a geometry encoder for each visual token, in the order of the prompts; or a function that
            computes them from the inputs. They only guide merging; this host does not add them to its tokens.
        plan: An existing plan to apply, in the order of the slots.
        padding_side: Side on which shorter prompts are padded.

    Raises:
        ValueError: If the installed transformers cannot take encoder outputs, placeholders and embeddings differ in
            number, or there is nothing to reduce.
    """
    host: Any = model
    check_host(host)
    check_inputs(inputs)
    check_method(config)
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    probe = None
    if plan is None:
        knobs = config if isinstance(config, Merge3DConfig) else DEFAULT
        probe = SaliencyProbe.for_model(model, layer=knobs.saliency_layer, signal=knobs.saliency)
        with probe:
            outputs = encode(host, inputs)
    else:
        outputs = encode(host, inputs)
    rows = [list(pooled(outputs[kind], host)) if kind in outputs else [] for kind in ("image", "video")]
    slots = VisualSlots.of(
        ids, host.config.image_token_id, host.config.video_token_id, [sum(map(len, part)) for part in rows]
    )
    sem = torch.cat([row for part in rows for row in part])
    if probe is not None:
        merge = host.config.vision_config.spatial_merge_size
        plan = plan_slots(
            slots,
            config,
            scores=probe.scores,
            sem=sem,
            frame_of=frame_numbers(_grids(inputs), merge),
            geometry=geometry(inputs) if callable(geometry) else geometry,
        )
    assert plan is not None
    sequence = rewrite_sequence(
        ids,
        plan,
        placeholder_ids=(host.config.image_token_id, host.config.video_token_id),
        position_ids=positions(host, inputs),
        attention_mask=mask,
        labels=inputs.get("labels"),
        padding_side=padding_side,
    )
    planes = torch.cat([text_positions(sequence.attention_mask)[None], sequence.position_ids])
    arguments = GenerateArguments(
        input_ids=sequence.input_ids,
        attention_mask=sequence.attention_mask,
        position_ids=planes,
        mm_encoder_outputs=_merged(outputs, rows, slots, plan),
    )
    if sequence.labels is not None:
        arguments["labels"] = sequence.labels
    return ReducedInputs(plan, sequence, arguments)


def check_host(host: Any) -> None:
    """Refuse a model that cannot be called with outputs of its encoder.

    Raises:
        ValueError: Saying which model, or which version of transformers, can.
    """
    if not hasattr(getattr(host, "model", None), "get_rope_index"):
        raise UserError(
            f"model is a {type(host).__name__}; give transformers' whole Qwen2_5_VLForConditionalGeneration or "
            "Qwen3VLForConditionalGeneration, not a part of it; for other hosts there is rewrite_sequence"
        )
    if ARGUMENT in inspect.signature(host.forward).parameters:
        return
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        version = "missing"
    raise UserError(
        f"{type(host).__name__}.forward does not accept {ARGUMENT} (transformers {version}), which reduction needs; "
        "pip install 'transformers>=5.20', or use geoaccel.mllm.hosts.patch"
    )


def check_inputs(inputs: Any) -> None:
    """Refuse what is not all that a processor returns.

    Raises:
        UserError: Naming what is missing.
    """
    if not isinstance(inputs, Mapping):
        raise UserError(f"inputs is a {type(inputs).__name__}; give all that the processor returns, as a dictionary")
    there = [name for name, value in inputs.items() if value is not None]
    for name in ("input_ids", *(grid for pixels, grid in GRIDS.items() if pixels in there)):
        if name not in there:
            raise UserError(f"inputs have no {name}, only {', '.join(there)}; give all that the processor returns")


def encode(host: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of the 2D encoder by kind, images first."""
    outputs = {}
    if inputs.get("pixel_values") is not None:
        outputs["image"] = host.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    if inputs.get("pixel_values_videos") is not None:
        outputs["video"] = host.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    return outputs


def positions(host: Any, inputs: Mapping[str, Any]) -> Tensor:  # [3, B, L], int64
    """Time, height and width of every slot of the long prompts."""
    ids = inputs["input_ids"]
    kinds = (ids == host.config.image_token_id).int() + 2 * (ids == host.config.video_token_id).int()
    beside = {name: inputs[name] for name in ("second_per_grid_ts",) if inputs.get(name) is not None}
    found, _ = host.model.get_rope_index(
        ids,
        mm_token_type_ids=kinds,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs.get("attention_mask"),
        **beside,
    )
    return found


def _grids(inputs: Mapping[str, Any]) -> list[list[int]]:
    grids: list[list[int]] = []
    for pixels, name in GRIDS.items():
        if inputs.get(pixels) is not None:
            grids += inputs[name].tolist()
    return grids


def _merged(
    outputs: Mapping[str, Any], rows: list[list[Tensor]], slots: VisualSlots, plan: TokenPlan
) -> dict[str, Any]:
    """Encoder outputs in the host's format: a tensor for each image and each video, and those of DeepStack."""
    lengths = [[len(row) for row in part] for part in rows]
    items = torch.arange(sum(map(len, lengths))).repeat_interleave(torch.tensor([n for part in lengths for n in part]))
    kept_items = plan.gather(slots.arrange(items.to(plan.keep.device)))
    sizes = torch.bincount(kept_items, minlength=sum(map(len, lengths))).tolist()
    kept_images = plan.gather(slots.is_image.to(plan.keep.device))

    def split(x: Tensor) -> dict[str, tuple[Tensor, ...]]:  # [n, C], in the order of the encoder
        short, images = plan.apply(slots.arrange(x)), len(lengths[0])
        return {
            "image": short[kept_images].split(sizes[:images]),
            "video": short[~kept_images].split(sizes[images:]),
        }

    pooled = split(torch.cat([row for part in rows for row in part]))
    merged = {kind: type(output)(pooler_output=pooled[kind]) for kind, output in outputs.items()}
    levels = [getattr(output, "deepstack_features", None) or [] for output in outputs.values()]
    for level in zip(*levels, strict=True):
        features = split(torch.cat([row for part in level for row in part]))
        for kind, output in merged.items():
            output.deepstack_features = [*(output.deepstack_features or []), features[kind]]
    return merged
