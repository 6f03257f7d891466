"""Depth edges: what is left out, in the mask and in every file, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic_scene import AnalyticModel, checked_memory  # noqa: F401 (a fixture)
from command_line import run, write_images
from references import Golden

from geoaccel.edges import depth_edges, depth_jumps
from geoaccel.images import ImageTransform
from geoaccel.models.weights import save_model
from geoaccel.reconstruction import reconstruct


def test_a_step_is_an_edge_and_a_slope_is_none() -> None:
    """An object at depth 2 before a wall at 4, with a pixel of the network's in between."""
    row = torch.tensor([2.0, 2, 2, 3, 4, 4, 4])
    depth = row.expand(1, 5, 7)
    everywhere = torch.ones(1, 5, 7, dtype=torch.bool)
    assert depth_edges(depth, everywhere, 0.09)[0, 0].tolist() == [False, False, True, True, True, False, False]
    slope = torch.linspace(2, 2.2, 7).expand(1, 5, 7)  # 3.3 % over three pixels
    assert not depth_edges(slope, everywhere, 0.04).any()
    assert depth_edges(slope, everywhere, 0.03).any()


def test_the_jump_is_relative_and_masked_pixels_do_not_count() -> None:
    depth = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0)) + 1
    mask = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    found = depth_edges(depth, mask, 0.2)
    assert torch.equal(found, depth_edges(1000 * depth, mask, 0.2))
    assert torch.equal(found, depth_edges(depth.masked_fill(~mask, 0.0), mask, 0.2))
    assert not found[~mask].any()
    assert found.any()


def test_among_the_least_sure_a_smaller_jump_is_an_edge() -> None:
    """Twelve columns as steps of 10 %: of the two least sure columns, a sixth, one has half of the usual bound."""
    depth = (1.1 ** torch.arange(12)).expand(1, 4, 12)
    everywhere = torch.ones(1, 4, 12, dtype=torch.bool)
    conf = torch.arange(12.0).expand(1, 4, 12)
    jump = 1.1**2 - 1  # from the column before to the one behind
    assert not depth_edges(depth, everywhere, jump + 0.01, conf)[0, 0, 1:].any()
    assert depth_edges(depth, everywhere, 2 * 0.1 - 0.01, conf)[0, 0].tolist() == [True] * 11 + [False]
    assert depth_edges(depth, everywhere, 2 * 0.1 - 0.01)[0, 0].tolist() == [False] + [True] * 10 + [False]
    assert torch.equal(depth_jumps(depth, everywhere, torch.ones(1, 4, 12)), depth_jumps(depth, everywhere))
    masked = everywhere.clone()
    masked[..., :6] = False
    assert (depth_jumps(depth, masked, conf)[~masked] == 0).all()


@pytest.mark.parametrize("jump", [0.0, 1e-9, -1.0, float("nan"), float("inf")])
def test_what_is_no_jump(jump: float) -> None:
    with pytest.raises(ValueError, match=r"edge_filter=.*: try 0\.25"):
        depth_edges(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), jump)


@pytest.mark.usefixtures("checked_memory")
def test_a_reconstruction_without_edges() -> None:
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    model, images = AnalyticModel(transforms), torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    whole = reconstruct(images, model=model)
    jump = 0.02
    edges = depth_edges(whole.depth, whole.mask, jump, whole.conf)
    assert 0 < edges.sum() < whole.mask.sum()
    filtered = reconstruct(images, model=model, edge_filter=jump)
    assert torch.equal(filtered.mask, whole.mask & ~edges)
    assert len(filtered.point_cloud(conf_percentile=0)) == int(filtered.mask.sum())
    with pytest.raises(ValueError, match="edge_filter=nan"):
        reconstruct(images, model=model, edge_filter=float("nan"))
    with pytest.raises(ValueError, match=r"edge_filter=0.001 leaves no pixel; give a larger value"):
        whole.without_edges(0.001)


def test_the_command_leaves_them_out_and_says_how_many(tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "tiny.safetensors"
    save_model(Golden("vggt_tiny", "vggt").network(), model, dtype=torch.float32)
    command = ("reconstruct", write_images(tmp_path / "photos"), "--model", model, "--size", "56", "--formats", "npz")
    code, _, err = run(capsys, *command, "--conf-percentile", 0, "--out", tmp_path / "out", "--edge-filter", "0.01")
    assert code == 0, err
    said = err.split(" % of the pixels, at depth edges (--edge-filter 0.01)")[0]
    share = float(said.split()[-1])
    assert 0 < share < 100
    masks = np.load(tmp_path / "out" / "reconstruction.npz")["mask"]
    assert 100 * (1 - masks.mean()) == pytest.approx(share, abs=0.06)
