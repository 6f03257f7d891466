"""The pose graph: a ring that drifts closes, a wrong loop counts less, what nothing joins is apart."""

from __future__ import annotations

import sys

import pytest
import torch

from geoaccel.alignment import Similarity
from geoaccel.errors import MissingPackage
from geoaccel.windows.graph import (
    Edge,
    chained,
    compose,
    exponential,
    identity,
    inverse,
    logarithm,
    pieces,
    solve,
)


def one(step: torch.Tensor) -> Similarity:
    moved = exponential(step[None])
    return Similarity(moved.scale[0], moved.rotation[0], moved.translation[0])


def ring(count: int = 12, noise: float = 0.01) -> tuple[list[Similarity], list[Edge]]:
    """Windows round a circle, and edges between neighbours that are a little wrong."""
    generator = torch.Generator().manual_seed(5)
    truth = []
    for turn in torch.linspace(0, 5.8, count, dtype=torch.float64):
        zero = torch.zeros_like(turn)
        truth.append(one(torch.stack([zero, turn / 2, zero, 3 * turn.cos(), zero, 3 * turn.sin(), 0.2 * turn.sin()])))
    edges = []
    for i in range(count - 1):
        error = one(noise * torch.randn(7, generator=generator, dtype=torch.float64))
        edges.append(Edge(i, i + 1, compose(compose(inverse(truth[i]), truth[i + 1]), error)))
    return truth, edges


def worst(found: list[Similarity], truth: list[Similarity]) -> float:
    placed = [compose(truth[0], similarity) for similarity in found]
    return max(float((a.translation - b.translation).norm()) for a, b in zip(placed, truth, strict=True))


def test_steps_and_similarities_are_each_others_inverse() -> None:
    steps = 0.5 * torch.randn(20, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(logarithm(exponential(steps)), steps, rtol=0, atol=1e-9)
    moved = one(steps[0])
    torch.testing.assert_close(compose(moved, inverse(moved)).matrix(), identity().matrix(), rtol=0, atol=1e-12)


def test_a_loop_closes_the_ring() -> None:
    truth, edges = ring()
    loop = Edge(0, 11, compose(inverse(truth[0]), truth[11]), loop=True)
    open_, closed = chained(12, edges), solve(12, [*edges, loop], [1.0] * 12)
    assert worst(closed, truth) < 0.5 * worst(open_, truth)
    ends = [compose(inverse(found[0]), found[11]) for found in (open_, closed)]
    apart = [float((end.translation - loop.similarity.translation).norm()) for end in ends]
    assert apart[1] < 0.3 * apart[0]


def test_without_scale_no_scale_moves() -> None:
    truth, edges = ring(6)
    flat = [Edge(e.a, e.b, Similarity(torch.ones_like(e.similarity.scale), *vars_of(e.similarity))) for e in edges]
    loop = Edge(0, 5, Similarity(torch.ones((), dtype=torch.float64), *vars_of(truth[5])), loop=True)
    assert all(float(s.scale) == 1.0 for s in solve(6, [*flat, loop], [1.0] * 6, with_scale=False))


def vars_of(similarity: Similarity) -> tuple[torch.Tensor, torch.Tensor]:
    return similarity.rotation, similarity.translation


def test_a_loop_that_all_others_speak_against_counts_less() -> None:
    truth, edges = ring()
    edges = [Edge(e.a, e.b, e.similarity, sigma=0.02) for e in edges]
    right = [Edge(a, b, compose(inverse(truth[a]), truth[b]), 0.02, loop=True) for a, b in ((0, 11), (1, 10), (2, 9))]
    wrong = Edge(
        0, 6, compose(compose(inverse(truth[0]), truth[6]), one(torch.full((7,), 1.5).double())), 0.02, loop=True
    )
    assert worst(solve(12, [*edges, *right, wrong], [1.0] * 12), truth) < 0.4


def test_what_nothing_joins_is_a_piece_of_its_own() -> None:
    truth, edges = ring(6)
    parted = [edge for edge in edges if edge.a != 2]
    assert pieces(6, parted) == [[0, 1, 2], [3, 4, 5]]
    found = solve(6, parted, [1.0] * 6)
    assert torch.equal(found[3].matrix(), identity().matrix())
    loop = Edge(1, 5, compose(inverse(truth[1]), truth[5]), loop=True)
    assert pieces(6, [*parted, loop]) == [[0, 1, 2, 3, 4, 5]]
    assert worst(solve(6, [*parted, loop], [1.0] * 6), truth) < 0.2


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingPackage, match=r"pip install geoaccel\[windows\]"):
        solve(1, [], [1.0])
