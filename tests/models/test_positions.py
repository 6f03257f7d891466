"""Where tokens and cells stand: rotary tables and position codes."""

from __future__ import annotations

import math

import torch

from geoaccel.kernels import twins
from geoaccel.models.layers.dpt_head import placed, position_codes
from geoaccel.models.layers.rope import apply_rope, frame_tables

CPU = torch.device("cpu")


def test_tables_of_a_frame_serve_frames_that_follow_each_other() -> None:
    tables = frame_tables((3, 4), 2, 8, 100.0, torch.float32, CPU)
    x = torch.randn(2, 5 * 14, 3, 8, generator=torch.Generator().manual_seed(0))
    repeated = (tables[0].repeat(5, 1, 1), tables[1].repeat(5, 1, 1))
    assert torch.equal(apply_rope(x, tables), apply_rope(x, repeated))
    flat = frame_tables((3, 4), 2, 8, 100.0, torch.float32, CPU, flat=True)
    assert torch.equal(flat[0][2:], tables[0][2:3].expand(12, -1, -1))  # all patches stand where the first does


def test_pairs_of_channels_turn_as_complex_numbers() -> None:
    tables = frame_tables((3, 4), 2, 8, 100.0, torch.float32, CPU)
    x = torch.randn(2, 28, 3, 8, generator=torch.Generator().manual_seed(0))
    expected, _ = twins.rotate_heads(x[:, :, None].expand(-1, -1, 3, -1, -1), None, None, 0.0, tables)
    torch.testing.assert_close(apply_rope(x, tables), expected.transpose(1, 2))


def test_places_are_added_in_place_only_where_nothing_learns() -> None:
    maps = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    weight = maps.clone().requires_grad_()
    learned = placed(weight * 1, (42, 70))
    with torch.no_grad():
        found = placed(given := maps.clone(), (42, 70))
    assert found is given
    assert torch.equal(found, learned)
    learned.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(maps))  # type: ignore[arg-type]


def test_codes_are_a_tenth_of_sines_and_cosines_of_the_place() -> None:
    across, down = position_codes(8, (3, 5), (42, 70), torch.float64, CPU)
    assert (across.shape, down.shape) == ((4, 1, 5), (4, 3, 1))
    assert torch.allclose(across[:2] ** 2 + across[2:] ** 2, torch.full((2, 1, 5), 0.01, dtype=torch.float64))
    u = (5 / 3) / ((5 / 3) ** 2 + 1) ** 0.5 * 4 / 5  # of the last column, in units of half the diagonal
    assert abs(10 * float(across[0, 0, 4]) - math.sin(u)) < 1e-6
    assert abs(10 * float(across[1, 0, 4]) - math.sin(u / 10)) < 1e-6
    assert float(down[0, 1, 0]) == 0  # in the middle
