"""Masks replace saved tensors: every gradient equals plain autograd's, bit for bit."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import codec_from
from brevitas_bp.codec import Codec
from brevitas_bp.codec.regions import (
    Region,
    alpha_dropout_mask,
    clamp_region,
    dropout_mask,
    hardsigmoid_region,
    hardtanh_region,
    interval_of,
    positive_region,
    relu6_region,
    relu_region,
    representatives,
    shrink_region,
    sign,
    threshold_region,
)
from brevitas_bp.format.masks import INTEGERS
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
from tests.codec.support import Op, run
from tests.strategies import DTYPES, dtype_name
from tests.support import same_bits

INF, NAN = math.inf, math.nan


class Case(NamedTuple):
    """An operation, which saved tensor is stored, how it is stored, and the borders to test."""

    op: Op
    codec: Codec
    borders: tuple[float, ...] = (0.0,)
    stored: int = 0


# 0.1 and 0.3 lie between values of every dtype but float64, one on each side of its nearest value.
CASES: dict[str, Case] = {
    "F.relu": Case(F.relu, relu_region()),
    "Tensor.relu": Case(lambda x: x.relu(), relu_region()),
    "relu_": Case(lambda x: x.relu_(), relu_region()),
    "F.relu in place": Case(lambda x: F.relu(x, inplace=True), relu_region()),
    "threshold": Case(lambda x: F.threshold(x, 0.1, 7.0), threshold_region(0.1), (0.1,)),
    "threshold below 0": Case(lambda x: F.threshold(x, -0.3, 7.0), threshold_region(-0.3), (-0.3,)),
    "threshold_": Case(lambda x: F.threshold_(x, 0.1, 7.0), threshold_region(0.1), (0.1,)),
    "threshold inf": Case(lambda x: F.threshold(x, INF, 7.0), threshold_region(INF)),
    "threshold -inf": Case(lambda x: F.threshold(x, -INF, 7.0), threshold_region(-INF)),
    "leaky_relu": Case(lambda x: F.leaky_relu(x, 0.2), positive_region()),
    "leaky_relu_": Case(lambda x: F.leaky_relu_(x, 0.2), positive_region()),
    "leaky_relu of slope 0": Case(lambda x: F.leaky_relu(x, 0.0), positive_region()),
    "leaky_relu, rising to the left": Case(lambda x: F.leaky_relu(x, -0.2), positive_region()),
    "rrelu in evaluation": Case(lambda x: F.rrelu(x), positive_region(), stored=1),
    "rrelu_ in evaluation": Case(lambda x: F.rrelu_(x), positive_region(), stored=1),
    "hardtanh": Case(F.hardtanh, hardtanh_region(), (-1.0, 1.0)),
    "hardtanh(-.1, .3)": Case(
        lambda x: F.hardtanh(x, -0.1, 0.3), hardtanh_region(-0.1, 0.3), (-0.1, 0.3)),
    "hardtanh(.3, .3)": Case(lambda x: F.hardtanh(x, 0.3, 0.3), hardtanh_region(0.3, 0.3), (0.3,)),
    "hardtanh(-inf, inf)": Case(
        lambda x: F.hardtanh(x, -INF, INF), hardtanh_region(-INF, INF), (INF,)),
    "hardtanh_": Case(lambda x: F.hardtanh_(x, -0.1, 0.3), hardtanh_region(-0.1, 0.3), (-0.1, 0.3)),
    "relu6": Case(F.relu6, relu6_region(), (0.0, 6.0)),
    "relu6 in place": Case(lambda x: F.relu6(x, inplace=True), relu6_region(), (0.0, 6.0)),
    "hardsigmoid": Case(F.hardsigmoid, hardsigmoid_region(), (-3.0, 3.0)),
    "hardsigmoid in place": Case(
        lambda x: F.hardsigmoid(x, inplace=True), hardsigmoid_region(), (-3.0, 3.0)),
    "hardshrink(.1)": Case(lambda x: F.hardshrink(x, 0.1), shrink_region(0.1), (-0.1, 0.1)),
    "hardshrink(.3)": Case(lambda x: F.hardshrink(x, 0.3), shrink_region(0.3), (-0.3, 0.3)),
    "hardshrink(0)": Case(lambda x: F.hardshrink(x, 0.0), shrink_region(0.0)),
    "hardshrink(-1)": Case(lambda x: F.hardshrink(x, -1.0), shrink_region(-1.0), (-1.0, 1.0)),
    "softshrink(.1)": Case(lambda x: F.softshrink(x, 0.1), shrink_region(0.1), (-0.1, 0.1)),
    "softshrink(.3)": Case(lambda x: F.softshrink(x, 0.3), shrink_region(0.3), (-0.3, 0.3)),
    "clamp": Case(lambda x: x.clamp(-0.1, 0.3), clamp_region(-0.1, 0.3), (-0.1, 0.3)),
    "clamp_": Case(lambda x: x.clamp_(-0.1, 0.3), clamp_region(-0.1, 0.3), (-0.1, 0.3)),
    "clamp, integers": Case(lambda x: x.clamp(-1, 2), clamp_region(-1, 2), (-1.0, 2.0)),
    "clamp of no width": Case(lambda x: x.clamp(0.3, 0.3), clamp_region(0.3, 0.3), (0.3,)),
    "clamp, borders crossed": Case(lambda x: x.clamp(1, -1), clamp_region(1, -1), (-1.0, 1.0)),
    "clamp, border NaN": Case(lambda x: x.clamp(NAN, 1), clamp_region(NAN, 1), (1.0,)),
    "clamp, infinite": Case(lambda x: x.clamp(-INF, INF), clamp_region(-INF, INF), (INF,)),
    "clamp above all": Case(lambda x: x.clamp(min=INF), clamp_region(INF), (INF,)),
    "clamp(min)": Case(lambda x: x.clamp(min=0.1), clamp_region(0.1), (0.1,)),
    "clamp(max)": Case(lambda x: x.clamp(max=0.3), clamp_region(max=0.3), (0.3,)),
    "clamp_min": Case(lambda x: x.clamp_min(0.3), clamp_region(0.3), (0.3,)),
    "clamp_min_": Case(lambda x: x.clamp_min_(0.3), clamp_region(0.3), (0.3,)),
    "clamp_max": Case(lambda x: x.clamp_max(0.1), clamp_region(max=0.1), (0.1,)),
    "clip": Case(lambda x: torch.clip(x, 0.1, 0.3), clamp_region(0.1, 0.3), (0.1, 0.3)),
    "prelu": Case(
        lambda x: F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype)), positive_region()),
    "abs": Case(torch.abs, sign()),
    "abs_": Case(lambda x: x.abs_(), sign()),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_case = pytest.mark.parametrize("name", CASES)


def telling_values(dtype: torch.dtype, borders: tuple[float, ...]) -> Tensor:
    """Returns all values of a half-precision dtype; else the borders' neighbours and special values."""
    integer = INTEGERS[dtype.itemsize]
    if dtype.itemsize == 2:
        return torch.arange(-2**15, 2**15).to(integer).view(dtype)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, INF, -INF, NAN, info.max, info.min, info.tiny, -info.tiny, 1.0, -1.0]
    least = torch.arange(1, 4).to(integer).view(dtype)
    around = [
        (torch.tensor([sign * abs(b)], dtype=dtype).view(integer) + torch.arange(-3, 4).to(integer))
        .view(dtype) for b in borders for sign in (-1, 1)]
    # Repeat the values, so that they occur in vector lanes and in the remainder.
    return torch.cat([torch.tensor(special, dtype=dtype), least, -least, *around]).repeat(5)


