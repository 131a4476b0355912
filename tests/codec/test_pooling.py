"""Max-pool indices stored as positions in the window: exact for every pooling, layout and value."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.codec import Codec
from brevitas_bp.codec.pooling import (
    WindowIndex,
    adaptive_max_pool_index,
    max_pool_index,
    plane_index,
)
from brevitas_bp.codec.shape_only import shape_only
from brevitas_bp.errors import CorruptPayloadError
from tests.codec.support import Op, run
from tests.support import same_bits

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def values(shape: tuple[int, ...], kind: str = "normal") -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    if kind == "negative":
        return -x.abs() - 1
    if kind == "ties":
        return x.round()
    if kind == "nan":
        return x.masked_fill(x > 1, math.nan)
    if kind == "-inf":
        return torch.full_like(x, -math.inf)
    return x


class Pool(NamedTuple):
    shape: tuple[int, ...]
    dims: int
    arguments: dict[str, object]
    bits: int


POOLINGS: dict[str, Pool] = {
    "1d": Pool((2, 3, 21), 1, {"kernel_size": 3}, 2),
    "1d, unbatched": Pool((3, 21), 1, {"kernel_size": 2, "stride": 1}, 1),
    "1d, padded": Pool((2, 3, 21), 1, {"kernel_size": (5,), "stride": (2,), "padding": 2}, 3),
    "2d": Pool((2, 3, 9, 8), 2, {"kernel_size": 2}, 2),
    "2d of no stride": Pool((2, 3, 9, 8), 2, {"kernel_size": 2, "stride": []}, 2),
    "3x3": Pool((2, 3, 9, 8), 2, {"kernel_size": 3, "stride": 2, "padding": 1}, 4),
    "ceil": Pool((2, 3, 9, 8), 2, {
        "kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}, 4),
    "unbatched": Pool((3, 9, 8), 2, {"kernel_size": 3, "stride": 2, "padding": 1}, 4),
    "oblong": Pool((2, 3, 9, 8), 2, {
        "kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}, 3),
    "dilated": Pool((2, 3, 19, 18), 2, {
        "kernel_size": 3, "stride": (2, 1), "padding": 1, "dilation": (2, 3)}, 4),
    "dilated, ceil": Pool((2, 3, 19, 18), 2, {
        "kernel_size": (2, 3), "stride": 3, "dilation": 3, "padding": 1, "ceil_mode": True}, 3),
    "gaps": Pool((2, 3, 19, 18), 2, {"kernel_size": 2, "stride": 5}, 2),
    "1x1": Pool((2, 3, 5, 5), 2, {"kernel_size": 1}, 1),
    "global": Pool((2, 3, 5, 5), 2, {"kernel_size": 5}, 5),
    "13x13": Pool((1, 2, 26, 26), 2, {"kernel_size": 13, "stride": 1, "padding": 6}, 8),
    # There are as many positions as codes, so the limit itself does not fit the codes' dtype.
    "16x16": Pool((1, 2, 18, 18), 2, {"kernel_size": 16, "stride": 1}, 8),
    "128x256": Pool((1, 2, 129, 257), 2, {"kernel_size": (128, 256), "stride": 1}, 16),
    "17x17": Pool((1, 2, 20, 20), 2, {"kernel_size": 17, "stride": 1}, 16),
    "200x200": Pool((1, 2, 201, 201), 2, {"kernel_size": 200, "stride": 1}, 32),
    "3d": Pool((2, 3, 6, 7, 8), 3, {"kernel_size": 2}, 3),
    "3d, all": Pool((2, 3, 6, 9, 8), 3, {
        "kernel_size": (2, 3, 2), "stride": (1, 2, 3), "padding": (1, 1, 0), "dilation": (1, 2, 3),
        "ceil_mode": True}, 4),
    "3d, unbatched": Pool((3, 6, 7, 8), 3, {"kernel_size": 3, "stride": 2, "padding": 1}, 5)}


def check(op: Op, x: Tensor, codec: Codec) -> int:
    """Returns the stored bytes of the indices, the second tensor that a max pooling saves."""
    plain, stored = run(op, x), run(op, x, {0: shape_only(), 1: codec})
    assert [t.dtype for t in plain.saved] == [x.dtype, torch.int64]
    decoded = stored.packed[1].decode()
    assert torch.equal(decoded, plain.saved[1])
    assert decoded.stride() == stored.packed[1].layout.stride
    assert same_bits(stored.grad, plain.grad)
    assert stored.packed[0].nbytes == 0
    assert stored.packed[1].nbytes == codec.stored_nbytes(stored.packed[1].layout)
    return stored.packed[1].nbytes


def codec_of(pool: Pool) -> WindowIndex:
    arguments = {k: v for k, v in pool.arguments.items() if k != "ceil_mode"}
    return max_pool_index(pool.shape, pool.dims, **arguments)  # pyright: ignore


@pytest.mark.parametrize("kind", ["normal", "negative", "ties", "nan", "-inf"])
@pytest.mark.parametrize("name", POOLINGS)
def test_max_pool_indices_are_exact(name: str, kind: str) -> None:
    pool = POOLINGS[name]

    def op(x: Tensor) -> Tensor:
        return POOLS[pool.dims](x, **pool.arguments)

    x = values(pool.shape, kind)
    numel = op(x).numel()
    nbytes = check(op, x, codec_of(pool))
    assert nbytes == (
        -(-numel // 8) * pool.bits if pool.bits <= 8 else numel * pool.bits // 8)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one image, channels_last": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "one channel": lambda x: x[:, :1].contiguous(memory_format=torch.channels_last)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [n for n, p in POOLINGS.items() if len(p.shape) == 4 and p.dims == 2])
def test_in_every_layout(name: str, layout: str) -> None:
    pool = POOLINGS[name]
    check(lambda x: F.max_pool2d(x, **pool.arguments), LAYOUTS[layout](values(pool.shape)),
          codec_of(pool))


def test_channels_last_of_three_dimensions() -> None:
    x = values((2, 3, 6, 7, 8)).contiguous(memory_format=torch.channels_last_3d)
    check(lambda x: F.max_pool3d(x, 2), x, max_pool_index(x.shape, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_of_every_dtype(dtype: torch.dtype) -> None:
    x = values((2, 3, 9, 8)).to(dtype)
    check(lambda x: F.max_pool2d(x, 3, 2, 1), x, max_pool_index(x.shape, 2, 3, 2, 1))


@given(st.data())
def test_any_max_pool2d(data: st.DataObject) -> None:
    pairs = {}
    for name, low, high in (("kernel_size", 1, 5), ("stride", 1, 4), ("dilation", 1, 3)):
        pairs[name] = (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))
    pairs["padding"] = tuple(data.draw(st.integers(0, k // 2)) for k in pairs["kernel_size"])
    shape = (data.draw(st.integers(1, 3)), 2, *(
        data.draw(st.integers((k - 1) * d + 1, 20))
        for k, d in zip(pairs["kernel_size"], pairs["dilation"])))
    ceil = data.draw(st.booleans())
    check(lambda x: F.max_pool2d(x, **pairs, ceil_mode=ceil), values(shape),
          max_pool_index(shape, 2, **pairs))


@pytest.mark.parametrize(("shape", "dims", "size", "bits"), [
    ((2, 3, 21), 1, 5, 3), ((3, 21), 1, 21, 1), ((2, 3, 21), 1, 1, 5), ((2, 3, 5), 1, 9, 1),
    ((2, 3, 9, 8), 2, 4, 3), ((2, 3, 9, 8), 2, (2, None), 3), ((3, 9, 8), 2, (5, 3), 4),
    ((2, 3, 4, 5), 2, 7, 2), ((2, 3, 9, 8), 2, 1, 7), ((2, 3, 6, 7, 8), 3, (2, 3, 4), 5),
    ((2, 3, 16, 16), 2, 1, 8), ((2, 3, 17, 17), 2, 1, 16)])
def test_adaptive_max_pool_indices_are_exact(
        shape: tuple[int, ...], dims: int, size: int | tuple[int | None, ...], bits: int) -> None:
    def op(x: Tensor) -> Tensor:
        return ADAPTIVE[dims](x, size)

    x = values(shape)
    numel = op(x).numel()
    nbytes = check(op, x, adaptive_max_pool_index(shape, dims))
    assert nbytes == (-(-numel // 8) * bits if bits <= 8 else numel * bits // 8)
    if len(shape) == 4:
        check(op, x.contiguous(memory_format=torch.channels_last), adaptive_max_pool_index(shape, dims))


def test_fractional_max_pool_indices_are_narrowed() -> None:
    x = values((2, 3, 9, 8))
    assert check(lambda x: F.fractional_max_pool2d(x, 2, 4), x, plane_index(x.shape, 2)) == 2 * 3 * 16
    x = values((1, 2, 9, 8, 7))
    codec = plane_index(x.shape, 3)
    assert check(lambda x: F.fractional_max_pool3d(x, 2, 4), x, codec) == 2 * 64 * 2


def test_unpooling_indices_are_narrowed() -> None:
    x, index = F.max_pool2d(values((2, 3, 8, 8)), 2, return_indices=True)

    def op(x: Tensor) -> Tensor:
        return F.max_unpool2d(x, index, 2)

    plain, stored = run(op, x), run(op, x, {0: plane_index((8, 8), 2)})
    assert same_bits(stored.grad, plain.grad) and stored.packed[0].nbytes == index.numel()


def test_another_window_gives_other_indices() -> None:
    x = values((2, 3, 9, 8))
    plain = run(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    wrong = max_pool_index(x.shape, 2, 2, 2, 1)
    # PyTorch writes to the position of an index, so an index outside the plane is refused.
    with pytest.raises(CorruptPayloadError, match=r"numbers in 0..71"):
        wrong.encode(plain.saved[1]).decode()


def test_factories_give_one_object() -> None:
    assert max_pool_index((2, 3, 9, 8), 2, 3, 2, 1) is max_pool_index([4, 9, 8], 2, [3], (2, 2), 1)
    assert adaptive_max_pool_index((2, 9, 8), 2) is adaptive_max_pool_index((9, 8), 2)
