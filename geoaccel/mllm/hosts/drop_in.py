"""Fewer visual tokens inside a host that fuses 2D and 3D features itself, as VG-LLM does, with unchanged calls.

    with patch(model, Merge3DConfig(ratio=0.1)) as patched:
        output = model.generate(**inputs)                  # its inputs, its arguments
    print(patched.plan)

The patch reads three modules and changes the input of a fourth. All are found in the model:

- the 2D encoder (``visual``): its tokens, their saliency, the grids of the images;
- the merger of the geometry features (``geometry_merger``, or ``merger`` next to the encoder): features for each token,
  which the host adds to the 2D tokens;
- the model itself: ``input_ids``, for the slots;
- the language model (whatever has ``layers`` and ``embed_tokens``): in the prefill, visual slots that were merged away
  are removed from ``inputs_embeds``, ``position_ids``, ``attention_mask``, ``cache_position`` and DeepStack's features;
  in later steps, from the mask and the count of cached tokens, and from a turn that the host cut off too early.

The host still counts the slots of the long conversation, and positions of the output continue as without the patch, in
transformers 4 and 5. These are forward hooks: no method is replaced, no weight is changed, and :meth:`Patch.remove`
restores the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from geoaccel.errors import UserError
from geoaccel.mllm.handed import by_name, handed_cache, pooled, refuse_unknown, returned_cache, wanted
from geoaccel.mllm.hosts.conversation import Conversation, count_again
from geoaccel.mllm.hosts.heard import Heard, in_pieces
from geoaccel.mllm.hosts.sequence import check_slots, gather_slots, merge_slots, remaining_slots
from geoaccel.mllm.hosts.streams import Method, check_method
from geoaccel.mllm.merge3d import DEFAULT, Merge3DConfig
from geoaccel.mllm.saliency import SaliencyProbe
from geoaccel.mllm.token_plan import TokenPlan

MERGERS = ("geometry_merger", "merger")
"""Names of the module that projects geometry features to the width of the language model, in hosts of this kind."""


SHORTENED = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "cache_position",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)
"""Arguments of a language model that run along the prompt or its visual tokens."""


def patch(model: nn.Module, config: Method = DEFAULT, *, geometry: nn.Module | None = None) -> Patch:
    """Reduce visual tokens in every prefill of a model, until the patch is removed.

    The logits of a prefill are those of the shortened prompt. For training use :func:`reduce_inputs` or
    :func:`rewrite_sequence`, which shorten labels too.

    Args:
        model: Qwen2.5-VL with a geometry encoder, in the manner of VG-LLM. Without one, tokens are matched by 2D
            features.
        config: The method with its knobs.
        geometry: Module that outputs the geometry features, one row per token; None: found by name.

    Generation needs a cache that grows (``use_cache=True``, not a static one) and a prompt in one piece (no
    ``prefill_chunk_size``). Under transformers 5 a prompt has one output: ``generate`` repeats prompts for beams and
    for further outputs after the encoder has run. ``reduce_for_generate`` can do all of these.

    An encoder may run under the patch outside of ``generate``; the next prompt uses the last runs, as far as it has
    slots for them.

    A later turn continues from the cache of the last output, without pixels, under the same patch: with the whole
    conversation or with what is new. A copy of a cache must be one of the last prompt. Positions continue from the
    highest one.

    Returns:
        A context manager that removes the patch at its end; the patch is active already.

    Raises:
        ValueError: If a part is not found, or the model is already patched.
    """
    return Patch(model, config, geometry)


class Patch:
    """Hooks on a model; see :func:`patch`.

    Attributes:
        plan: Plan of the last prefill with visual tokens, in the order of their slots; None before.
        source: [B, M], slot of the long prompt for each slot of that prefill; -1 for padding.
    """

    def __init__(self, model: nn.Module, config: Method, geometry: nn.Module | None) -> None:
        if getattr(model, "_merge3d", None) is not None:
            raise UserError(f"this {type(model).__name__} is already patched; remove() that patch first")
        check_method(config)
        knobs = config if isinstance(config, Merge3DConfig) else DEFAULT
        self.plan: TokenPlan | None = None
        self.source: Tensor | None = None
        self._model = cast(Any, model)
        self._config = config
        probe = SaliencyProbe.for_model(model, layer=knobs.saliency_layer, signal=knobs.saliency)
        tower, language = _encoder(model), _language_model(model)
        geometry = _geometry(model, tower) if geometry is None else geometry
        if not isinstance(geometry, nn.Module | None):
            raise UserError(
                f"geometry is a {type(geometry).__name__}; give the module that outputs the geometry features, or "
                f"leave it out to find {' or '.join(MERGERS)} by name"
            )
        ids = self._model.config
        self._heard = Heard(probe, tower.spatial_merge_size, ids.image_token_id, ids.video_token_id)
        self._input_ids: Tensor | None = None
        self._counted = False  # positions were given to the host
        self._last: Conversation | None = None
        self._conversations: WeakKeyDictionary[Any, Conversation | None] = WeakKeyDictionary()  # by cache
        self._dropped: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # runs without slots in a cache's prompt
        self._handles: list[RemovableHandle] = []
        try:
            self._hook(tower, language, geometry)
        except BaseException:  # nobody else could take them out
            self.remove()
            raise
        self._model._merge3d = self

    def _hook(self, tower: nn.Module, language: nn.Module, geometry: nn.Module | None) -> None:
        add, model = self._handles.append, self._model
        add(model.register_forward_pre_hook(self._note_ids, with_kwargs=True))
        add(model.register_forward_hook(self._end, always_call=True))
        add(tower.register_forward_pre_hook(self._note_grid, with_kwargs=True))
        add(tower.register_forward_hook(self._note_tokens))
        add(language.register_forward_pre_hook(self._shorten, with_kwargs=True))
        add(language.register_forward_hook(self._note_cache))
        if geometry is not None:
            add(geometry.register_forward_hook(self._note_geometry))
        self._heard.listen()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._heard.forget()
        if getattr(self._model, "_merge3d", None) is self:
            del self._model._merge3d

    def _note_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(module, args, kwargs)
        if given.get("labels") is not None:
            raise UserError("a patched model cannot train: labels would not fit its logits; use reduce_inputs instead")
        if given.get("pixel_values") is not None or given.get("pixel_values_videos") is not None:
            self._heard.listen()  # the encoder is about to run; in transformers 5 generate has run it before
        self._input_ids = given.get("input_ids")
        self._counted = given.get("position_ids") is not None

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._heard.lengths:  # it failed on the way to the language model
            self._heard.listen()

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._heard.begin(wanted(by_name(module, args, kwargs), "grid_thw", module).tolist())

    def _note_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._heard.end(pooled(output, module))

    def _note_geometry(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._heard.geometry(output.reshape(-1, output.shape[-1]))

    def _shorten(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = by_name(module, args, kwargs)
        cache = handed_cache(given, module)
        cached = 0 if cache is None else int(cache.get_seq_length())
        if cached:
            return self._go_on(given, cache, cached, module)
        if self._heard.lengths and (self._input_ids is None or bool(self._heard.visual(self._input_ids).any())):
            return (), self._prefill(given, cache, module)
        self._begin(cache, None, self._heard.lengths)  # a prompt without images
        if self._heard.lengths:
            self._heard.listen()
        if self._input_ids is not None and bool(self._heard.visual(self._input_ids).any()):
            raise UserError(
                "visual placeholders in input_ids, an empty cache and no pixels for the encoder: a patched model "
                "needs use_cache=True; without a cache, remove the patch and use reduce_for_generate(...)"
            )
        return None

    def _go_on(
        self, given: dict[str, Any], cache: Any, cached: int, module: nn.Module
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if cache not in self._conversations:  # a copy
            self._conversations[cache] = None if self._last is None else replace(self._last)
        conversation, ids, changed = self._conversations[cache], self._input_ids, None
        if conversation is not None:
            wanted(given, "inputs_embeds", module)
            changed = conversation.go_on(given, _flat(given.get("attention_mask")), ids, cached, self._counted)
            ids = None if ids is None else ids[:, -changed["inputs_embeds"].shape[1] :]
        if self._heard.lengths or cache in self._dropped:
            visual = None if ids is None else int(self._heard.visual(ids).sum())
            if self._heard.lengths and visual != 0:
                raise UserError(
                    "images after a cached conversation cannot be reduced; start without a cache, or leave out "
                    "pixels that are in it"
                )
            if visual:
                raise in_pieces(visual, self._dropped[cache])
            if self._heard.lengths:  # the encoder ran for something else
                self._heard.listen()
        return None if changed is None else ((), changed)

    def _begin(self, cache: Any, conversation: Conversation | None, dropped: list[int]) -> None:
        self.source = None if conversation is None else conversation.source
        self._last = conversation
        if cache is not None:
            self._conversations[cache] = conversation
            self._dropped.pop(cache, None)
            if dropped:
                self._dropped[cache] = dropped

    def _note_cache(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = returned_cache(output)
        if cache is not None:  # made by the language model, where the host was given none
            self._conversations.setdefault(cache, self._last)

    def _prefill(self, given: dict[str, Any], cache: Any, module: nn.Module) -> dict[str, Any]:
        ids, embeds = self._input_ids, wanted(given, "inputs_embeds", module)
        long_positions = wanted(given, "position_ids", module)
        if ids is None or ids.shape != embeds.shape[:2]:
            raise UserError(
                f"{type(self._model).__name__} has {'no' if ids is None else list(ids.shape)} input_ids, and its "
                f"language model inputs_embeds {list(embeds.shape)}; reduce its inputs with rewrite_sequence"
            )
        if given.get("visual_pos_masks") is not None:
            wanted(given, "deepstack_visual_embeds", module)
        refuse_unknown(given, SHORTENED, (ids.shape[0], ids.shape[1]), module)
        mask = _flat(given.get("attention_mask"))
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        visual = self._heard.visual(ids)
        plan, dropped = self._heard.plan(ids, self._config)
        self._heard.listen()
        check_slots(visual, attended, plan)
        source = remaining_slots(visual, attended, plan)
        self.plan = plan
        begun = Conversation.begin(source, ids, attended & ~visual, attended, long_positions)
        self._begin(cache, begun, dropped)
        short_mask = (source >= 0).long()
        planes = gather_slots(long_positions.movedim((-2, -1), (0, 1)), source).movedim((0, 1), (-2, -1))
        changed: dict[str, Any] = {
            "inputs_embeds": merge_slots(embeds, source, visual, plan),
            "position_ids": count_again(planes, short_mask),
            "attention_mask": None if mask is None and bool(short_mask.all()) else short_mask,
        }
        if given.get("cache_position") is not None:
            changed["cache_position"] = given["cache_position"][: source.shape[1]]
        if given.get("visual_pos_masks") is not None:
            changed["visual_pos_masks"] = gather_slots(visual, source, False)
        if given.get("deepstack_visual_embeds") is not None:
            changed["deepstack_visual_embeds"] = [plan.apply(level) for level in given["deepstack_visual_embeds"]]
        return {**given, **changed}


def _flat(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise UserError(
        "a patch shortens attention masks [B, L], but this host prepared another kind; generate without a static cache"
    )


def _encoder(model: nn.Module) -> Any:
    for module in model.modules():
        if hasattr(module, "merger") and hasattr(module, "spatial_merge_size") and hasattr(module, "blocks"):
            return module
    raise UserError(f"no Qwen encoder in a {type(model).__name__}: nothing with blocks, merger and spatial_merge_size")


def _language_model(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens"):
            return module
    raise UserError(
        f"no language model in a {type(model).__name__}: nothing with layers and embed_tokens; "
        "patch the whole model, not a part of it"
    )


def _geometry(model: nn.Module, tower: nn.Module) -> nn.Module | None:
    """The merger of geometry features, which is not the encoder's own; None if there is none."""
    inside = set(tower.modules())
    for merger in MERGERS:
        for name, module in model.named_modules():
            if module not in inside and name.rpartition(".")[2] == merger:
                return module
    return None
