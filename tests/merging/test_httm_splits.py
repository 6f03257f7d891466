"""HTTM's splits: what the host knows of them, and what is kept from one forward to the next."""

from __future__ import annotations

import pytest
import torch
from merging_scenes import Scene

from geoaccel import kept
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.httm import HTTM
from geoaccel.merging.temporal import Places, Split, Splits, dense_splits, num_blocks

CPU = torch.device("cpu")
LAYOUTS = [TokenLayout(2, 5, (4, 6), 5), TokenLayout(1, 7, (7, 4), 1), TokenLayout(1, 33, (5, 5), 0)]
BLOCK = (12, 2)


def thinned(layout: TokenLayout) -> Packing:
    """The last patches of a frame are one row, more of them in every frame."""
    owner, row = [], 0
    for frame in range(layout.batch * layout.frames):
        joined = layout.tokens_per_frame - 1 - frame % layout.num_patches
        owner += [row + min(token, joined) for token in range(layout.tokens_per_frame)]
        row += joined + 1
    shape = (layout.batch, layout.frames, layout.tokens_per_frame)
    return Packing.from_owner(torch.tensor(owner).view(shape), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [BLOCK, (5, 3), (1, 1), (128, 30)])
def test_the_host_counts_what_the_device_has(layout: TokenLayout, size: tuple[int, int]) -> None:
    places = Places.dense(layout, CPU)
    of, frame = places.blocks(*size)[places.patches], places.frame[places.patches]
    many = num_blocks(layout, *size)[0] * num_blocks(layout, *size)[1]
    expected = torch.stack([of.bincount(minlength=many), of[frame == 0].bincount(minlength=many)])
    assert torch.equal(places.counts(*size), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_tokens_are_where_their_rows_are(layout: TokenLayout) -> None:
    packing = thinned(layout)
    rows = iter(packing.positions)
    for places, length in zip(Places.packed(packing, layout), packing.scene_lengths, strict=True):
        assert len(places.frame) == length
        patches = set(places.patches.tolist())
        for token in range(length):
            assert (token in patches) == bool(next(rows)[0] > 0)
        per_frame = places.frame.bincount().tolist()
        assert len(per_frame) == layout.frames
        of = places.blocks(*BLOCK)[places.patches]
        assert torch.equal(places.counts(*BLOCK)[0], of.bincount(minlength=places.counts(*BLOCK).shape[1]))


def test_blocks_without_a_row_are_left_out() -> None:
    """All patches but the first of a frame are one row, in its middle."""
    layout = TokenLayout(1, 4, (4, 6), 2)
    token = torch.arange(layout.tokens_per_frame).clamp(max=3)
    packing = Packing.from_owner((token + 4 * torch.arange(4)[:, None])[None], layout)
    (places,) = Places.packed(packing, layout)
    assert (places.counts(6, 1)[0] == 0).any()
    split = Split.of(places, (6, 1), 0.5)
    assert split.targets.shape[0] == int((places.counts(6, 1)[0] > 0).sum())
    assert split.num_groups + len(split.columns) == 16
    assert torch.equal(split.sources.flatten()[split.columns], split.source_tokens)


def test_splits_are_made_once_for_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TokenLayout] = []
    dense = Places.dense
    monkeypatch.setattr(Places, "dense", lambda layout, device: (made.append(layout), dense(layout, device))[1])
    kept.forget()

    def ask(frames: int, anchor: bool = True) -> Splits:
        return dense_splits(TokenLayout(1, frames, (6, 6), 3), BLOCK, (0.1, None), anchor, CPU)

    first = ask(20)
    assert ask(20) is first
    assert first[1] is None
    assert ask(20, anchor=False) is not first
    assert len(made) == 2
    bound = 3 * kept.kept_bytes()
    monkeypatch.setattr(kept, "LIMIT_BYTES", bound)
    for frames in range(21, 60):
        ask(frames)
        assert kept.kept_bytes() <= bound
    assert ask(20) is not first, "what was asked for longest ago has gone"
    assert ask(59) is ask(59)


def test_every_layer_and_forward_asks_for_the_same_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    of = Split.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Split, "of", classmethod(lambda cls, places, block, share, **given: (
        made.append(share), of(cls, places, block, share, **given))[1]))  # fmt: skip
    kept.forget()
    scene = Scene(frames=6, grid=(7, 7))
    for _ in range(3):
        scene.through(HTTM(bypass=False).mixer("sdpa"))
    assert made == [0.1, 0.3]
