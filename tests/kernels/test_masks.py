"""Masks and window indices: the layout, and compiled forms compared with the reference."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from brevitas_bp.format import masks
from brevitas_bp.format.masks import (
    INTEGERS,
    Interval,
    Windows,
    next_value,
    order_of,
)
from brevitas_bp.format.packing import pack
from brevitas_bp.format.reference import to_buckets
from tests.strategies import DTYPES, dtype_name
from tests.support import same_bits

masks_cpu = pytest.importorskip("brevitas_bp.kernels.cpu.masks")

INF, NAN = math.inf, math.nan
BACKENDS: list[ModuleType] = [masks, masks_cpu]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "cpu"])

# All lengths up to 70, and lengths beyond the blocks and chunks.
LENGTHS = (*range(71), 8 * 4096, 8 * 4096 + 1, 300_007)


def awkward(length: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    special = torch.tensor([NAN, 0.0, -0.0, INF, -INF, 1.0, -1.0], dtype=dtype)
    positions = torch.arange(0, length, 9)
    x[positions] = special[torch.arange(len(positions)) % len(special)]
    return x


def intervals(dtype: torch.dtype) -> list[Interval]:
    least = next_value(0.0, dtype, 1)
    return [
        Interval(lo, hi, nan) for nan in (False, True) for lo, hi in (
            (least, INF), (0.0, INF), (-0.0, 1.0), (-1.0, -0.0), (-INF, -least), (-INF, INF), (1, 0),
            (INF, INF))]


@each_backend
@each_dtype
def test_a_mask_is_one_bucket_of_one_bit_codes(backend: ModuleType, dtype: torch.dtype) -> None:
    for length in LENGTHS[1:]:
        x = awkward(length, dtype)
        for interval in intervals(dtype)[::1 if length < 10 else 5]:
            inside = (x >= interval.lo) & (x <= interval.hi) | (x.isnan() & interval.nan)
            codes = to_buckets(inside.to(torch.uint8), None)
            packed, seen = backend.pack_interval(x, interval, watch_nan=True)
            assert torch.equal(packed, pack(codes, 1).view(-1)), (length, interval)
            assert seen == bool(x.isnan().any())
            assert not backend.pack_interval(x, interval)[1]
            decoded = backend.unpack_select(packed, length, -INF, 0.1, dtype)
            values = torch.tensor([-INF, 0.1], dtype=dtype)
            assert same_bits(decoded, values[inside.long()])


@each_backend
def test_nothing_takes_nothing(backend: ModuleType) -> None:
    packed, seen = backend.pack_interval(torch.empty(0), Interval(0, 1), watch_nan=True)
    assert packed.numel() == 0 and not seen
    assert backend.unpack_select(packed, 0, 0, 1, torch.float32).numel() == 0


@each_dtype
def test_every_half_precision_value_and_its_neighbour(dtype: torch.dtype) -> None:
    if dtype.itemsize > 2:
        for value in (1.0, -1.0, 2.0**-100, 3.5):
            above = next_value(value, dtype, 1)
            assert above > value and next_value(above, dtype, -1) == value
            assert order_of(above, dtype) == order_of(value, dtype) + 1
        return
    values = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    finite = values[values.isfinite()].double().unique()
    for value, above in zip(finite.tolist()[::7], finite.tolist()[1::7]):
        assert next_value(value, dtype, 1) == above and next_value(above, dtype, -1) == value
    assert next_value(torch.finfo(dtype).max, dtype, 1) == INF


@each_backend
def test_decoded_bools_are_bools(backend: ModuleType) -> None:
    for length in LENGTHS[1:]:
        bits = torch.rand(length, generator=torch.Generator().manual_seed(length)) > 0.5
        packed = backend.pack_bits(bits)
        # The mask is one bucket of 1-bit codes, padded with the last bit.
        assert torch.equal(packed, pack(to_buckets(bits.to(torch.uint8), None), 1).view(-1))
        assert torch.equal(backend.unpack_select(packed, length, 0, 1, torch.bool), bits)


PLANES: dict[str, tuple[Windows, int, int]] = {
    "3x3": (Windows((1, 9, 8), (1, 3, 3), (1, 1, 1), ((0,), (-1, 1, 3, 5), (-1, 1, 3, 5))), 4, 1),
    "dilated, channels last": (
        Windows((1, 9, 9), (1, 2, 3), (1, 3, 2), ((0,), (0, 2, 4), (-1, 1, 3))), 2, 5),
    "3 dimensions": (
        Windows((5, 6, 7), (2, 3, 2), (1, 1, 1), ((0, 2), (-1, 1, 3), (0, 2, 4))), 3, 2),
    "many": (Windows((1, 1, 70_000), (1, 1, 2), (1, 1, 1), ((0,), (0,), tuple(
        range(0, 70_000, 2)))), 9, 1)}


@pytest.mark.parametrize("name", PLANES)
def test_window_codes_invert_and_agree(name: str) -> None:
    windows, outer, inner = PLANES[name]
    shape = (outer, *(len(s) for s in windows.starts), inner)
    volume = math.prod(windows.kernel)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, volume, shape, generator=generator, dtype=torch.uint8)
    indices = [backend.window_indices(codes, windows) for backend in BACKENDS]
    assert torch.equal(*indices)
    # Only indices inside the plane are ever saved; in the padding an index has no meaning.
    d, h, w = (torch.tensor(s).view(-1, *[1] * n) for s, n in zip(windows.starts, (3, 2, 1)))
    kd, kh, kw = codes // (windows.kernel[1] * windows.kernel[2]), (
        codes // windows.kernel[2] % windows.kernel[1]), codes % windows.kernel[2]
    place = [
        start + k.long() * step for start, k, step in zip((d, h, w), (kd, kh, kw), windows.dilation)]
    inside = torch.ones(shape, dtype=torch.bool)
    for at, size in zip(place, windows.sizes):
        inside &= (at >= 0) & (at < size)
    assert inside.any()
    naive = (place[0] * windows.sizes[1] + place[1]) * windows.sizes[2] + place[2]
    assert torch.equal(indices[0][inside], naive[inside])
    for backend in BACKENDS:
        for dtype in (torch.uint8, torch.int16, torch.int32):
            again = backend.window_codes(naive, windows, dtype)
            assert again.dtype == dtype and torch.equal(again[inside].to(torch.uint8), codes[inside])


@each_backend
@each_dtype
def test_rectified_values_are_positive_where_the_bit_is_set(
        backend: ModuleType, dtype: torch.dtype) -> None:
    # Several blocks of the compiled form, and an incomplete byte.
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(70_003, generator=generator).to(dtype)
    bits = torch.rand(x.numel(), generator=generator) < 0.5
    x[:3], x[3:5] = float("nan"), 0.0
    expected = torch.where(bits, x.clamp(min=masks.least_positive(dtype)), 0)
    expected[:3] = float("nan")
    got = backend.rectify_(x.clone(), backend.pack_bits(bits))
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(got > 0, bits & ~x.isnan())
    assert backend.rectify_(x[:0].clone(), backend.pack_bits(bits[:0])).numel() == 0


def test_integers_are_as_wide_as_floats() -> None:
    assert all(INTEGERS[dtype.itemsize].itemsize == dtype.itemsize for dtype in DTYPES)
