"""LiteVGGT: the map of importance, its partition, renewed and reused matching, the authors' weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from references import Golden, relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import AttentionContext, ForwardState
from geoaccel.layout import TokenLayout
from geoaccel.merging.litevggt import LiteVGGT, gradient, importance, orthogonal, variance
from geoaccel.merging.partition import Partition, lowest_of_cells, num_cells
from geoaccel.merging.rates import Kind
from geoaccel.merging.released import ReleasedPartition
from geoaccel.models.weights import load_model

LAYOUTS = [TokenLayout(2, 3, (6, 8), 5), TokenLayout(1, 2, (7, 5), 5), TokenLayout(1, 4, (5, 6), 3)]


def state_of(layout: TokenLayout, seed: int = 0) -> ForwardState:
    """What a backbone leaves for methods."""
    generator = torch.Generator().manual_seed(seed)
    size = (14 * layout.grid[0], 14 * layout.grid[1])
    images = torch.randn(layout.batch, layout.frames, 3, *size, generator=generator)
    images = images * torch.rand(layout.batch, layout.frames, 1, *layout.grid, generator=generator).repeat_interleave(
        14, -2
    ).repeat_interleave(14, -1)
    patches = torch.randn(layout.batch, layout.frames, layout.num_patches, 48, generator=generator)
    return ForwardState(images, patches)


def score_of(layout: TokenLayout, state: ForwardState, seed: int = 33) -> Tensor:  # [B, S, h, w]
    assert state.images is not None
    assert state.patches is not None
    return importance(
        state.images.flatten(0, 1), state.patches.flatten(0, 1), layout.grid, orthogonal(48, 32, seed)
    ).unflatten(0, (layout.batch, layout.frames))


def partition(method: LiteVGGT, layout: TokenLayout, state: ForwardState) -> Partition:
    return method.partition(AttentionContext("global", layout=layout, state=state), layout, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------- importance


def test_importance_is_the_published_one() -> None:
    golden = Golden("merging_released")
    images, tokens = golden["importance.images_normed"], golden["importance.patch_tokens"]
    projection, grid = golden["importance.projection"], (4, 6)
    assert relative_error(gradient(images, grid), golden["importance.grad_map_tok"][:, 0]) < 1e-5
    assert relative_error(variance(tokens, grid, projection), golden["importance.var_map"][:, 0]) < 1e-5
    expected = golden["importance.info_map"][:, 0].float()  # was rounded to bfloat16
    assert torch.allclose(importance(images, tokens, grid, projection), expected, rtol=2**-8, atol=2e-5)


def test_importance_looks_at_each_frame_alone() -> None:
    layout = TokenLayout(1, 11, (3, 4), 5)
    state = state_of(layout)
    together = score_of(layout, state)[0]
    for frame in (0, 9, 10):
        alone = ForwardState(*(x[:, frame : frame + 1] for x in (state.images, state.patches)))  # type: ignore[index]
        assert torch.allclose(score_of(TokenLayout(1, 1, (3, 4), 5), alone)[0, 0], together[frame], atol=1e-6)
    assert together.amin((1, 2)).abs().max() < 1e-6
    assert (together.amax((1, 2)) - 1).abs().max() < 1e-6


def test_edges_are_important_and_flat_photographs_are_no_nan() -> None:
    images = torch.zeros(1, 3, 56, 56)
    images[..., 28 + 7 :] = 1
    score = importance(images, torch.zeros(1, 16, 8), (4, 4), orthogonal(8, 32, 0))
    assert score[0, 1].argmax() == 2
    flat = importance(torch.zeros(1, 3, 56, 56), torch.zeros(1, 16, 8), (4, 4), orthogonal(8, 32, 0))
    assert flat.isfinite().all()


def test_the_projection_is_orthonormal_and_seeded() -> None:
    for dim in (48, 16):
        columns = orthogonal(dim, 32, 1)
        assert columns.shape == (dim, min(32, dim))
        assert torch.allclose(columns.T @ columns, torch.eye(min(32, dim)), atol=1e-5)
    assert torch.equal(orthogonal(48, 32, 1), orthogonal(48, 32, 1))
    assert not torch.equal(orthogonal(48, 32, 1), orthogonal(48, 32, 2))


# -------------------------------------------------------------------------------------------------- partition


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protect", [0.0, 0.1, 0.3, 0.95])
def test_targets_are_the_lowest_of_their_cells_and_the_highest_stay_alone(layout: TokenLayout, protect: float) -> None:
    state = state_of(layout)
    parts = partition(LiteVGGT(protect=protect), layout, state)
    score = score_of(layout, state)
    per_frame, special = layout.tokens_per_frame, layout.num_special
    wanted = int(protect * layout.num_patches) if protect else 0
    wanted = min(max(wanted, int(protect > 0)), layout.num_patches - num_cells(layout.grid))
    for scene in range(layout.batch):
        role = torch.zeros(layout.tokens_per_scene, dtype=torch.long)
        role[parts.targets[scene]] = 1
        role[parts.protected[scene]] = 2
        role = role.view(layout.frames, per_frame)
        assert (role[0] == 1).all()
        assert (role[1:, :special] == 1).all()
        for frame in range(1, layout.frames):
            patches, scores = role[frame, special:], score[scene, frame].flatten()
            lowest = lowest_of_cells(score[scene, frame])
            assert torch.equal(patches == 1, lowest)
            assert int((patches == 2).sum()) == wanted
            if wanted:
                others = scores[patches == 0]
                assert scores[patches == 2].min() >= (others.max() if len(others) else 0)


def test_without_an_anchor_the_first_frame_is_like_the_others() -> None:
    layout = LAYOUTS[0]
    parts = partition(LiteVGGT(anchor=False), layout, state_of(layout))
    counts = (parts.targets[0] // layout.tokens_per_frame).bincount()
    assert (counts == layout.num_special + num_cells(layout.grid)).all()


def test_released_choice_is_not_the_lowest_of_cells() -> None:
    layout = TokenLayout(1, 3, (12, 16), 5)
    state = state_of(layout)
    methods = LiteVGGT(), LiteVGGT(released_code=True)
    ours, theirs = (partition(method, layout, state) for method in methods)
    assert ours.targets.shape == theirs.targets.shape
    patches = set(ours.targets[0, layout.tokens_per_frame :].tolist()), set(theirs.targets[0].tolist())
    assert len(patches[0] & patches[1]) < 0.6 * len(patches[0])
    assert isinstance(theirs, ReleasedPartition)
    assert theirs.repeated.shape[-1] >= int(0.1 * layout.num_patches)  # all protected tokens of the first frame


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_targets_are_one_of_every_cell_and_the_highest_others_stay_alone(layout: TokenLayout) -> None:
    state = state_of(layout)
    parts, again, other = (partition(LiteVGGT(targets="random", seed=seed), layout, state) for seed in (1, 1, 2))
    assert torch.equal(parts.targets, again.targets)
    assert not torch.equal(parts.targets, other.targets)
    lowest = partition(LiteVGGT(), layout, state)
    assert parts.targets.shape == lowest.targets.shape
    assert parts.protected.shape == lowest.protected.shape
    assert not torch.equal(parts.targets, lowest.targets)
    score = score_of(layout, state, seed=1)
    role = torch.zeros(layout.batch, layout.tokens_per_scene, dtype=torch.long)
    role.scatter_(1, parts.targets, 1).scatter_(1, parts.protected, 2)
    role = role.view(layout.batch, layout.frames, -1)[:, :, layout.num_special :]
    assert torch.equal(role[0] == 1, role[-1] == 1)  # scenes of a batch are alike, as each would be alone
    height, width = layout.grid
    for patches, scores in zip(role[:, 1:].flatten(0, 1), score[:, 1:].flatten(0, 1), strict=True):
        targets = (patches == 1).view(height, width)
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                assert targets[row : row + 2, column : column + 2].sum() == 1
        assert scores.flatten()[patches == 2].min() >= scores.flatten()[patches == 0].max()


def test_targets_are_lowest_or_random() -> None:
    with pytest.raises(ValueError, match="litevggt: targets='highest'; known: lowest, random"):
        LiteVGGT(targets="highest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chooses its own targets; leave out released_code or targets"):
        LiteVGGT(targets="random", released_code=True)


def test_only_the_seed_moves_the_partition() -> None:
    layout = LAYOUTS[0]
    state = state_of(layout)
    methods = [LiteVGGT(seed=seed) for seed in (1, 1, 2)]
    first, again, other = (partition(method, layout, state).targets for method in methods)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------- renewed and reused


@pytest.mark.parametrize(
    ("depth", "renewed"), [(24, [0, 6, 12, 18]), (18, [0, 4, 9, 13]), (4, [0, 1, 2, 3]), (8, [0, 2, 4, 6]), (1, [0])]
)
def test_matching_is_renewed_at_the_same_shares_of_any_depth(depth: int, renewed: list[int]) -> None:
    mixers: Any = LiteVGGT().mixers("sdpa", depth)
    assert [layer for layer, mixer in enumerate(mixers) if mixer.refresh] == renewed


def test_layers_in_between_reuse_the_plan_and_later_forwards_do_not() -> None:
    layout = LAYOUTS[0]
    x = torch.randn(layout.batch, layout.tokens_per_scene, 16)
    mixers: Any = LiteVGGT(refresh=(0, 12), bypass=False).mixers("sdpa", 4)

    def groups(state: ForwardState) -> list[Tensor]:
        found = []
        for layer, mixer in enumerate(mixers):
            context = AttentionContext("global", layer, layout, state=state)
            mixer.prepare(2, 8, x.device, context)
            found.append(mixer.plan(x.roll(layer, 1), layout, context).group_of)
        return found

    plans = groups(state_of(layout))
    assert plans[0] is plans[1]
    assert plans[2] is plans[3]
    assert not torch.equal(plans[1], plans[2])
    assert torch.equal(groups(state_of(layout))[0], plans[0])
    assert not torch.equal(groups(state_of(layout, seed=1))[1], plans[1])


def test_a_layer_without_a_plan_to_reuse_makes_one() -> None:
    layout = LAYOUTS[0]
    mixer: Any = LiteVGGT(refresh=(), bypass=False).mixers("sdpa", 4)[2]
    context = AttentionContext("global", 2, layout, state=state_of(layout))
    x = torch.randn(layout.batch, layout.tokens_per_scene, 16)
    with pytest.raises(RuntimeError, match="litevggt was not prepared before the first block"):
        mixer.plan(x, layout, context)
    mixer.prepare(2, 8, x.device, context)
    assert mixer.plan(x, layout, context) is mixer.plan(x + 1, layout, context)


@pytest.mark.parametrize("frames", [4, 5, 8, 11, 16])
def test_all_layers_merge_or_none_does(frames: int) -> None:
    """Those that match would otherwise go dense first, and nothing would be matched anew."""
    layout = TokenLayout(1, frames, (28, 37), 5)
    mixers: Any = LiteVGGT().mixers("sdpa", 24)
    kind = Kind(torch.device("cpu"), torch.float32, 1024, 64)
    whys = {mixer.decide(layout, kind).why is None for mixer in mixers}
    assert len(whys) == 1


@pytest.mark.parametrize("refresh", [(24,), (-1,), (0.5,), ("0",)])
def test_refresh_layers_out_of_range_are_refused(refresh: Any) -> None:
    with pytest.raises(ValueError, match=r"litevggt: refresh=.*layers from 0 to 23"):
        LiteVGGT(refresh=refresh)


def test_refresh_takes_a_list() -> None:
    assert LiteVGGT(refresh=[0, 12]) == LiteVGGT(refresh=(0, 12))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the authors' weights


def engine_names(state: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict under the names that Transformer Engine's modules give."""
    out: dict[str, Any] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith(("aggregator.", "camera_head.trunk.")):
            if parts[-2] == "norm2":
                parts[-2:] = ["normMlp", f"layer_norm_{parts[-1]}"]
            elif len(parts) > 2 and parts[-3] == "mlp":
                parts[-3:] = ["normMlp", f"{parts[-2]}_{parts[-1]}"]
            elif parts[-2:] == ["qkv", "weight"]:
                out[".".join([*parts[:-1], "_extra_state"])] = torch.zeros(8, dtype=torch.uint8)
        out[".".join(parts)] = tensor
    return out


