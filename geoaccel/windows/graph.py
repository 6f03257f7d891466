"""Placement of all windows in one world: a pose graph over similarity transforms.

Every edge aligns one window to another: two neighbours that share frames, two windows that saw the same place at
different times, or a window and a wide one over some of its frames. The objective is the sum of squared residuals over
all edges: a rotation in radians, a translation relative to the size of the window's scene, and a log scale. SciPy's
sparse least squares moves all windows but the first of every piece; loops and wide windows that the rest of the graph
contradicts are down-weighted by the Cauchy loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoaccel.alignment import Similarity
from geoaccel.errors import MissingPackage

HINT = "joining windows needs SciPy, which cannot be imported; pip install geoaccel[windows]"
OUTLYING = 3.0
"""Residual of an edge, over its `sigma`, from which it is down-weighted."""
STEPS = 50


def require_scipy() -> None:
    """Import SciPy.

    Raises:
        MissingPackage: With one line that says how to install it.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingPackage(HINT) from None


@dataclass(frozen=True)
class Edge:
    """Alignment of window `b` to window `a`.

    Attributes:
        a, b: Indices of windows.
        similarity: From the world of b to that of a.
        sigma: Expected residual.
        loop: Whether it is a loop closure.
        wide: Whether `b` is a wide window.
    """

    a: int
    b: int
    similarity: Similarity
    sigma: float = 1.0
    loop: bool = False
    wide: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether it is down-weighted if the rest of the graph contradicts it."""
        return self.loop or self.wide


def identity() -> Similarity:
    """The identity transform."""
    one = torch.eye(3, dtype=torch.float64)
    return Similarity(one[0, 0], one, one.new_zeros(3))


def compose(outer: Similarity, inner: Similarity) -> Similarity:
    """The composition: first the inner one, then the outer one."""
    turned = (outer.rotation @ inner.translation[..., None])[..., 0]
    return Similarity(
        outer.scale * inner.scale,
        outer.rotation @ inner.rotation,
        outer.scale[..., None] * turned + outer.translation,
    )


def inverse(similarity: Similarity) -> Similarity:
    """The inverse transform."""
    rotation = similarity.rotation.transpose(-1, -2)
    back = (rotation @ similarity.translation[..., None])[..., 0]
    return Similarity(1 / similarity.scale, rotation, -back / similarity.scale[..., None])


def pieces(count: int, edges: Sequence[Edge]) -> list[list[int]]:
    """Connected components of windows, each in order, sorted by first window."""
    piece = list(range(count))

    def first(window: int) -> int:
        while piece[window] != window:
            window = piece[window]
        return window

    for edge in edges:
        low, high = sorted((first(edge.a), first(edge.b)))
        piece[high] = low
    found: dict[int, list[int]] = {}
    for window in range(count):
        found.setdefault(first(window), []).append(window)
    return list(found.values())


def chained(count: int, edges: Sequence[Edge]) -> list[Similarity]:
    """Every window in the world of the first one of its piece, chained along the first edges, without closing loops."""
    placed: dict[int, Similarity] = {}
    ordered = sorted(edges, key=lambda edge: (edge.loop, edge.wide))
    for members in pieces(count, edges):
        placed[members[0]] = identity()
        while len(placed.keys() & set(members)) < len(members):
            for edge in ordered:
                if edge.a in placed and edge.b not in placed:
                    placed[edge.b] = compose(placed[edge.a], edge.similarity)
                elif edge.b in placed and edge.a not in placed:
                    placed[edge.a] = compose(placed[edge.b], inverse(edge.similarity))
                else:
                    continue
                break
    return [placed[window] for window in range(count)]


def solve(
    count: int,
    edges: Sequence[Edge],
    sizes: Sequence[float],  # [count], size of each window's scene, in its own unit
    *,
    with_scale: bool = True,
) -> list[Similarity]:
    """Every window in the world of the first one of its piece, by optimisation over all edges.

    Args:
        count: Number of windows.
        edges: Edges between them.
        sizes: Translations are relative to these.
        with_scale: False keeps all scales at 1.

    Raises:
        MissingPackage: SciPy is not installed.
    """
    require_scipy()
    start = chained(count, edges)
    fixed = [members[0] for members in pieces(count, edges)]
    free = np.setdiff1d(np.arange(count), fixed)
    if len(free) == 0 or len(edges) == len(free):  # a tree has no residual
        return start
    from scipy.optimize import least_squares

    graph = _Graph.of(start, edges, sizes, free, with_scale)
    done = least_squares(
        graph.left_over,
        np.zeros(len(free) * graph.dof),
        graph.jacobian,
        method="trf",
        loss=graph.loss,
        tr_solver="lsmr",
        tr_options={"maxiter": 20 * len(free) + 100, "atol": 1e-12, "btol": 1e-12},
        max_nfev=STEPS,
        xtol=1e-8,
        ftol=1e-8,
        gtol=1e-10,
    )
    return graph.at(done.x)


def _stacked(similarities: Sequence[Similarity]) -> Similarity:
    parts = [(one.scale, one.rotation, one.translation) for one in similarities]
    return Similarity(*(torch.stack(part) for part in zip(*parts, strict=True)))


def exponential(
    steps: Tensor,  # [N, 7], a rotation in radians, a translation, a log scale
) -> Similarity:
    """Exponential map: steps to similarity transforms."""
    turn = steps[:, :3]
    skew = torch.zeros(len(steps), 3, 3, dtype=steps.dtype)
    skew[:, [2, 0, 1], [1, 2, 0]], skew[:, [1, 2, 0], [2, 0, 1]] = turn, -turn
    return Similarity(steps[:, 6].exp(), torch.linalg.matrix_exp(skew), steps[:, 3:6])


def logarithm(similarity: Similarity) -> Tensor:  # [N, 7]
    """The inverse of `exponential`, for rotations of less than 180 degrees."""
    rotation = similarity.rotation
    skew = (rotation - rotation.transpose(1, 2)) / 2
    sine = torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], dim=1)  # of the angle, along the axis
    length = sine.norm(dim=-1)
    angle = torch.atan2(length, (rotation.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2)
    turn = sine * torch.where(length > 1e-9, angle / length.clamp(min=1e-12), 1.0)[:, None]
    return torch.cat([turn, similarity.translation, similarity.scale.log()[:, None]], dim=1)


@dataclass(frozen=True)
class _Graph:
    """Variables and residuals of `solve`.

    Attributes:
        start: Initial placement of all windows.
        to_b: For every edge, the inverse: from the world of a to that of b.
        a, b: [E].
        sizes: [E], size of the scene of b.
        weights: [E], 1 / sigma.
        doubtful: [E].
        column: [count], index of a window among the free ones; -1 for fixed ones.
        dof: 7, or 6 without scale.
    """

    start: Similarity
    to_b: Similarity
    a: np.ndarray
    b: np.ndarray
    sizes: Tensor
    weights: Tensor
    doubtful: np.ndarray
    column: np.ndarray
    dof: int

    @classmethod
    def of(
        cls, start: list[Similarity], edges: Sequence[Edge], sizes: Sequence[float], free: np.ndarray, with_scale: bool
    ) -> _Graph:
        a, b = np.array([edge.a for edge in edges]), np.array([edge.b for edge in edges])
        column = np.full(len(start), -1)
        column[free] = np.arange(len(free))
        return cls(
            start=_stacked(start),
            to_b=inverse(_stacked([edge.similarity for edge in edges])),
            a=a,
            b=b,
            sizes=torch.tensor(sizes, dtype=torch.float64)[torch.from_numpy(b)],
            weights=1 / torch.tensor([edge.sigma for edge in edges], dtype=torch.float64),
            doubtful=np.array([edge.doubtful for edge in edges]),
            column=column,
            dof=7 if with_scale else 6,
        )

    def moved(self, steps: np.ndarray) -> Similarity:
        """All windows after a step of the free ones, each in its own world."""
        all_steps = torch.zeros(len(self.column), 7, dtype=torch.float64)
        all_steps[torch.from_numpy(self.column >= 0), : self.dof] = torch.from_numpy(steps.reshape(-1, self.dof))
        return compose(self.start, exponential(all_steps))

    def at(self, steps: np.ndarray) -> list[Similarity]:
        moved = self.moved(steps)
        return [Similarity(*parts) for parts in zip(moved.scale, moved.rotation, moved.translation, strict=True)]

    def left_over(self, steps: np.ndarray) -> np.ndarray:  # [E * dof]
        moved = self.moved(steps)
        return self._of_ends(_rows(moved, self.a), _rows(moved, self.b)).numpy().ravel()

    def _of_ends(self, a: Similarity, b: Similarity) -> Tensor:  # [E, dof]
        left = logarithm(compose(self.to_b, compose(inverse(a), b)))
        left[:, 3:6] /= self.sizes[:, None]
        return left[:, : self.dof] * self.weights[:, None]

    def jacobian(self, steps: np.ndarray):  # sparse [E * dof, free * dof]
        """Jacobian by central differences, for both ends of all edges at once."""
        from scipy.sparse import coo_array

        given = torch.zeros(len(self.column), 7, dtype=torch.float64)
        given[torch.from_numpy(self.column >= 0), : self.dof] = torch.from_numpy(steps.reshape(-1, self.dof))
        rows, columns, values = [], [], []
        row = np.arange(len(self.a) * self.dof)
        for end in (self.a, self.b):
            own = np.repeat(self.column[end], self.dof)
            for k in range(self.dof):
                ends = []
                for sign in (1, -1):
                    at = given.clone()
                    at[:, k] += sign * 1e-6
                    other, step = (compose(self.start, exponential(x)) for x in (given, at))
                    a, b = (step, other) if end is self.a else (other, step)
                    ends.append(self._of_ends(_rows(a, self.a), _rows(b, self.b)))
                slope = ((ends[0] - ends[1]) / 2e-6).numpy().ravel()
                rows.append(row[own >= 0])
                columns.append((own * self.dof + k)[own >= 0])
                values.append(slope[own >= 0])
        shape = (len(row), len(steps))
        return coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape).tocsr()

    def loss(self, squares: np.ndarray) -> np.ndarray:  # [3, E * dof]
        """Squared loss for neighbours, Cauchy loss for loops and wide windows."""
        doubtful = np.repeat(self.doubtful, self.dof)
        scaled = squares / OUTLYING**2
        rho = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        cauchy = np.stack([np.log1p(scaled) * OUTLYING**2, 1 / (1 + scaled), -1 / (1 + scaled) ** 2 / OUTLYING**2])
        return np.where(doubtful, cauchy, rho)


def _rows(similarity: Similarity, index: np.ndarray) -> Similarity:
    rows = torch.from_numpy(index)
    return Similarity(similarity.scale[rows], similarity.rotation[rows], similarity.translation[rows])
