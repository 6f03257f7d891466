"""Base classes of merging methods: a frozen dataclass of knobs that creates mixers or packers.

    @register
    @dataclass(frozen=True)
    class MyMethod(AttentionMerging):
        name: ClassVar[str] = "mymethod"
        ratio: float = 0.5

        def mixer(self, kernel: str) -> MergingMixer: ...

A method acts at one of two places: in every global attention (:class:`AttentionMerging`), or on the residual stream
over a span of blocks (:class:`SpanMerging`). Every method has the knobs ``bypass`` and ``min_gain`` and leaves tokens
dense if merging would gain less than that (:mod:`geoaccel.merging.gain`). Knobs are checked on construction; state
shared between the layers of one forward is in ``ForwardState.notes``, under the method itself, new for each forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from geoaccel.attention import AttentionContext, DenseMixer, ForwardState, Mixer, Restore
from geoaccel.errors import UserError
from geoaccel.knobs import check_knobs
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.gain import MIN_GAIN, Setting, Work, attention_gain, too_little
from geoaccel.merging.rates import Kind
from geoaccel.registry import Registry


@dataclass(frozen=True)
class Effect:
    """Tokens left by one mixer or packer in its last forward.

    Attributes:
        tokens: N without merging.
        queries: Mean number of queries, over batch and heads.
        keys: Mean number of keys.
        bypassed: Why nothing was merged; None if tokens were merged.
        gain: Predicted dense over accelerated time of a whole forward, whether merged or not; None if there is nothing
            to merge.
    """

    tokens: int
    queries: float
    keys: float
    bypassed: str | None = None
    gain: float | None = None

    @property
    def effective_ratio(self) -> float:
        """1 - M / N of the queries."""
        return 1 - self.queries / self.tokens

    @property
    def effective_key_ratio(self) -> float:
        """1 - M / N of the keys."""
        return 1 - self.keys / self.tokens


class MergingMixer(Mixer):
    """The mixer of a merging method, for one attention.

    Attributes:
        method: The method with its knobs.
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
        effect: Effect in the last forward; None before the first.
        setting: The network that it is in, set by ``accelerate``; None: only the attention itself counts.
    """

    effect: Effect | None = None
    setting: Setting | None = None

    def __init__(self, method: AttentionMerging, kernel: str) -> None:
        self.method = method
        self.kernel = kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        raise NotImplementedError

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        context: AttentionContext,
        why: str,
        gain: float | None = None,
    ) -> tuple[Tensor, Restore | None]:
        """Dense attention, bit for bit as without a method; records the reason."""
        self.effect = Effect(q.shape[2], q.shape[2], k.shape[2], why, gain)
        return DenseMixer(self.kernel)(q, k, v, x, context)

    def kind(self, q: Tensor) -> Kind:  # q [n, A, N, D]
        """The kind of rates for an attention with these queries."""
        return Kind(q.device, q.dtype, q.shape[1] * q.shape[3], q.shape[3], self.kernel)

    def gain(self, work: Work, layout: TokenLayout, q: Tensor) -> float:  # q [n, A, N, D]
        """Predicted dense over merged time of a forward with this work in all global attentions."""
        return attention_gain(work, layout, self.kind(q), self.setting)

    def __repr__(self) -> str:
        return repr(self.method)


@dataclass(frozen=True, kw_only=True)
class Bypassing:
    """The knobs common to all methods.

    Attributes:
        name: Registered name.
        bypass: Leave tokens dense if merging would gain too little.
        min_gain: Minimum predicted speedup of a whole forward, all heads included, for the method to act, with 5 % to
            spare for prediction error. 1: any predicted gain.
    """

    name: ClassVar[str]
    bypass: bool = True
    min_gain: float = MIN_GAIN

    def __post_init__(self) -> None:
        check_knobs(self, self.name)
        least = self.min_gain
        if isinstance(least, bool) or not isinstance(least, Real) or not 1 <= least < float("inf"):
            raise UserError(
                f"{self.name}: min_gain={least!r} is not a valid speedup; give 1 (any time saved counts) or more"
            )
        if not self.bypass and least != MIN_GAIN:
            raise UserError(
                f"{self.name}: bypass=False always merges, so min_gain={least:g} has no effect; leave one out"
            )

    def too_little(self, gain: float) -> str | None:
        """Why a predicted gain is too small to act; None if it is enough."""
        return too_little(gain, self.min_gain) if self.bypass else None

    def verdict(self, why: str | None, predict: Callable[[], float]) -> tuple[str | None, float | None]:
        """Why not to act (None: act), and the predicted gain.

        Args:
            why: A reason known without a prediction, which is then skipped; None: there is none.
            predict: Predicts the gain.
        """
        if why is not None:
            return why, None
        gain = predict()
        return self.too_little(gain), gain


@dataclass(frozen=True)
class AttentionMerging(Bypassing):
    """Merges inside every global attention and restores the full length after it.

    Attributes:
        name: Registered name.
        place: Where it acts; no two methods may act in the same place.
        takes_packed: Whether it can also work on rows that a :class:`SpanMerging` has packed.
        own_keys: Whether every query has a key of its own, which kernels that round cannot do.
    """

    name: ClassVar[str]
    place: ClassVar[str] = "global attention"
    takes_packed: ClassVar[bool] = False
    own_keys: ClassVar[bool] = False

    def mixer(self, kernel: str) -> MergingMixer:
        """The object for one attention; ``kernel`` is a name from ``geoaccel.attention_kernels.KERNELS``."""
        raise NotImplementedError

    def mixers(self, kernel: str, depth: int) -> list[MergingMixer]:
        """One object for each of ``depth`` global attentions, first layer first."""
        return [self.mixer(kernel) for _ in range(depth)]


class MergingPacker:
    """The packer of a merging method, for the slot of the encoder; see :class:`geoaccel.attention.Packer`.

    Attributes:
        method: The method with its knobs.
        layer: Index of the encoder block after which it acts.
        effect: Effect in the last forward; None before the first.
        setting: The network that it is in, set by ``accelerate``.
    """

    effect: Effect | None = None
    setting: Setting | None = None

    def __init__(self, method: SpanMerging, layer: int) -> None:
        self.method = method
        self.layer = layer

    def __call__(self, x: Tensor, layout: TokenLayout, state: ForwardState) -> tuple[Tensor, Packing] | None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self.method)


@dataclass(frozen=True)
class SpanMerging(Bypassing):
    """Merges the residual stream over a span of blocks; tokens are dense again where a head reads them.

    Attributes:
        name: Registered name.
        place: Where it acts; no two methods may act in the same place.
    """

    name: ClassVar[str]
    place: ClassVar[str] = "token stream"

    def packer(self, model: nn.Module) -> MergingPacker:
        """The object for the model's ``token_packer`` slot.

        Raises:
            ValueError: If the method cannot work on this model.
        """
        raise NotImplementedError


Merging = AttentionMerging | SpanMerging
Method = TypeVar("Method", bound=type)

MERGING: Registry[Callable[..., Merging]] = Registry("merging method", group="merging")


def register(method: Method) -> Method:
    """Register a method under its name; a class decorator."""
    MERGING.register(method.name, method)  # type: ignore[attr-defined]
    return method


def check_share(method: Merging, **shares: float) -> None:
    """Refuse a knob outside [0, 1).

    Raises:
        ValueError: Naming the knob and its value.
    """
    for knob, value in shares.items():
        if not isinstance(value, Real) or not 0 <= value < 1:
            raise UserError(f"{method.name}: {knob}={value!r} is not in [0, 1); 0 merges nothing")