@each_dtype
@each_case
def test_gradient_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x = telling_values(dtype, case.borders)
    plain, stored = run(case.op, x), run(case.op, x, {case.stored: case.codec})
    assert len(stored.packed) == 1 and same_bits(stored.grad, plain.grad)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "1 element": lambda x: x.reshape(-1)[4:5],
    "0-d": lambda x: x.reshape(-1)[4],
    "7 elements": lambda x: x.reshape(-1)[:7]}


@pytest.mark.parametrize("shape", SHAPES)
@each_case
def test_gradient_is_bit_equal_in_every_layout(name: str, shape: str) -> None:
    case = CASES[name]
    values = telling_values(torch.float32, case.borders)
    x = SHAPES[shape](values[torch.arange(2 * 5 * 7 * 3) % values.numel()].view(2, 5, 7, 3))
    plain, stored = run(case.op, x), run(case.op, x, {case.stored: case.codec})
    assert same_bits(stored.grad, plain.grad)
    assert stored.packed[0].decode().stride() == plain.saved[case.stored].stride()


@each_case
def test_gradient_is_bit_equal_over_several_threads_and_chunks(name: str) -> None:
    case = CASES[name]
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(2))
    x[::1001] = NAN
    plain, stored = run(case.op, x), run(case.op, x, {case.stored: case.codec})
    assert same_bits(stored.grad, plain.grad)


