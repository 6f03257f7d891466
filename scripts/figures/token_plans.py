"""What each merging method does to the tokens of one rendered scene, recorded while ``vggt-mini`` runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import geoaccel
from geoaccel.eval.data.synthetic import TEST_SEEDS, sequence
from geoaccel.merging import MERGING, alike, asymmetric, avggt, group_merging, httm, litevggt
from geoaccel.plan import MergePlan

MODEL, SEED, FRAMES, SIZE = "vggt-mini", TEST_SEEDS[0], 16, 224
SHOWN = 4
"""The first frames of the scene."""

LAYER = 1
"""Index of the global attention shown."""

QUERY = (8, 8)
"""Row and column of the patch of the second frame whose view is shown, where each has its own."""


@dataclass(frozen=True)
class Row:
    """One view of the h x w patches of the S frames shown.

    Attributes:
        title: What is shown.
        group: [S, h, w], int64: the group of each patch; -1: not merged.
        dots: [S, h, w], bool: marked patches.
        dark: [S, h, w], bool: patches left out.
        heat: [S, h, w] in [0, 1], painted instead of the photograph.
    """

    title: str
    group: Tensor | None = None
    dots: Tensor | None = None
    dark: Tensor | None = None
    heat: Tensor | None = None


@dataclass
class Calls:
    """Arguments and results of a function, call by call."""

    given: list[tuple[Any, ...]] = field(default_factory=list)
    gave: list[Any] = field(default_factory=list)


@contextmanager
def noted(place: Any, name: str) -> Iterator[Calls]:
    """Record the calls of a function of a module or an object."""
    before: Callable[..., Any] = getattr(place, name)
    calls = Calls()

    def call(*arguments: Any, **options: Any) -> Any:
        result = before(*arguments, **options)
        calls.given.append(arguments)
        calls.gave.append(result)
        return result

    setattr(place, name, call)
    try:
        yield calls
    finally:
        setattr(place, name, before)


@cache
def images() -> Tensor:  # [1, S, 3, H, W] in [0, 1]
    """The scene of all figures."""
    return sequence(SEED, frames=FRAMES, size=(SIZE, SIZE)).images


def look(name: str) -> list[Row]:
    """What a method does to the frames shown, with its default knobs."""
    model = geoaccel.load_model(MODEL)
    geoaccel.accelerate(model, merging=MERGING[name](bypass=False))

    def run() -> None:
        with torch.inference_mode():
            model(images())

    return LOOKS[name](model, run)


def asymmetric_look(model: Any, run: Callable[[], None]) -> list[Row]:
    with noted(asymmetric, "KeySubset") as calls:
        run()
    rows = []
    for layer, head, what in (
        (0, 0, "first quarter of the layers, one of the heads"),
        (-1, 0, "last quarter, one of the heads"),
    ):
        (frames, grid, special, stride, *_), subset = calls.given[layer], calls.gave[layer]
        kept = in_frames(marked(subset.index[head], frames * (special + grid[0] * grid[1])), grid, special)
        rows.append(Row(f"{what}: the first frame, then one patch in {stride}", dark=~kept))
    return rows


def avggt_look(model: Any, run: Callable[[], None]) -> list[Row]:
    with noted(avggt, "on_grid") as calls:
        run()
    (frames, grid, special, stride, _), keys = calls.given[-1], calls.gave[-1]
    tokens = frames * (special + grid[0] * grid[1])
    kept = in_frames(marked(keys.index, tokens), grid, special)
    query = torch.zeros_like(kept)
    query[1, QUERY[0], QUERY[1]] = True
    early = torch.zeros_like(kept)
    early[1] = True
    return [
        Row("first layers: the patch with a dot sees its own frame", dark=~early, dots=query),
        Row(
            f"other layers: one key in {stride} x {stride}, its own, and the mean of the dark",
            dark=~(kept | query),
            dots=query,
        ),
    ]


def httm_look(model: Any, run: Callable[[], None]) -> list[Row]:
    mixer = mixer_of(model)
    with noted(mixer, "mix_scenes") as mixes, noted(httm, "match") as matches, noted(httm, "split_outliers") as splits:
        run()
    layout = mixes.given[0][4]
    # Keys are matched first, in every layer.
    split, (plan, _) = matches.given[2 * LAYER + 1][1], splits.gave[LAYER]
    stays = torch.ones(plan.num_tokens, dtype=torch.bool)
    stays[split.source_tokens] = False
    rows = []
    for head in (0, 1):
        own = MergePlan(plan.group_of[:, head], plan.num_groups)
        title = (
            f"groups of queries, head {head + 1} of {plan.group_of.shape[1]}; a dot absorbs the others; grey is alone"
        )
        rows.append(
            Row(title, merged(own, layout.grid, layout.num_special), in_frames(stays, layout.grid, layout.num_special))
        )
    return rows


def joint_look(model: Any, run: Callable[[], None]) -> list[Row]:
    mixer = mixer_of(model)
    with noted(mixer, "plan") as plans, noted(litevggt, "importance") as maps:
        run()
    (_, layout, context), plan = plans.given[0], plans.gave[0]
    partition = context.state.notes[mixer.method].partition
    targets = in_frames(marked(partition.targets[0], layout.tokens_per_scene), layout.grid, layout.num_special)
    groups = Row(
        "groups of tokens, the same in all heads; a dot absorbs the others; grey is alone",
        merged(plan, layout.grid, layout.num_special),
        targets,
    )
    found = [
        Row("importance: edges, and tokens that differ from their neighbours", heat=ranks(score)[:SHOWN])
        for score in maps.gave
    ]
    return [*found, groups]


def groups_look(model: Any, run: Callable[[], None]) -> list[Row]:
    packer: Any = next(found for module in model.modules() if (found := getattr(module, "token_packer", None)))
    predictor = getattr(packer.ranking, "predictor", None)
    place, name = (alike, "spread") if predictor is None else (predictor, "forward")
    with noted(place, name) as ranked, noted(group_merging, "pack_groups") as packings:
        run()
    (layout, (height, width), _), packing = packings.given[0], packings.gave[0]
    scores = ranked.gave[0][0]
    if predictor is None:
        scores = scores.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, : layout.grid[0], : layout.grid[1]]
        title = f"how far the tokens of a group of {height} x {width} lie apart"
    else:
        title = "confidence that the predictor expects"
    owner = packing.owner[0].flatten()
    plan = MergePlan(owner[None], int(owner.max()) + 1)
    share = f"{packer.method.ratio:.0%}".replace("%", " %")
    which = "least apart" if predictor is None else "least confident"
    return [
        Row(title, heat=ranks(scores)[:SHOWN]),
        Row(
            f"the {share} of the groups that are {which} become one token each; grey stays",
            merged(plan, layout.grid, layout.num_special),
        ),
    ]


LOOKS: dict[str, Callable[[Any, Callable[[], None]], list[Row]]] = {
    "httm": httm_look,
    "litevggt": joint_look,
    "fastvggt": joint_look,
    "come": groups_look,
    "avggt": avggt_look,
    "asymmetric": asymmetric_look,
    "alike": groups_look,
}


def mixer_of(model: Any) -> Any:
    """The mixer of the global attention shown."""
    return model.backbone.sites(model)["global"][LAYER].mixer


def marked(index: Tensor, tokens: int) -> Tensor:  # [N], bool
    """The tokens of a scene given by an index."""
    return torch.zeros(tokens, dtype=torch.bool).index_fill_(0, index, True)


def in_frames(tokens: Tensor, grid: tuple[int, int], special: int) -> Tensor:  # [N] to [S, h, w]
    """Values of the tokens of a scene, for the patches shown."""
    return tokens.view(FRAMES, -1)[:SHOWN, special:].unflatten(1, grid)


def merged(plan: MergePlan, grid: tuple[int, int], special: int) -> Tensor:  # [S, h, w]
    """Group of each patch shown; -1 if a token is not merged in the whole scene."""
    group_of = plan.group_of[0]
    return in_frames(group_of.masked_fill(plan.counts[0][group_of] == 1, -1), grid, special)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each number, from 0 to 1."""
    return scores.flatten().argsort(stable=True).argsort(stable=True).view_as(scores) / (scores.numel() - 1)
