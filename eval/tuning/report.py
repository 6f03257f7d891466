"""Results of tuning, as a document for a file, as the plan's own notes, and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from geoaccel.eval.tuning.budget import Budget, in_words
from geoaccel.eval.tuning.choices import DENSE
from geoaccel.eval.tuning.trials import fresh
from geoaccel.eval.tuning.tune import Found


def notes(found: Found, budget: Budget, frames: int, size: tuple[int, int]) -> dict[str, Any]:
    """Notes stored in the plan: nothing that varies between runs."""
    return {
        "budget": budget.words(),
        "photographs": frames,
        "size": list(size),
        "speedup_predicted": float(f"{found.speedup:.4g}"),
        "errors_predicted": fresh(found.predicted),
        "errors_choosing": fresh(found.choosing),
        "errors_unseen": fresh(found.unseen),
    }


def document(found: Found, budget: Budget, timing: dict[str, Any]) -> dict[str, Any]:
    """Everything, as plain data.

    Args:
        found: Result of tuning.
        budget: The requested budget.
        timing: Output of :func:`geoaccel.eval.tuning.timing.timed`.
    """
    layers = [
        {
            "layer": layer,
            "chosen": name,
            "error_alone": found.alone[layer][name],
            "dense_predicted_s": row[DENSE],
            "predicted_s": row[name],
            "dense_ms": timing["layers_dense_ms"][layer],
            "ms": timing["layers_plan_ms"][layer],
        }
        for layer, (name, row) in enumerate(zip(found.chosen, found.costs.layers, strict=True))
    ]
    return {
        "budget": asdict(budget),
        "layers": layers,
        "alone": found.alone,
        "predicted_s": {"layers": found.costs.layers, "rest": found.costs.rest},
        "blocks": {"alone": found.small.alone, "chosen": found.small.chosen, "needed_bytes": found.small.needed},
        "rounds": [asdict(one) for one in found.rounds],
        "predicted": {**found.predicted, "speedup": found.speedup},
        "other_budgets": [{"times": factor, "speedup": speedup} for factor, speedup in found.others.items()],
        "measured": {"choosing": found.choosing, "unseen": found.unseen, **timing},
    }


def table(found: Found, budget: Budget, timing: dict[str, Any]) -> str:
    """The plan layer by layer, with predictions and measurements."""
    rows = [("layer", "choice", "error alone", "work", "dense ms", "plan ms")]
    for layer, name in enumerate(found.chosen):
        alone = found.alone[layer][name]
        left = found.costs.layers[layer][name] / found.costs.layers[layer][DENSE]
        dense, fast = timing["layers_dense_ms"][layer], timing["layers_plan_ms"][layer]
        words = in_words({limit: alone[limit] for limit in budget.limits})
        rows.append((str(layer), name, words, f"{left:.0%}", f"{dense:.1f}", f"{fast:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for what, errors in (("predicted", found.predicted), ("choosing", found.choosing), ("unseen", found.unseen)):
        lines.append(f"{what:>9}: {in_words(errors)}, points {errors['points']:.3g} of the scene")
    lines.append(
        f"{'time':>9}: {found.speedup:.2f}x predicted, {timing['speedup']:.2f}x measured ({_in_turns(timing)})"
    )
    if found.others:
        gains = (
            f"{in_words({name: factor * limit for name, limit in budget.limits.items()})} {speedup:.2f}x"
            for factor, speedup in found.others.items()
        )
        lines.append(f"{'others':>9}: {'; '.join(gains)} expected; --measured with the .json avoids measuring again")
    if found.small.chosen:
        formats = list(found.small.chosen.values())
        counts = ", ".join(f"{formats.count(name)} x {name}" for name in dict.fromkeys(formats))
        lines.append(f"{'memory':>9}: {found.small.needed / 1e9:.3g} GB, blocks: {counts}")
    return "\n".join(lines)


def _in_turns(timing: dict[str, Any]) -> str:
    busy = timing["spread_ms"] > abs(timing["dense_ms"] - timing["plan_ms"])
    words = f"{timing['dense_ms']:.0f} to {timing['plan_ms']:.0f} ms, quartiles {timing['spread_ms']:.0f} ms apart"
    return words + (": the machine is busy, so this is unreliable" if busy else "")
