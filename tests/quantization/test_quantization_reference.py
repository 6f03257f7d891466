"""The slow truth itself, against definitions written out number by number."""

from __future__ import annotations

import pytest
import torch
from references import relative_error
from torch import Tensor

from geoaccel.kernels.e4m3 import E4M3_MAX
from geoaccel.quantization.formats import reference


def e4m3_values() -> Tensor:  # [127] float64, ascending
    """Every magnitude of the format: 7 subnormal steps of 2^-9, then 8 to an octave, up to 448."""
    values = []
    for code in range(127):
        exponent, mantissa = divmod(code, 8)
        values.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    assert values[-1] == E4M3_MAX
    return torch.tensor(values, dtype=torch.float64)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_to_the_nearest_e4m3_number() -> None:
    x = torch.cat([rows(6, 50), 1e4 * rows(2, 50), 1e-6 * rows(2, 50), torch.logspace(-9, 0, 50)[None]])
    x[1, 3] = 3000  # one outlier takes the scale of its row
    codes, scale = reference.quantize_rows(x)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (11, 1))
    assert torch.allclose(scale[:, 0], x.abs().amax(1) / 448)
    numbers = e4m3_values()
    wanted = (x.double() / scale.double()).abs()
    distance = (wanted[..., None] - numbers).abs()
    decoded = reference.dequantize_rows(codes, scale).double() / scale.double()
    off = (decoded.abs() - wanted).abs()
    assert (off <= distance.amin(-1) + 3e-7 * wanted).all()
    assert torch.equal(decoded.sign()[decoded != 0], x.sign().double()[decoded != 0])
    # What a row holds does not depend on the other rows.
    assert torch.equal(reference.quantize_rows(x[3:4])[0].float(), codes[3:4].float())


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = rows(4, 8)
    x[1], x[2, 3], x[3, 0] = 0, torch.inf, torch.nan
    decoded = reference.dequantize_rows(*reference.quantize_rows(x))
    assert decoded[0].isfinite().all()
    assert torch.equal(decoded[1], torch.zeros(8))
    assert not decoded[2:].isfinite().any(-1).all()


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 128), (40, 16), (9, 8), (5, 8)])
def test_groups_are_rounded_to_the_nearest_of_sixteen_levels(inputs: int, group: int) -> None:
    weight = torch.cat([rows(5, inputs), 1e-30 * rows(1, inputs), 1e30 * rows(1, inputs), 5 + 1e-2 * rows(1, inputs)])
    codes, scale, zero = reference.quantize_groups(weight, group)
    decoded = reference.dequantize_groups(codes, scale, zero, group)
    assert codes.dtype == torch.uint8
    assert scale.shape == zero.shape == (8, -(-inputs // group))
    for row in range(8):
        for column in range(inputs):
            own = row, column // group
            members = weight[row, own[1] * group : (own[1] + 1) * group].double()
            low, step = zero[own].double(), scale[own].double()
            # The levels begin at the smallest member, to the 2^-8 of bfloat16 below it, and end at the largest.
            assert low <= members.min() <= low + low.abs() * 2**-7
            assert step * 15 == pytest.approx(float(members.max() - low), rel=2**-8)
            levels = low + step * torch.arange(16).double()
            best = (levels - weight[row, column].double()).abs().min()
            value = decoded[row, column].double()
            assert abs(value - weight[row, column].double()) <= best + 1e-5 * step + 1e-7 * low.abs()
            assert abs(value - levels[codes[row, column].long()]) <= 1e-6 * levels.abs().max()


def test_a_shorter_last_group_has_a_scale_of_its_own() -> None:
    weight = rows(3, 24)
    codes, scale, _ = reference.quantize_groups(weight, 16)
    larger = weight.clone()
    larger[:, :16] *= 100
    again, scale_again, _ = reference.quantize_groups(larger, 16)
    assert torch.equal(again[:, 16:], codes[:, 16:])
    assert torch.equal(scale_again[:, 1], scale[:, 1])
    assert (scale_again[:, 0] > 50 * scale[:, 0]).all()
    assert set(codes[:, 16:].unique().tolist()) >= {0, 15}


@pytest.mark.parametrize("value", [0.0, 0.1234567, -3.3, 1e-20])
def test_groups_of_one_value(value: float) -> None:
    weight = torch.full((2, 16), value)
    decoded = reference.dequantize_groups(*reference.quantize_groups(weight, 8), 8)
    assert torch.allclose(decoded, weight, rtol=1e-4, atol=0)


def test_two_codes_a_byte() -> None:
    assert reference.pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert reference.pack_nibbles(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
    for inputs in (1, 2, 7, 128):
        codes = torch.randint(0, 16, (5, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(inputs))
        packed = reference.pack_nibbles(codes)
        assert packed.shape == (5, (inputs + 1) // 2)
        assert torch.equal(reference.unpack_nibbles(packed, inputs), codes)


def test_errors_on_gaussian_weights() -> None:
    """Relative errors of the formats; those of 4 bits are known from elsewhere: 0.100, 0.091, 0.081."""
    weight = rows(256, 1024)
    for group, expected in ((128, 0.100), (64, 0.090), (32, 0.079)):
        decoded = reference.dequantize_groups(*reference.quantize_groups(weight, group), group)
        assert relative_error(decoded, weight) == pytest.approx(expected, abs=0.002), group
    assert relative_error(reference.dequantize_rows(*reference.quantize_rows(weight)), weight) < 0.028


def test_the_fp8_product() -> None:
    x, weight, bias = rows(7, 32), rows(5, 32, seed=1), rows(1, 5, seed=2)[0]
    codes, scale = reference.quantize_rows(weight)
    token_codes, token_scale = reference.quantize_rows(x)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    for token in range(7):
        for output in range(5):
            total = sum(float(a) * float(b) for a, b in zip(token_codes[token], codes[output], strict=True))
            expected[token, output] = total * float(token_scale[token]) * float(scale[output]) + float(bias[output])
    assert relative_error(reference.fp8_linear(x, codes, scale, bias), expected) < 1e-7
    assert relative_error(reference.fp8_linear(x, codes, scale), expected - bias) < 1e-7
