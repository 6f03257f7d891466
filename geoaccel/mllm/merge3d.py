"""Merge3D: joint 2D-3D token merging for multimodal LLMs (Pan et al., CVPR 2026).

A 3D multimodal LLM adds geometry features to the visual tokens of its frames. The most salient tokens stay; every other
one is merged into the kept token most similar in semantics and geometry, exp(v v' / tau_sem) times exp(g g' / tau_geo),
and the language model reads K tokens instead of n.

    plan = plan_merge(scores, sem, geo, Merge3DConfig(ratio=0.1))
    short = plan.apply(sem + geo)          # [K, C]
    position_ids = plan.gather(position_ids)

Nothing is learned here, and the product is a weighted sum of two similarities, since only its argmax is used.

Differs from the paper in:
    - Similarities are cosines (``metric="cosine"``): with dot products a few tokens of large norm attract most others,
      and the meaning of tau depends on the checkpoint. ``metric="dot"`` is the published equation.
    - Not published, and therefore our choice: the values of tau (equal weights), the block that saliency is measured in
      (the last one that attends within whole frames), and the order and positions of what stays (each in its own slot).
    - An optional gate on world coordinates (``gate``), which the equations lack: tokens that are far apart are never
      merged, however similar they look.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.knobs import check_knobs
from geoaccel.mllm.budget import Budget, is_count
from geoaccel.mllm.fold import fold
from geoaccel.mllm.gate import Gate, GateKind
from geoaccel.mllm.joint import Metric, Stream
from geoaccel.mllm.saliency import Signal
from geoaccel.mllm.token_plan import Reduce, TokenPlan
from geoaccel.mllm.tokens import IN_A_HOST, VisualTokens


@dataclass(frozen=True)
class Merge3DConfig(Budget):
    """Knobs of Merge3D, in addition to those of the budget.

    Attributes:
        metric: ``cosine`` or ``dot``.
        tau_sem, tau_geo: Temperatures; their ratio decides which tokens merge, their size how uneven the weights of
            ``reduce="weighted"`` are. Infinity ignores the stream.
        reduce: How a group becomes one token; see :data:`geoaccel.mllm.token_plan.Reduce`.
        allow_cross_frame: Whether a token may merge into one of another frame.
        saliency: What a probe measures if no scores are given: attention that a token receives from all tokens, or from
            the class token. Read by the hosts.
        saliency_layer: Block of the 2D encoder that the probe looks at. Read by the hosts.
        gate: ``radius`` merges tokens only into those within ``gate_size``, ``voxel`` only into those of the same voxel
            of that side; if there is none, into the nearest. None: no gate.
        gate_size: Distance, in the unit of the points.
        chunk: Tokens matched at a time; memory is linear in it.
    """

    metric: Metric = "cosine"
    tau_sem: float = 1.0
    tau_geo: float = 1.0
    reduce: Reduce = "add_mean"
    allow_cross_frame: bool = True
    saliency: Signal = "received_attention"
    saliency_layer: int = -1
    gate: GateKind | None = None
    gate_size: float | None = None
    chunk: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_knobs(self, "Merge3DConfig")
        for knob, kind in (("metric", Metric), ("reduce", Reduce), ("saliency", Signal)):
            if getattr(self, knob) not in get_args(kind):
                raise UserError(f"{knob}={getattr(self, knob)!r}; known: {', '.join(get_args(kind))}")
        for knob in ("tau_sem", "tau_geo"):
            if not getattr(self, knob) > 0:
                raise UserError(f"{knob}={getattr(self, knob)!r} must be positive; infinity ignores the stream")
        if math.isinf(self.tau_sem) and math.isinf(self.tau_geo):
            raise UserError("tau_sem and tau_geo are both infinite, so nothing is left to match by; make one finite")
        if self.gate is not None and self.gate not in get_args(GateKind):
            raise UserError(f"gate={self.gate!r}; known: {', '.join(get_args(GateKind))}, or None")
        if (self.gate is None) != (self.gate_size is None) or not (self.gate_size is None or self.gate_size > 0):
            raise UserError(f"gate={self.gate!r} with gate_size={self.gate_size!r}: give a positive size")
        if not self.allow_cross_frame and self.scope == "clip" and self.min_per_frame == 0:
            raise UserError("allow_cross_frame=False needs scope='frame' or min_per_frame=1: a frame may keep no token")
        if not is_count(self.chunk, 1):
            raise UserError(f"chunk={self.chunk!r} must be a positive number of tokens")


DEFAULT = Merge3DConfig()


def plan_merge(
    scores: Tensor,  # [n]
    sem: Tensor,  # [n, ds]
    geo: Tensor | None = None,  # [n, dg]
    config: Merge3DConfig = DEFAULT,
    *,
    cu_seqlens: Tensor | None = None,  # [samples + 1]
    frame_of: Tensor | None = None,  # [n]
    xyz: Tensor | None = None,  # [n, 3]
) -> TokenPlan:
    """Decide which visual tokens stay, and into which of them each of the others merges.

    Tokens are in the order in which their embeddings replace the placeholders. The streams may differ in width and have
    any float dtype; narrow types give the same plan as their float32 copies. Deterministic; no gradient is recorded.

    Args:
        scores: Saliency, higher is more salient; see :class:`geoaccel.mllm.saliency.SaliencyProbe`.
        sem: Features of the 2D encoder.
        geo: Features of the geometry encoder. Without them tokens are matched by semantics alone.
        config: The knobs.
        cu_seqlens: Start of each sample in the batch, and n at the end; None: one sample. Each has its own budget, and
            tokens are matched within their sample.
        frame_of: Frame index of each token within its sample; for the knobs that depend on frames.
        xyz: World coordinates, for a gate.

    Raises:
        ValueError: If the streams differ in length, hold NaN, or lack what the knobs need.
    """
    if not isinstance(config, Merge3DConfig):
        raise UserError(f"config={config!r}: give knobs, as Merge3DConfig(ratio=0.3)")
    if not (math.isinf(config.tau_sem) or math.isinf(config.tau_geo)) and geo is None:
        warnings.warn(
            "no geometry features: tokens are matched by semantics alone; pass geo (of a host: geometry), "
            "or set tau_geo=inf",
            stacklevel=2,
        )
    tokens = VisualTokens(scores, sem, geo, frame_of, xyz)
    return tokens.plan(lambda sample: _plan_sample(sample, config), cu_seqlens)


def _plan_sample(tokens: VisualTokens, config: Merge3DConfig) -> TokenPlan:
    keep = config.most_salient(tokens.scores, tokens.frame_of)
    streams, mask = _streams(tokens, config), _mask(tokens, config)
    return fold(
        streams,
        keep,
        len(tokens),
        reduce=config.reduce,
        metric=config.metric,
        chunk=config.chunk,
        mask=mask,
    )


def _streams(tokens: VisualTokens, config: Merge3DConfig) -> list[Stream]:
    """The features for matching, with their weights."""
    streams = []
    if not math.isinf(config.tau_sem):
        streams.append(Stream(tokens.sem, 1 / config.tau_sem))
    if tokens.geo is not None and not math.isinf(config.tau_geo):
        streams.append(Stream(tokens.geo, 1 / config.tau_geo))
    if not streams:
        raise UserError(
            f"tau_sem=inf matches tokens by geometry alone, and geo, the geometry features, is missing; {IN_A_HOST}"
        )
    return streams


def _mask(tokens: VisualTokens, config: Merge3DConfig) -> Gate | None:
    if config.gate is None and config.allow_cross_frame:
        return None
    if config.gate is not None and tokens.xyz is None:
        raise UserError(f"gate={config.gate!r} needs xyz, the world coordinates of every token; {IN_A_HOST}")
    if not config.allow_cross_frame and tokens.frame_of is None:
        raise UserError("allow_cross_frame=False needs frame_of, the frame of every token")
    return Gate(config.gate, config.gate_size, tokens.xyz, None if config.allow_cross_frame else tokens.frame_of)
