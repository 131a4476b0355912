"""The compiled kernels of relative codes give the reference's bytes and values."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.format import relative
from brevitas_bp.testing.subject import same_bits

pytest.importorskip("numba")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def kernels() -> Any:
    from brevitas_bp.kernels.cpu import relative as compiled

    return compiled


def check(x: Tensor, seed: int = 3) -> None:
    codes, ranges = relative.encode(x, seed)
    its_codes, its_ranges = kernels().encode(x, seed)
    assert torch.equal(codes, its_codes) and same_bits(ranges, its_ranges)
    assert same_bits(relative.decode(codes, ranges, x.dtype), kernels().decode(codes, ranges, x.dtype))


def spread(numel: int, octaves: float, seed: int = 0) -> Tensor:
    """Returns numbers of both signs, whose magnitudes differ by so many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    exponents = octaves * (torch.rand(numel, dtype=torch.float64, generator=generator) - 0.5)
    return torch.exp2(exponents) * torch.randn(numel, dtype=torch.float64, generator=generator).sign()


@each_dtype
@pytest.mark.parametrize("octaves", [0, 1, 30, 250, 300])
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
def test_numbers_of_all_sizes(numel: int, octaves: float, dtype: torch.dtype) -> None:
    # float16 overflows to infinity, and underflows to subnormal numbers and zero.
    check(spread(numel, octaves).to(dtype))


@each_dtype
@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), -float("inf"), float("nan")])
def test_special_numbers_first_last_everywhere(special: float, dtype: torch.dtype) -> None:
    for places in (slice(0, 1), slice(-1, None), slice(None), slice(0, 900, 3), slice(255, 258)):
        x = spread(1000, 20).to(dtype)
        x[places] = special
        check(x)
    check(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("part", range(4))
def test_every_exponent_and_many_mantissas(part: int) -> None:
    # All float32 numbers whose lower 12 bits are a pattern: 2**20 numbers, in buckets of one exponent.
    pattern = (0, 0xFFF, 0x555, 0x801)[part]
    x = torch.arange(-(1 << 19), 1 << 19, dtype=torch.int64).mul_(1 << 12).add_(pattern)
    check(x.to(torch.int32).view(torch.float32))


def test_long_tensors_in_threads() -> None:
    check(spread((1 << 20) + 77, 40).float())
    check(spread((1 << 18) + 77, 10).bfloat16())


@given(st.integers(0, 2**64 - 1), st.integers(1, 600), st.sampled_from(DTYPES), st.floats(0, 290))
def test_any_seed_and_size(seed: int, numel: int, dtype: torch.dtype, octaves: float) -> None:
    check(spread(numel, octaves, seed % 1000).to(dtype), seed)


def test_another_constant_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the reference with the neighbouring number in place of one coefficient."""
    x = spread(1 << 16, 30).float()
    found = kernels().encode(x, 3)
    from brevitas_bp.format import arithmetic

    monkeypatch.setattr(arithmetic, "EXP2", [*arithmetic.EXP2[:1], 0.6931474, *arithmetic.EXP2[2:]])
    codes, ranges = found
    assert not torch.equal(
        relative.decode(codes, ranges, x.dtype), kernels().decode(codes, ranges, x.dtype))
