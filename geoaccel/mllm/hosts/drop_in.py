"""Fewer visual tokens inside a host that fuses 2D and 3D features itself, as VG-LLM does: nothing to call differently.

    with patch(model, Merge3DConfig(ratio=0.1)) as patched:
        answer = model.generate(**inputs)                  # its inputs, its arguments
    print(patched.plan)

The patch listens to three modules and changes what goes into a fourth. All are found in the model:

- the 2D encoder (``visual``): its tokens, their saliency, the grids of the images;
- the merger of the geometry features (``geometry_merger``, or ``merger`` beside the encoder): features for each token,
  which the host adds to the 2D tokens;
- the model itself: ``input_ids``, for the slots;
- the language model (whatever has ``layers`` and ``embed_tokens``): in the prefill, visual slots that were merged away
  are taken out of ``inputs_embeds``, ``position_ids``, ``attention_mask``, ``cache_position`` and DeepStack's features;
  in later steps, out of the mask and the count of cached tokens.

The host goes on counting the slots of the long prompt. It therefore computes the positions that it always computed, and
the answer continues where it would have. That holds for transformers 4 and 5 alike. These are forward hooks: no method
is replaced, no weight is touched, and :meth:`Patch.remove` leaves the model as it was.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from geoaccel.mllm.hosts.sequence import check_slots, gather_slots, merge_slots, remaining_slots, text_positions
from geoaccel.mllm.hosts.streams import Method, VisualSlots, frame_numbers, plan_slots
from geoaccel.mllm.merge3d import DEFAULT, Merge3DConfig
from geoaccel.mllm.saliency import SaliencyProbe
from geoaccel.mllm.token_plan import TokenPlan

MERGERS = ("geometry_merger", "merger")
"""Names under which hosts of this kind keep what brings geometry features to the width of the language model."""


def patch(model: nn.Module, config: Method = DEFAULT, *, geometry: nn.Module | None = None) -> Patch:
    """Reduce visual tokens in every prefill of a model, until the patch is removed.

    The logits of a prefill are those of the shortened prompt. For training use :func:`reduce_inputs` or
    :func:`rewrite_sequence`, which shorten labels too.

    Args:
        model: Qwen2.5-VL with a geometry encoder, in the manner of VG-LLM. Without one, tokens are matched by what
            ``config`` makes of 2D features.
        config: Which method, with its knobs.
        geometry: Module whose output are the geometry features, one row a token; None: looked for by name.

    Under transformers 5 a prompt gets one answer: ``generate`` repeats prompts for beams and further answers after the
    encoder has run.

    Returns:
        A context manager that undoes it; it is in force already.

    Raises:
        ValueError: If a part is not found, or the model has a patch.
    """
    return Patch(model, config, geometry)


class Patch:
    """Hooks on a model; see :func:`patch`.

    Attributes:
        plan: Of the last prefill with visual tokens, in the order of their slots; None before.
        source: [B, M], slot of the long prompt for each slot of that prefill; -1 for padding.
    """

    def __init__(self, model: nn.Module, config: Method, geometry: nn.Module | None) -> None:
        if getattr(model, "_merge3d", None) is not None:
            raise ValueError(f"this {type(model).__name__} is patched already; remove() that patch first")
        knobs = config if isinstance(config, Merge3DConfig) else DEFAULT
        self.plan: TokenPlan | None = None
        self.source: Tensor | None = None
        self._model = cast(Any, model)
        self._config = config
        self._probe = SaliencyProbe.for_model(model, layer=knobs.saliency_layer, signal=knobs.saliency)
        tower = _encoder(model)
        geometry = _geometry(model, tower) if geometry is None else geometry
        self._merge: int = tower.spatial_merge_size
        self._input_ids: Tensor | None = None
        self._long = 0  # slots of the long prompts in the cache
        self._handles = [
            model.register_forward_pre_hook(self._note_ids, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            tower.register_forward_pre_hook(self._note_grid, with_kwargs=True),
            tower.register_forward_hook(self._note_tokens),
            _language_model(model).register_forward_pre_hook(self._shorten, with_kwargs=True),
        ]
        if geometry is not None:
            self._handles.append(geometry.register_forward_hook(self._note_geometry))
        self._listen()
        self._model._merge3d = self

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks out; twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._probe.__exit__()
        if getattr(self._model, "_merge3d", None) is self:
            del self._model._merge3d

    def _listen(self) -> None:
        """Listen for one prefill; what was heard before is dropped."""
        self._grids: list[list[int]] = []
        self._sem: list[Tensor] = []
        self._geo: list[Tensor] = []
        self._probe.__exit__()
        self._probe.__enter__()

    def _note_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise ValueError("a patched model cannot train: labels would not fit its logits; use reduce_inputs instead")
        if kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None:
            self._listen()  # the encoder is about to run; in transformers 5 generate has run it before
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._sem:  # it failed on the way to the language model
            self._listen()

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._grids += grid.tolist()

    def _note_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._sem.append(output if isinstance(output, Tensor) else output.pooler_output)

    def _note_geometry(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._geo.append(output.reshape(-1, output.shape[-1]))

    def _shorten(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if self._sem:
            if cached:
                raise ValueError("images behind a cached conversation cannot be reduced; start without past_key_values")
            return args, self._prefill(kwargs)
        if not cached:
            self.source = None  # a prompt without images begins
        if self.source is None:
            return None
        return args, self._step(kwargs, cached)

    def _prefill(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        ids, embeds, long_positions = self._input_ids, kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        if ids is None or embeds is None or long_positions is None or ids.shape != embeds.shape[:2]:
            raise ValueError(
                f"{type(self._model).__name__} does not hand input_ids, inputs_embeds and position_ids of one batch "
                "to its language model; reduce its inputs with rewrite_sequence"
            )
        mask = _flat(kwargs.get("attention_mask"))
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        slots = self._slots(ids)
        visual = slots.visual
        plan = plan_slots(
            slots,
            self._config,
            scores=self._probe.scores,
            sem=torch.cat(self._sem),
            frame_of=frame_numbers(self._grids, self._merge),
            geometry=torch.cat(self._geo) if self._geo else None,
        )
        self._listen()
        check_slots(visual, attended, plan)
        source = remaining_slots(visual, attended, plan)
        self.plan, self.source, self._long = plan, source, ids.shape[1]
        short_mask = (source >= 0).long()
        planes = gather_slots(long_positions.movedim((-2, -1), (0, 1)), source).movedim((0, 1), (-2, -1))
        changed: dict[str, Any] = {
            "inputs_embeds": merge_slots(embeds, source, visual, plan),
            "position_ids": _count_again(planes, short_mask),
            "attention_mask": None if mask is None and bool(short_mask.all()) else short_mask,
        }
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = kwargs["cache_position"][: source.shape[1]]
        if kwargs.get("visual_pos_masks") is not None:
            changed["visual_pos_masks"] = gather_slots(visual, source, False)
        if kwargs.get("deepstack_visual_embeds") is not None:
            changed["deepstack_visual_embeds"] = [plan.apply(level) for level in kwargs["deepstack_visual_embeds"]]
        return {**kwargs, **changed}

    def _slots(self, ids: Tensor) -> VisualSlots:
        config = self._model.config
        video_id = config.video_token_id
        videos = int((ids == video_id).sum())  # encoders run on images first, then on videos
        total = sum(map(len, self._sem))
        return VisualSlots.of(ids, config.image_token_id, video_id, (total - videos, videos))

    def _step(self, kwargs: dict[str, Any], cached: int) -> dict[str, Any]:
        """One or more tokens behind a shortened prompt."""
        assert self.source is not None
        new = kwargs["inputs_embeds"].shape[1]
        short = self.source.shape[1]
        mask, short_mask = _flat(kwargs.get("attention_mask")), (self.source >= 0).long()
        if mask is None:
            later = short_mask.new_ones(len(short_mask), cached + new - short)
        else:
            later = mask[:, self._long :].to(short_mask)
        whole = torch.cat([short_mask, later], dim=1)
        changed: dict[str, Any] = {"attention_mask": None if mask is None and bool(short_mask.all()) else whole}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = _count_again(kwargs["position_ids"], whole)
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = kwargs["cache_position"] - (self._long - short)
        return {**kwargs, **changed}


def _count_again(
    position_ids: Tensor,  # [3 or 4, B, M]
    attention_mask: Tensor,  # [B, M or more]
) -> Tensor:
    """The first of four planes, which counts the tokens that the language model sees."""
    if position_ids.ndim != 3 or len(position_ids) != 4:
        return position_ids
    counted = text_positions(attention_mask)[:, -position_ids.shape[-1] :]
    return torch.cat([counted[None].to(position_ids), position_ids[1:]])


def _flat(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise ValueError(
        "a patch shortens attention masks [B, L], and this host prepared another one; generate without a static cache"
    )


def _encoder(model: nn.Module) -> Any:
    for module in model.modules():
        if hasattr(module, "merger") and hasattr(module, "spatial_merge_size") and hasattr(module, "blocks"):
            return module
    raise ValueError(f"no Qwen encoder in a {type(model).__name__}: nothing with blocks, merger and spatial_merge_size")


def _language_model(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens"):
            return module
    raise ValueError(f"no language model in a {type(model).__name__}: nothing with layers and embed_tokens")


def _geometry(model: nn.Module, tower: nn.Module) -> nn.Module | None:
    """The merger of geometry features, which is not the encoder's own; None where there is none."""
    inside = set(tower.modules())
    for wanted in MERGERS:
        for name, module in model.named_modules():
            if module not in inside and name.rpartition(".")[2] == wanted:
                return module
    return None