NAIVE = codec_from(ShiftedUint2DynamicActPerBucketFloat)
#: The mask has one answer for all finite values, so no wrong region can show.
CONSTANT = {
    "threshold inf", "threshold -inf", "hardtanh(-inf, inf)", "hardtanh(.3, .3)", "hardshrink(-1)",
    "hardshrink(0)", "clamp, borders crossed", "clamp, border NaN", "clamp, infinite",
    "clamp above all", "clamp of no width"}


@pytest.mark.parametrize("name", sorted(set(CASES) - CONSTANT))
def test_quantized_naively_the_gradient_differs(name: str) -> None:
    case = CASES[name]
    x = 3 * torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    plain, stored = run(case.op, x), run(case.op, x, {case.stored: NAIVE})
    assert not same_bits(stored.grad, plain.grad)


@pytest.mark.parametrize(("wrong", "op", "border"), [
    # Each wrong region differs from the right one in one field.
    (Region("", lo=0.0), F.relu, 0.0),
    (Region("", lo=0.0, closed=True, nan=True), F.relu, 0.0),
    (Region("", lo=0.0, nan=True), F.leaky_relu, 0.0),
    (Region("", lo=-3.0, hi=3.0, closed=True), F.hardsigmoid, 3.0),
    (Region("", lo=-0.3, hi=0.3, closed=True, keep_nan=True), lambda x: F.hardshrink(x, 0.3), 0.3),
    (Region("", hi=0.3, closed=True), lambda x: x.clamp(max=0.3), 0.3),
    (Region("", lo=-0.1, hi=0.3, nan=True), lambda x: F.hardtanh(x, -0.1, 0.3), 0.3),
    (Region("", lo=-0.1, hi=0.3), lambda x: F.hardtanh(x, -0.1, 0.3), 0.3),
    (Region("", lo=-0.1, hi=0.3, nan=True, keep_nan=True, bounds="dtype"),
     lambda x: F.hardtanh(x, -0.1, 0.3), 0.3)])
def test_every_field_matters(wrong: Region, op: Op, border: float) -> None:
    def differs(x: Tensor) -> bool:
        return not same_bits(run(op, x, {0: wrong}).grad, run(op, x).grad)

    assert any(
        differs(x) for dtype in DTYPES for x in (
            telling_values(dtype, (border,)), torch.full((1,), NAN, dtype=dtype)))


@each_case
def test_one_bit_an_element(name: str) -> None:
    case = CASES[name]
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
    packed = case.codec.encode(x, seed=0)
    planes = 2 if case.codec is sign() else 1
    assert packed.nbytes == planes * 14 == case.codec.stored_nbytes(packed.layout)
    assert same_bits(packed.decode(), packed.decode())


def test_nan_costs_a_second_bit_only_where_kernels_disagree_on_it() -> None:
    x = torch.tensor([NAN, 0.0, 1.0, 2.0])
    assert hardtanh_region().encode(x).nbytes == 2
    assert hardtanh_region().encode(x[1:]).nbytes == 1
    assert relu_region().encode(x).nbytes == 1


