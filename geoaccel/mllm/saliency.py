"""Attention that each visual token receives in one block of a 2D encoder, which runs unchanged.

Fused attention kernels never store the attention weights. A probe does not change them: it reads the input of one
attention module, recomputes queries and keys and sums the softmax in chunks. That costs the Q K^T of one block.

    with SaliencyProbe.for_model(model) as probe:
        features = model.get_image_features(pixel_values, image_grid_thw)
    plan = plan_merge(probe.scores, ...)

Encoders are recognised by their submodules, so transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.mllm.handed import by_name, wanted

CHUNK_ELEMENTS = 1 << 24
"""Attention weights held at once: 64 MiB in float32."""

Signal = Literal["received_attention", "cls_attention"]
"""Attention that a token receives, summed over all queries; or from the class token only."""


@dataclass(frozen=True, eq=False)
class QueriesKeys:
    """Queries and keys of one attention.

    Attributes:
        q, k: [n, A, N, D], normed and rotated.
        scale: Factor of the logits.
        lengths: Lengths of consecutive segments that do not attend to each other, if n = 1; None: one segment.
        log_weight: [N], bias on the logits of each key; None: none.
        weight: [N], number of queries that each one represents; None: one.
    """

    q: Tensor
    k: Tensor
    scale: float
    lengths: tuple[int, ...] | None = None
    log_weight: Tensor | None = None
    weight: Tensor | None = None


Reader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], QueriesKeys]
"""Function that gives queries and keys of an attention module, from its call arguments."""


@torch.no_grad()
def received_attention(
    pair: QueriesKeys,
    *,
    signal: Signal = "received_attention",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:  # [n, N], float32
    """Attention that each key receives: mean over heads, sum over the queries of its segment.

    The scores of a segment have mean 1 (``cls_attention``: sum 1), so segments can be compared.

    Args:
        pair: Queries and keys.
        signal: Whether all queries count, or only the first one of each segment, a class token.
        chunk_elements: Weights held at once; at least one query is taken at a time.
    """
    lengths = (pair.q.shape[2],) if pair.lengths is None else pair.lengths
    parts, start = [], 0
    with torch.autocast(pair.q.device.type, enabled=False):
        for length in lengths:
            segment = slice(start, start + length)
            q, k = pair.q[:, :, segment].float() * pair.scale, pair.k[:, :, segment].float().transpose(-1, -2)
            if signal == "cls_attention":
                q = q[:, :, :1]
            weight = q.new_ones(length) if pair.weight is None else pair.weight[segment].float()
            total = q.new_zeros(q.shape[0], length)
            step = max(1, chunk_elements // max(1, q.shape[0] * q.shape[1] * length))
            for rows, row_weight in zip(q.split(step, dim=2), weight[: q.shape[2]].split(step), strict=True):
                logits = rows @ k
                if pair.log_weight is not None:
                    logits += pair.log_weight[segment]
                total += torch.einsum("nahk,h->nk", logits.softmax(dim=-1), row_weight) / q.shape[1]
            parts.append(total)
            start += length
    return torch.cat(parts, dim=-1)


class SaliencyProbe:
    """A context manager that records scores of one attention module.

    Args:
        attention: The module.
        read: Gives its queries and keys from its arguments.
        arrange: Brings the scores [n, N] of one call into the order of the host's tokens; None: flattens them.
        signal: What is measured.
        tower: Encoder whose arguments ``arrange`` needs.
        layer: Index of the block, for information.
    """

    def __init__(
        self,
        attention: nn.Module,
        read: Reader,
        arrange: Callable[[Tensor, dict[str, Any]], Tensor] | None = None,
        *,
        signal: Signal = "received_attention",
        tower: nn.Module | None = None,
        layer: int | None = None,
    ) -> None:
        if signal not in get_args(Signal):
            raise UserError(f"signal={signal!r}; known: {', '.join(get_args(Signal))}")
        self.attention = attention
        self.layer = layer
        self._read = read
        self._arrange = arrange
        self._signal: Signal = signal
        self._tower = tower
        self._call: dict[str, Any] = {}
        self._found: list[Tensor] = []
        self._handles: list[Any] = []

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        layer: int = -1,
        signal: Signal = "received_attention",
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> SaliencyProbe:
        """A probe for the 2D encoder of a host model, or for the encoder itself.

        Supports the encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, SigLIP and CLIP, and others with the same structure.
        For the rest, pass the class a module and a callable that reads its queries and keys.

        Scores of a Qwen encoder are per token of the language model, in its order: the mean over the 2 x 2 patches of a
        cell, with Qwen2.5's window order undone. Those of SigLIP and CLIP are per patch, row by row, without the class
        token.

        Args:
            model: Searched for an encoder; the first one counts.
            layer: Block, as an index. Negative ones count from the end, among blocks that attend within whole frames.
            signal: What is measured; ``cls_attention`` needs a class token, as CLIP has.
            pool: For SigLIP and CLIP: the host's pooling of its feature grid, applied to scores [images, 1, h, w].

        Raises:
            ValueError: If no encoder is known, the block does not exist or attends within windows only, or there is
                no class token.
        """
        for module in model.modules():
            tower: Any = module
            blocks = getattr(tower, "blocks", None)
            if isinstance(blocks, nn.ModuleList) and hasattr(tower, "merger") and hasattr(tower, "spatial_merge_size"):
                if signal == "cls_attention":
                    raise UserError("cls_attention needs a class token, and a Qwen encoder has none")
                return _qwen_probe(tower, layer)
            layers = getattr(getattr(tower, "encoder", None), "layers", None)
            if isinstance(layers, nn.ModuleList) and hasattr(getattr(tower, "embeddings", None), "patch_embedding"):
                return _vit_probe(tower, layers, layer, signal, pool)
        raise UserError(
            f"no supported 2D encoder in a {type(model).__name__} (supported: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, "
            "SigLIP, CLIP); give SaliencyProbe an attention module and a callable that reads its queries and keys"
        )

    def __enter__(self) -> SaliencyProbe:
        if self._handles:
            raise UserError("this probe is active already; leave its with-block first")
        self._found = []
        if self._tower is not None:
            self._handles.append(self._tower.register_forward_pre_hook(self._note, with_kwargs=True))
        self._handles.append(self.attention.register_forward_pre_hook(self._listen, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._call = {}  # frees the pixels

    @property
    def scores(self) -> Tensor:  # [n], float32
        """Scores of all forwards inside the last with-block, in order.

        Raises:
            ValueError: If there was none.
        """
        if not self._found:
            raise UserError("there are no scores: run the encoder inside the probe's with-block")
        return torch.cat(self._found)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = by_name(module, args, kwargs)

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            scores = received_attention(self._read(module, args, kwargs), signal=self._signal)
            self._found.append(scores.flatten() if self._arrange is None else self._arrange(scores, self._call))


def _qwen_probe(tower: Any, layer: int) -> SaliencyProbe:
    """Packed patches, cell by cell; segments from ``cu_seqlens``."""
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    index = _block(layer, len(tower.blocks), sorted(full))
    cell = tower.spatial_merge_size**2

    def arrange(scores: Tensor, call: dict[str, Any]) -> Tensor:
        cells = scores.view(-1, cell).mean(dim=-1)
        if not hasattr(tower, "fullatt_block_indexes"):
            return cells
        order = call.get("window_index")
        if order is None:
            grid = wanted(call, "grid_thw", tower)
            side = tower.window_size // tower.spatial_merge_size // tower.patch_size
            order = window_order(grid.tolist(), tower.spatial_merge_size, side)
        return torch.empty_like(cells).index_copy(0, order.to(cells.device), cells)

    return SaliencyProbe(tower.blocks[index].attn, _read_packed, arrange, tower=tower, layer=index)


def _vit_probe(
    tower: Any, layers: nn.ModuleList, layer: int, signal: Signal, pool: Callable[[Tensor], Tensor] | None
) -> SaliencyProbe:
    """One sequence per image, patches row by row, possibly after a class token."""
    special = int(hasattr(tower.embeddings, "class_embedding"))
    if signal == "cls_attention" and not special:
        raise UserError(f"cls_attention needs a class token, and a {type(tower).__name__} has none")
    index = _block(layer, len(layers), range(len(layers)))

    def arrange(scores: Tensor, call: dict[str, Any]) -> Tensor:
        patches = scores[:, special:]
        if pool is None:
            return patches.flatten()
        side = round(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1]:
            raise UserError(f"pooling needs a square grid, and {patches.shape[1]} patches do not form one; omit pool")
        return pool(patches.view(-1, 1, side, side)).flatten()

    return SaliencyProbe(layers[index].self_attn, _read_images, arrange, signal=signal, layer=index)  # type: ignore[arg-type]


def _block(layer: int, depth: int, full: Sequence[int]) -> int:
    if not -len(full) <= layer < depth:
        raise UserError(f"layer={layer} does not exist: {depth} blocks, {len(full)} of them attend within whole frames")
    if layer < 0:
        return full[layer]
    if layer not in full:
        raise UserError(
            f"layer={layer} attends within windows, whose scores cannot be compared; choose one of {list(full)}"
        )
    return layer


def _read_packed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QueriesKeys:
    """An attention with one matrix for q, k and v, over packed patches [N, C]."""
    given = by_name(module, args, kwargs)
    x = args[0] if args else wanted(given, "hidden_states", module)
    cos, sin = (table.float()[:, None] for table in wanted(given, "position_embeddings", module))  # [N, 1, D]
    edges = wanted(given, "cu_seqlens", module)
    q, k = module.qkv(x).view(len(x), 3, module.num_heads, -1)[:, :2].float().unbind(1)  # [N, A, D]
    q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], dim=-1) * sin for t in (q, k))
    q, k = (t.transpose(0, 1)[None] for t in (q, k))
    return QueriesKeys(q, k, q.shape[-1] ** -0.5, tuple(edges.diff().tolist()))


def _read_images(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QueriesKeys:
    """An attention with a matrix each for q and k, over images [n, N, C]."""
    x = args[0] if args else wanted(kwargs, "hidden_states", module)
    heads = (-1, module.head_dim)
    q, k = (project(x).unflatten(-1, heads).transpose(1, 2) for project in (module.q_proj, module.k_proj))
    return QueriesKeys(q, k, module.scale)


def window_order(
    grids: Sequence[Sequence[int]],
    merge: int,
    side: int,
) -> Tensor:  # [cells], int64
    """The order of the cells in Qwen2.5-VL's encoder: window by window, in each frame.

    Args:
        grids: (frames, height, width) in patches, of each image or video.
        merge: Patches along the side of a cell.
        side: Cells along the side of a window.
    """
    orders, start = [], 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        window = (row // side) * columns + column // side  # ascending indices, with gaps
        within = window.flatten().argsort(stable=True)
        orders.append((torch.arange(frames)[:, None] * rows * columns + within).flatten() + start)
        start += frames * rows * columns
    return torch.cat(orders)