@pytest.fixture
def vggt() -> nn.Module:
    golden = Golden("vggt_tiny")
    model = geoaccel.models.build("vggt", **golden.config)
    model.load_state_dict(golden.weights)
    return model


def save(state: ForwardState, model: nn.Module, folder: Path) -> Path:
    torch.save(state, folder / "te_dict.pt")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder / "te_dict.pt"


def test_transformer_engine_names_load_onto_ours(vggt: nn.Module, tmp_path: Path) -> None:
    theirs = engine_names(vggt.state_dict())
    assert any(name.endswith("_extra_state") for name in theirs)
    assert sum("normMlp" in name for name in theirs) == 6 * (2 + 4 + 4 + 4)  # encoder, frame, global, camera trunk
    loaded = load_model(save(theirs, vggt, tmp_path)).state_dict()
    for name, tensor in vggt.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, key: state.pop(key), "1 tensors missing"),
        (lambda state, key: state.update({key + "_2": torch.zeros(1)}), "1 unexpected"),
        (lambda state, key: state.update({key.replace("normMlp.fc1_weight", "mlp.fc1.weight"): state[key]}), "twice"),
    ],
)
def test_transformer_engine_names_load_strictly(vggt: nn.Module, tmp_path: Path, damage: Any, message: str) -> None:
    theirs = engine_names(vggt.state_dict())
    damage(theirs, "aggregator.global_blocks.1.normMlp.fc1_weight")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(save(theirs, vggt, tmp_path))
    assert "\n" not in str(caught.value)