def test_factories_give_one_object() -> None:
    assert relu_region() is relu_region()
    assert hardtanh_region(0, 6) is hardtanh_region(0.0, 6.0) and relu6_region() is relu6_region()
    assert clamp_region(max=1.0) is clamp_region(max=1.0)
    assert dropout_mask(0.5) is dropout_mask(0.5) is not dropout_mask(0.25)


bounds = st.floats(width=32) | st.sampled_from([0.0, -0.0, INF, -INF, 1e-45, 65504.0, 65519.0, 1e38])


@given(bounds, bounds, st.booleans(), st.booleans(), st.sampled_from(DTYPES))
def test_representatives_lie_in_their_regions(
        lo: float, hi: float, closed: bool, nan: bool, dtype: torch.dtype) -> None:
    region = Region("", lo, hi, closed, nan)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = telling_values(dtype, tuple(b for b in (lo, hi) if math.isfinite(b)))
    wide = x.to(compute)
    least, most = (torch.tensor(b, dtype=compute) for b in (lo, hi))
    above = (wide >= least) if closed else (wide > least)
    below = (wide <= most) if closed else (wide < most)
    inside = (above & below) | (x.isnan() if nan else False)
    decoded = region.encode(x).decode()
    # Decode gives a representative value; encoding that value again gives the same mask.
    assert same_bits(region.encode(decoded).decode(), decoded)
    outside_value, inside_value = representatives(region, dtype)
    assert same_bits(decoded, torch.where(
        inside, torch.tensor(inside_value, dtype=dtype), torch.tensor(outside_value, dtype=dtype)))
    interval = interval_of(region, dtype)
    assert not inside.any() or inside_value in interval
    assert inside.all() or outside_value not in interval


DROPOUTS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[float], Codec]]] = {
    "dropout": (lambda x, p: F.dropout(x, p), dropout_mask),
    "dropout in place": (lambda x, p: F.dropout(x, p, inplace=True), dropout_mask),
    "dropout1d": (lambda x, p: F.dropout1d(x[0], p), dropout_mask),
    "dropout2d": (lambda x, p: F.dropout2d(x, p), dropout_mask),
    "dropout2d in place": (lambda x, p: F.dropout2d(x, p, inplace=True), dropout_mask),
    "dropout3d": (lambda x, p: F.dropout3d(x[:, None], p), dropout_mask),
    "alpha_dropout": (lambda x, p: F.alpha_dropout(x, p, True), alpha_dropout_mask),
    "alpha_dropout in place": (lambda x, p: F.alpha_dropout(x, p, True, True), alpha_dropout_mask),
    "feature_alpha_dropout": (
        lambda x, p: F.feature_alpha_dropout(x, p, True), alpha_dropout_mask)}


@each_dtype
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_masks_take_one_bit(name: str, dtype: torch.dtype) -> None:
    op, mask = DROPOUTS[name]
    x = torch.randn(2, 40, 6, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    for p in (1e-3, 0.05, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1.0):
        plain = run(lambda x, p=p: op(x, p), x)
        if p == 1:
            # A 0-d zero, except for dropout of whole channels; alpha dropout saves nothing.
            assert all(t.sum() == 0 for t in plain.saved)
            continue
        assert len(plain.saved) == 1
        stored = run(lambda x, p=p: op(x, p), x, {0: mask(p)})
        assert same_bits(stored.packed[0].decode(), plain.saved[0])
        assert same_bits(stored.grad, plain.grad)
        assert stored.packed[0].nbytes == -(-plain.saved[0].numel() // 8)


def test_a_mask_of_another_probability_is_noticed() -> None:
    x = torch.randn(100)
    plain = run(lambda x: F.dropout(x, 0.3), x)
    stored = run(lambda x: F.dropout(x, 0.3), x, {0: dropout_mask(0.31)})
    assert not same_bits(stored.grad, plain.grad)
