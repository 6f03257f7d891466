"""What a merging method is: a frozen dataclass of knobs that makes the objects that act.

    @register
    @dataclass(frozen=True)
    class MyMethod(AttentionMerging):
        name: ClassVar[str] = "mymethod"
        ratio: float = 0.5

        def mixer(self, kernel: str) -> MergingMixer: ...

A method acts at one of two places: in every global attention (:class:`AttentionMerging`), or on the residual stream over
a span of blocks (:class:`SpanMerging`). Knobs are checked when the method is made; what must be remembered between the
layers of one forward lives in ``AttentionContext.state``, which every forward makes afresh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from geoaccel.attention import AttentionContext, Restore
from geoaccel.registry import Registry


@dataclass(frozen=True)
class Effect:
    """What one mixer did in its last forward.

    Attributes:
        tokens: N that the attention would have seen.
        queries: Mean number of queries that it saw, over batch and heads.
        keys: Mean number of keys.
        bypassed: Why nothing was merged; None where something was.
    """

    tokens: int
    queries: float
    keys: float
    bypassed: str | None = None

    @property
    def effective_ratio(self) -> float:
        """1 - M / N of the queries."""
        return 1 - self.queries / self.tokens

    @property
    def effective_key_ratio(self) -> float:
        """1 - M / N of the keys."""
        return 1 - self.keys / self.tokens


class MergingMixer:
    """What a method puts into the slot of one attention.

    Attributes:
        effect: Of the last forward; None before the first.
    """

    effect: Effect | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionMerging:
    """Merges inside every global attention and restores the full length after it.

    Attributes:
        name: Registered name.
        place: What two methods cannot both claim.
    """

    name: ClassVar[str]
    place: ClassVar[str] = "global attention"

    def mixer(self, kernel: str) -> MergingMixer:
        """The object for one attention; ``kernel`` is a name from ``geoaccel.attention.KERNELS``."""
        raise NotImplementedError


Method = TypeVar("Method", bound=type)

MERGING: Registry[Callable[..., AttentionMerging]] = Registry("merging method")


def register(method: Method) -> Method:
    """Class decorator: make a method known under its name."""
    MERGING.register(method.name, method)
    return method
