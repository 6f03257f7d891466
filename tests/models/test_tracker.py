"""The point tracker: names, agreement with the released code, and what it promises besides."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from geoaccel.models.layers import tracker as tracker_module
from geoaccel.models.layers import tracker_former as former_module
from geoaccel.models.layers.track_head import TrackHead
from geoaccel.models.layers.tracker import Tracker, correlate, encode_position, mean_pyramid

DATA = Path(__file__).parents[1] / "data"
PREFIX = "weights.track_head.tracker."
SIZES = ("features", "hidden_size", "corr_levels", "corr_radius", "depth")


@pytest.fixture(scope="module")
def tiny() -> Tracker:
    path = DATA / "vggt_tiny.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)}  # noqa: SIM118
    model = Tracker(**{name: config[f"track_{name}"] for name in SIZES}).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "tracker_float64.safetensors")


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_names_and_shapes_are_those_of_the_checkpoint():
    rows = dict(re.findall(r"^track_head\.tracker\.(\S+)\t(\S+)$", (DATA / "vggt_1b_keys.txt").read_text(), re.M))
    with torch.device("meta"):
        state = Tracker().state_dict()
    assert rows
    assert {name: "x".join(map(str, tensor.shape)) for name, tensor in state.items()} == rows


@pytest.mark.parametrize("case", ["grid", "strip"])
@torch.no_grad()
def test_agrees_with_the_released_tracker_in_float64(tiny, golden, case):
    # In float64, because each iteration amplifies rounding about a hundred times.
    model = copy.deepcopy(tiny).double()
    tracks, visibility, confidence = model(golden[f"{case}.query_points"], golden[f"{case}.feature_maps"])
    assert len(tracks) == 4
    for iteration, track in enumerate(tracks):
        assert relative_error(track, golden[f"{case}.track.{iteration}"]) < 1e-9
    assert relative_error(visibility, golden[f"{case}.vis"]) < 1e-7
    assert relative_error(confidence, golden[f"{case}.conf"]) < 1e-7


@pytest.mark.parametrize("case", ["grid", "strip"])
@torch.no_grad()
def test_agrees_with_the_released_tracker_in_float32(tiny, golden, case):
    tracks, _, _ = tiny(golden[f"{case}.query_points"], golden[f"{case}.feature_maps"])
    for iteration, tolerance in enumerate([1e-6, 1e-4]):
        assert relative_error(tracks[iteration].double(), golden[f"{case}.track.{iteration}"]) < tolerance


@torch.no_grad()
def test_scenes_of_a_batch_do_not_see_each_other(tiny, golden):
    model = copy.deepcopy(tiny).double()
    queries, maps = golden["grid.query_points"], golden["grid.feature_maps"]
    tracks, visibility, confidence = model(queries, maps)
    for scene in range(2):
        alone = model(queries[scene : scene + 1], maps[scene : scene + 1])
        torch.testing.assert_close(alone[0][-1][0], tracks[-1][scene], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[1][0], visibility[scene], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[2][0], confidence[scene], rtol=0, atol=1e-6)


@torch.no_grad()
def test_frame_0_stays_at_the_query(tiny, golden):
    queries = golden["grid.query_points"]
    tracks, visibility, confidence = tiny(queries, golden["grid.feature_maps"], iterations=2)
    assert len(tracks) == 2
    for track in tracks:
        assert track.shape == (2, 3, 5, 2)
        assert torch.equal(track[:, 0], queries)
        assert not torch.allclose(track[:, 1], queries)
    for score in (visibility, confidence):
        assert score.shape == (2, 3, 5)
        assert ((score > 0) & (score < 1)).all()


@torch.no_grad()
def test_a_single_frame_has_nowhere_to_go(tiny, golden):
    queries = golden["grid.query_points"]
    tracks, _, _ = tiny(queries, golden["grid.feature_maps"][:, :1])
    assert torch.equal(tracks[-1][:, 0], queries)


@torch.no_grad()
def test_half_precision_is_computed_in_float32(tiny, golden):
    queries, maps = golden["grid.query_points"], golden["grid.feature_maps"].bfloat16()
    narrow = copy.deepcopy(tiny).bfloat16()
    expected = copy.deepcopy(narrow).float()(queries, maps.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = narrow(queries, maps)
    for result in (narrow(queries, maps), under_autocast):
        assert {tensor.dtype for tensor in (*result[0], *result[1:])} == {torch.float32}
        assert relative_error(result[0][0], expected[0][0]) < 1e-6
        assert relative_error(result[0][1], expected[0][1]) < 1e-5
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_gradients_are_finite_and_reach_everything(tiny, golden):
    model = copy.deepcopy(tiny)
    maps = golden["grid.feature_maps"].clone().requires_grad_()
    tracks, visibility, confidence = model(golden["grid.query_points"], maps)
    (sum(track.square().mean() for track in tracks) + visibility.mean() + confidence.mean()).backward()
    for name, tensor in [("feature maps", maps), *model.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


def slow_correlate(pyramid: list[Tensor], tracks: Tensor, coords: Tensor, radius: int) -> Tensor:
    """The whole correlation volume, then bilinear samples of it: the definition."""
    offsets = torch.arange(-radius, radius + 1, dtype=coords.dtype)
    window = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)  # x slowest
    levels = []
    for level, maps in enumerate(pyramid):
        height, width = maps.shape[1:3]
        volume = torch.einsum("tnc,thwc->tnhw", tracks.flatten(0, 1), maps) / tracks.shape[-1] ** 0.5
        points = (coords.flatten(0, 1) / 2**level)[:, :, None, None] + window
        grid = points * 2 / torch.tensor([max(width - 1, 1), max(height - 1, 1)]) - 1
        sampled = F.grid_sample(volume.flatten(0, 1)[:, None], grid.flatten(0, 1), align_corners=True)
        levels.append(sampled.flatten(1).reshape(*coords.shape[:3], -1))
    return torch.cat(levels, dim=-1)


@pytest.mark.parametrize("volume_cells", [0, 20, 70])  # windows; at the finest level; nowhere
@pytest.mark.parametrize("chunk_points", [1, 5, 10_000])
def test_windows_and_volumes_are_the_same_correlation(monkeypatch, chunk_points, volume_cells):
    channels, radius = 8, 3
    monkeypatch.setattr(tracker_module, "CHUNK_ELEMENTS", chunk_points * 2 * 3 * channels * (2 * radius + 2) ** 2)
    monkeypatch.setattr(tracker_module, "VOLUME_CELLS", volume_cells)
    read = []
    for inner in (tracker_module.read_windows, tracker_module.sample_volume):

        def watched(maps, *args, inner=inner):
            read.append((inner.__name__, maps.shape[1]))
            return inner(maps, *args)

        monkeypatch.setattr(tracker_module, inner.__name__, watched)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2 * 3, 5, 14, channels, generator=generator, dtype=torch.float64)
    tracks = torch.randn(2, 3, 7, channels, generator=generator, dtype=torch.float64)
    # Inside, across the border, and far outside.
    coords = torch.rand(2, 3, 7, 2, generator=generator, dtype=torch.float64) * 40 - 12
    pyramid = mean_pyramid(maps, 3)
    assert [list(level.shape[1:3]) for level in pyramid] == [[5, 14], [2, 7], [1, 3]]
    expected = slow_correlate(pyramid, tracks, coords, radius)
    torch.testing.assert_close(correlate(pyramid, tracks, coords, radius), expected, rtol=1e-10, atol=1e-10)
    volumes = {height for name, height in read if name == "sample_volume"}
    assert volumes == {0: set(), 20: {1, 2}, 70: {1, 2, 5}}[volume_cells]
    assert {height for _, height in read} == {1, 2, 5}
    numbers = 70 if volume_cells == 70 else channels * (2 * radius + 2) ** 2
    points = max(1, tracker_module.CHUNK_ELEMENTS // (2 * 3 * numbers))
    assert sum(height == 5 for _, height in read) == -(-7 // points)


@torch.no_grad()
def test_attention_in_pieces_is_the_same(tiny, golden, monkeypatch):
    queries, maps = golden["grid.query_points"], golden["grid.feature_maps"]
    model = copy.deepcopy(tiny).double()
    whole = model(queries, maps, iterations=1)
    pieces = []
    inner = torch.nn.MultiheadAttention.forward
    monkeypatch.setattr(former_module, "CHUNK_WEIGHTS", 2000)
    monkeypatch.setattr(torch.nn.MultiheadAttention, "forward", lambda m, *a: (pieces.append(a), inner(m, *a))[1])
    chunked = model(queries, maps, iterations=1)
    torch.testing.assert_close(chunked[0][0], whole[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked[1], whole[1], rtol=1e-10, atol=1e-10)
    for query, seen, _ in pieces:
        assert len(query) == len(seen)
        assert len(query) == 1 or len(query) * 8 * query.shape[1] * seen.shape[1] <= 2000
    # The released network's kernels depend on whether queries and keys are one tensor.
    assert {query.shape[1] == seen.shape[1] for query, seen, _ in pieces if query is seen} == {True}
    assert any(query is not seen for query, seen, _ in pieces)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 12 does not divide into 8 heads; choose a divisor of 12"):
        Tracker(features=16, hidden_size=12, corr_levels=2, corr_radius=1, depth=1)


@pytest.mark.parametrize("volume_cells", [0, 144])
def test_a_point_correlates_most_with_its_own_place(monkeypatch, volume_cells):
    monkeypatch.setattr(tracker_module, "VOLUME_CELLS", volume_cells)
    # Orthogonal features per cell: the window is zero but where it covers the cell that the track came from.
    maps = torch.eye(12 * 12).reshape(1, 12, 12, -1)
    track = maps[:, 5, 7][:, None, None]  # x = 7, y = 5
    window = correlate([maps], track, torch.tensor([[[[6.0, 7.0]]]]), radius=3).reshape(7, 7)
    assert (window > 1e-6).nonzero().tolist() == [[3 + 1, 3 - 2]]
    halfway = correlate([maps], track, torch.tensor([[[[6.5, 7.0]]]]), radius=3).reshape(7, 7)
    torch.testing.assert_close(halfway[3:5, 1], window.max().expand(2) / 2)


@pytest.mark.parametrize("volume_cells", [0, 64])
def test_runaway_positions_do_not_crash(monkeypatch, volume_cells):
    monkeypatch.setattr(tracker_module, "VOLUME_CELLS", volume_cells)
    maps = mean_pyramid(torch.ones(1, 8, 8, 4), 2)
    coords = torch.tensor([[[[1e30, -1e30], [float("inf"), 0.0], [float("nan"), 2.0]]]])
    assert correlate(maps, torch.ones(1, 1, 3, 4), coords, radius=2).shape == (1, 1, 3, 50)


def test_position_codes_interpolate_inside_and_stop_at_the_border():
    points = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [-3.0, 9.0], [5.0, 3.0], [0.0, 3.0]]])
    codes = encode_position(points, (4, 6), 8)[0]
    assert codes[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    torch.testing.assert_close(codes[2, :4], (codes[0, :4] + codes[1, :4]) / 2)
    torch.testing.assert_close(codes[3], codes[5])
    torch.testing.assert_close(codes[4, :2], torch.tensor([5.0, 0.05]).sin())


def test_tiny_feature_maps_are_refused(tiny):
    with pytest.raises(ValueError, match=r"3 x 9 cells .* need 4 cells"):
        tiny(torch.zeros(1, 1, 2), torch.zeros(1, 2, 16, 3, 9))
    with pytest.raises(ValueError, match="iterations=0"):
        tiny(torch.zeros(1, 1, 2), torch.zeros(1, 2, 16, 8, 8), iterations=0)


class FixedFeatures(nn.Module):
    """A feature extractor that returns what is in layer 0."""

    def forward(self, layers, images, patch_start_idx, frames_chunk_size):
        assert (patch_start_idx, frames_chunk_size) == (5, 8)
        return layers[0]


@torch.no_grad()
def test_head_passes_features_and_queries_on(tiny, golden):
    sizes = {"features": 16, "hidden_size": 48, "corr_levels": 3, "corr_radius": 2, "depth": 2}
    head = TrackHead(FixedFeatures(), Tracker(**sizes)).eval()
    head.tracker.load_state_dict(tiny.state_dict())
    assert {name.split(".")[0] for name in head.state_dict()} == {"tracker"}
    queries, maps = golden["strip.query_points"], golden["strip.feature_maps"]
    images = torch.zeros(1, 2, 3, 8, 46)
    expected = tiny(queries, maps, 1)
    for given in (queries, queries[0]):
        tracks, visibility, confidence = head({0: maps}, images, 5, given, iters=1)
        assert len(tracks) == 1
        torch.testing.assert_close(tracks[0], expected[0][0])
        torch.testing.assert_close(visibility, expected[1])
        torch.testing.assert_close(confidence, expected[2])
    assert len(head({0: maps}, images, 5, queries)[0]) == 4


@pytest.mark.parametrize("shape", [(4, 2), (1, 4, 2), (2, 4, 3), (2, 2), (2,), (2, 0, 2)])
def test_head_refuses_queries_of_another_shape(shape):
    head = TrackHead(FixedFeatures(), Tracker(features=16, hidden_size=48, corr_levels=2, corr_radius=1, depth=1))
    with pytest.raises(ValueError, match=r"query_points have shape \[" + ", ".join(map(str, shape))):
        head({0: torch.zeros(2, 2, 16, 8, 8)}, torch.zeros(2, 2, 3, 16, 16), 5, torch.zeros(shape))


def test_one_scene_refuses_queries_of_two():
    head = TrackHead(FixedFeatures(), Tracker(features=16, hidden_size=48, corr_levels=2, corr_radius=1, depth=1))
    with pytest.raises(ValueError, match=r"expected \[1, N, 2\] or \[N, 2\]"):
        head({0: torch.zeros(1, 2, 16, 8, 8)}, torch.zeros(1, 2, 3, 16, 16), 5, torch.zeros(2, 4, 2))
