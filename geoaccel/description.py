"""The result of :func:`geoaccel.api.describe`, and how it prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from statistics import mean

from geoaccel.merging.layers import named
from geoaccel.merging.method import Effect, Merging
from geoaccel.quantization.swap import QuantizedPart


@dataclass(frozen=True)
class Action:
    """One merging method in one place.

    Attributes:
        place: Where it acts.
        method: The method with its knobs.
        effects: Effect of each attention, or of the packer, in the last forward; empty before the first.
        layers: The layers of global attention, if it is not in all of them.
    """

    place: str
    method: Merging
    effects: tuple[Effect, ...]
    layers: tuple[int, ...] | None = None

    @property
    def effective_ratio(self) -> float | None:
        """Mean of 1 - M / N of the queries; None before the first forward."""
        return mean(effect.effective_ratio for effect in self.effects) if self.effects else None

    @property
    def effective_key_ratio(self) -> float | None:
        """Mean of 1 - M / N of the keys; None before the first forward."""
        return mean(effect.effective_key_ratio for effect in self.effects) if self.effects else None

    @property
    def gain(self) -> float | None:
        """Predicted dense over accelerated time of a whole forward; None without a prediction."""
        found = [effect.gain for effect in self.effects if effect.gain is not None]
        return mean(found) if found and self.layers is None else None  # the prediction is for a method in all layers

    @property
    def bypassed(self) -> dict[str, int]:
        """Reasons why attentions stayed dense in the last forward, with counts."""
        return dict(Counter(effect.bypassed for effect in self.effects if effect.bypassed is not None))

    def __str__(self) -> str:
        where = "" if self.layers is None else f", layer{'s' * (len(self.layers) > 1)} {named(list(self.layers))}"
        line = f"merging in {self.place}{where}: {self.method!r}"
        if not self.effects:
            return f"{line}; no forward yet"
        tokens = ", ".join(f"{n:,}" for n in sorted({effect.tokens for effect in self.effects}))
        line += f"; in the last forward, of {tokens} tokens, "
        line += f"{self.effective_ratio:.1%} of the queries and {self.effective_key_ratio:.1%} of the keys removed"
        if self.gain is not None and not self.bypassed:  # else the reason says it
            line += f"; predicted {self.gain:.2f}x end to end"
        return line + "".join(f"; {count} x dense ({why})" for why, count in self.bypassed.items())


@dataclass(frozen=True)
class Description:
    """Result of :func:`describe`; prints as text."""

    backbone: str
    parameters: int
    dtypes: dict[str, int]
    device: str
    heads: tuple[str, ...]
    mixers: dict[str, dict[str, int]]
    merging: tuple[Action, ...]
    quantization: tuple[QuantizedPart, ...]
    rates: str | None = None
    auto: str | None = None

    @property
    def gain(self) -> float | None:
        """Predicted speedup of the last forward by all merging together; None without merging or before a forward."""
        if not self.merging or not all(action.effects and action.layers is None for action in self.merging):
            return None
        return prod(1.0 if action.bypassed else action.gain or 1.0 for action in self.merging)

    @property
    def acting(self) -> dict[str, str | None]:
        """Names of the methods that merge, and of those that quantize; None where there are none."""
        merging = [action.method.name for action in self.merging]
        names = {"merging": merging, "quantization": [part.method.name for part in self.quantization]}
        return {kind: ",".join(dict.fromkeys(found)) or None for kind, found in names.items()}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes.items())
        lines = [f"{self.backbone}: {self.parameters:,} parameters ({dtypes}) on {self.device}"]
        if self.auto is not None:
            lines.append(f"dtype chosen by auto: {self.auto}")
        lines.append(f"heads: {', '.join(self.heads)}")
        for kind, mixers in self.mixers.items():
            listing = ", ".join(f"{count} x {mixer}" for mixer, count in mixers.items())
            lines.append(f"{kind} attention: {listing}")
        rates = [f"rates for predictions: {self.rates}"] if self.rates else []
        return "\n".join([*lines, *map(str, self.merging), *rates, *map(str, self.quantization)])
