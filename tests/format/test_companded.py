"""Codes whose levels lie close together near zero, for probabilities."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.reference import decode, encode
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import COMPANDED, MAX, NARROW, STOCHASTIC, Rounding
from tests.stats import normal

SIZE, ROWS = 64, 20_000
WIDTHS = range(1, 9)


def _spec(width: int, rounding: Rounding = COMPANDED) -> BucketQuantSpec:
    return BucketQuantSpec(width, SIZE, rounding=rounding)


def _drawn(row: Tensor, spec: BucketQuantSpec) -> Tensor:
    """Returns what many copies of a row decode to, [ROWS, SIZE]."""
    x = row.repeat(ROWS)
    return decode(encode(x, spec, 5), spec, 5, x.numel(), x.dtype).view(ROWS, SIZE).double()


def _variance(row: Tensor, width: int) -> Tensor:
    """The variance by the definition: two levels around each value, in float64."""
    top = 2**width - 1
    low, high = float(row.min()), float(row.max())
    variances = []
    for p in row.tolist():
        u = (p - low) / (high - low) * top
        k = min(math.isqrt(int(u * top)), top - 1)
        while (k + 1)**2 / top <= u and k < top - 1:
            k += 1
        below, above = k**2 / top, (k + 1)**2 / top
        variances.append((above - u) * (u - below) * ((high - low) / top)**2)
    return torch.tensor(variances, dtype=torch.float64)


def _probabilities(seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(spread * torch.randn(SIZE, generator=generator), 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_mean_is_right_and_the_variance_is_that_of_two_levels(width: int) -> None:
    row = _probabilities()
    drawn, variance = _drawn(row, _spec(width)), _variance(row, width)
    off = drawn.mean(0) - row.double()
    # Values on a level have no variance; levels are rounded to float32.
    z = off.abs() / (variance / ROWS).sqrt().clamp(min=float(row.max()) * 2.0**-23)
    assert float(z.max()) < normal(SIZE * len(WIDTHS))
    assert torch.allclose(drawn.var(0).sum(), variance.sum(), rtol=0.05)


@pytest.mark.parametrize("width", [3, 4, 8])
def test_probabilities_have_a_third_of_the_error_of_equal_steps(width: int) -> None:
    row = _probabilities()
    companded, equal = (
        (_drawn(row, _spec(width, rounding)) - row).square().sum(-1).mean()
        for rounding in (COMPANDED, STOCHASTIC))
    assert float(companded) < float(equal) / 3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zeros_and_the_largest_value_are_exact(width: int, dtype: torch.dtype) -> None:
    row = torch.zeros(SIZE, dtype=dtype)
    row[3], row[5], row[7] = 1, 0.25, 1e-7
    spec = _spec(width)
    drawn = torch.stack([
        decode(encode(row, spec, seed), spec, seed, SIZE, dtype) for seed in range(50)])
    assert not drawn[:, row == 0].any()
    assert (drawn[:, 3] - 1).abs().max() <= torch.finfo(dtype).eps
    assert (drawn >= 0).all()


def test_constant_and_broken_buckets() -> None:
    spec = _spec(4)
    x = torch.full((3 * SIZE,), 0.1)
    x[SIZE + 1] = torch.nan
    x[-1] = torch.inf
    y = decode(encode(x, spec, 0), spec, 0, x.numel(), x.dtype)
    assert torch.equal(y[:SIZE], x[:SIZE]) and y[SIZE:].isnan().all()


def test_signed_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="'companded' rounding needs unsigned codes, got 'narrow'"):
        BucketQuantSpec(4, SIZE, MAX, NARROW, COMPANDED)
