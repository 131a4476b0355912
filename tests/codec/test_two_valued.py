"""Masks of two values take one bit per element, and come back with every bit."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.codec.two_valued import TwoValuedCodec
from brevitas_bp.testing import check_codec
from tests.support import same_bits

CAUSAL = torch.ones(40, 40).tril().bool()


def test_it_keeps_what_codecs_must_keep() -> None:
    check_codec(TwoValuedCodec())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", [-math.inf, "min", 0.0])
@pytest.mark.parametrize("high", [0.0, -0.0, 1.0])
def test_two_values_take_a_bit(dtype: torch.dtype, low: float | str, high: float) -> None:
    low = torch.finfo(dtype).min if low == "min" else low
    mask = torch.where(CAUSAL, torch.tensor(high, dtype=dtype), torch.tensor(low, dtype=dtype))
    packed = TwoValuedCodec().encode(mask)
    assert same_bits(packed.decode(), mask)
    assert packed.nbytes == 40 * 40 / 8


@pytest.mark.parametrize("other", [1e-30, math.nan, -0.0])
def test_a_third_value_keeps_the_tensor(other: float) -> None:
    mask = torch.where(CAUSAL, 0.0, -math.inf)
    mask[3, 2] = other
    packed = TwoValuedCodec().encode(mask)
    assert same_bits(packed.decode(), mask) and not packed.is_smaller


def test_a_nan_among_equal_values_keeps_the_tensor() -> None:
    mask = torch.where(CAUSAL, 0.0, math.nan)
    assert not TwoValuedCodec().encode(mask).is_smaller


@pytest.mark.parametrize("mask", [
    torch.where(CAUSAL, 0.0, -math.inf)[None, None].expand(4, 8, 40, 40),
    torch.zeros(8, 40).expand(9, 8, 40),
    torch.where(CAUSAL, 0.0, -math.inf).T, torch.where(CAUSAL, 0.0, -math.inf)[:, ::3],
    torch.tensor(-math.inf), torch.ones(0)], ids=lambda x: str(list(x.shape)))
def test_layouts(mask: Tensor) -> None:
    packed = TwoValuedCodec().encode(mask)
    decoded = packed.decode()
    assert same_bits(decoded, mask)
    assert packed.nbytes <= -(-mask.unique().numel() * 1600 // 8)
