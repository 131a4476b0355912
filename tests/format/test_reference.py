"""The reference kernels agree with a naive oracle, and have the properties that users rely on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from brevitas_bp.format import arithmetic, reference
from brevitas_bp.format.arithmetic import compute_dtype, scaled
from brevitas_bp.format.packing import unpack
from brevitas_bp.format.random import uniform
from brevitas_bp.format.reference import (
    Encoded,
    bucket_shape,
    decode,
    draw_layout,
    encode,
    to_buckets,
    width_runs,
)
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    SIGN_MAGNITUDE,
    STOCHASTIC,
    UNSIGNED,
    CodeRange,
    Rounding,
    ScaleRule,
)
from tests.live_bytes import peak_bytes
from tests.stats import hoeffding
from tests.strategies import (
    DTYPES,
    MODERATE,
    NON_FINITE,
    ROUNDINGS,
    RULES,
    dtype_name,
    float_tensors,
    normals,
    seeds,
    specs,
)
from tests.support import same_bits, stage_name

# Relative spacing of float32. The relative error of one operation is at most half of it.
EPS = 2.0**-23
AFFINE = BucketQuantSpec(2, 64)
SPECS = {
    f"{code_range.name} {rule.name} {rounding.name}": BucketQuantSpec(
        4, 64, rule, code_range, rounding)
    for rule, code_range in RULES for rounding in ROUNDINGS}
MIXED = {
    f"mixed per {per}": BucketQuantSpec(2, 64, mix_bit_width=4, mix_prob=0.5, mix_per=per)
    for per in ("bucket", "tensor")}
each_spec = pytest.mark.parametrize(
    "spec", (SPECS | MIXED).values(), ids=(SPECS | MIXED).keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def round_trip(x: Tensor, spec: BucketQuantSpec, seed: int = 0) -> Tensor:
    flat = x.reshape(-1)
    return decode(encode(flat, spec, seed), spec, seed, flat.numel(), x.dtype)


def codes_of(encoded: Encoded, spec: BucketQuantSpec, numel: int) -> Tensor:
    """Returns codes [N, B] of a quantizer of one width."""
    n, size = bucket_shape(numel, spec.bucket_size)
    codes = unpack(encoded.payload.view(n, -1), spec.bit_width, size)
    return codes.long() + spec.code_range.lowest(spec.bit_width)


def naive_range(bucket: list[float], spec: BucketQuantSpec) -> float:
    """Returns the value of the top code."""
    if spec.scale_rule is MIN_MAX:
        return max(bucket) - min(bucket)
    if spec.scale_rule is MAX:
        return max(abs(x) for x in bucket)
    return math.sqrt(sum(x * x for x in bucket))


def naive_code(u: float, noise: float, spec: BucketQuantSpec) -> int:
    """Rounds and clamps a position, in float64."""
    rounded = math.floor(u) + (noise < u - math.floor(u)) if spec.rounding is STOCHASTIC else round(u)
    top = spec.code_range.top(spec.bit_width)
    return min(max(rounded, spec.code_range.lowest(spec.bit_width)), top)


@pytest.mark.parametrize("metadata_dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=stage_name)
@pytest.mark.parametrize(("rule", "code_range"), RULES, ids=stage_name)
def test_codes_are_those_of_a_naive_oracle(
        rule: ScaleRule, code_range: CodeRange, rounding: Rounding, metadata_dtype: torch.dtype) -> None:
    x = normals((5 * 64 - 10,), 1).float() * 3 + 1
    noise = uniform(9, (5, 64)).tolist()
    for width in range(2, 9):
        spec = BucketQuantSpec(
            width, 64, rule, code_range, rounding, metadata_dtype=metadata_dtype)
        encoded = encode(x, spec, seed=9)
        scales = encoded.scale.tolist()
        offsets = [0.0] * 5 if encoded.offset is None else encoded.offset.tolist()
        codes = codes_of(encoded, spec, x.numel())
        # The position is computed by a difference, a reciprocal and a product. Each adds half a spacing
        # of at most the top code. The slack is doubled for second-order terms.
        slack = 3 * EPS * code_range.top(width)
        for b, bucket in enumerate(x.split(64)):
            for i, value in enumerate(bucket.tolist()):
                u = (value - offsets[b]) / scales[b]
                # Rounding is monotone, so the code lies between the codes of both ends of the slack.
                low = naive_code(u - slack, noise[b][i], spec)
                high = naive_code(u + slack, noise[b][i], spec)
                assert low <= codes[b, i] <= high


@pytest.mark.parametrize(("rule", "code_range"), RULES, ids=stage_name)
@pytest.mark.parametrize("width", range(2, 9))
def test_scale_and_offset_are_those_of_a_naive_oracle(
        rule: ScaleRule, code_range: CodeRange, width: int) -> None:
    spec = BucketQuantSpec(width, 64, rule, code_range)
    x = normals((5 * 64 - 10,), 1).float() * 3 + 1
    encoded = encode(x, spec, seed=0)
    for bucket, scale in zip(x.split(64), encoded.scale.tolist()):
        exact = naive_range(bucket.tolist(), spec) / code_range.top(width)
        # Two operations, each off by half a spacing: the range (or norm), and the division.
        assert scale == pytest.approx(exact, rel=EPS)
    if encoded.offset is not None:
        assert encoded.offset.tolist() == [float(bucket.min()) for bucket in x.split(64)]


def test_the_oracle_sees_another_rounding() -> None:
    # Positive control: noise of a neighbouring seed gives other codes.
    x = normals((256,), 1).float()
    first, second = (codes_of(encode(x, AFFINE, seed), AFFINE, 256) for seed in (9, 10))
    assert (first != second).float().mean() > 0.1


@given(float_tensors(values=MODERATE), specs(), seeds)
def test_the_error_is_at_most_one_step(x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    flat = x.reshape(-1)
    encoded = encode(flat, spec, seed)
    decoded = decode(encoded, spec, seed, flat.numel(), x.dtype).double()
    size = bucket_shape(flat.numel(), spec.bucket_size)[1]
    scale = encoded.scale.double().repeat_interleave(size)[:flat.numel()]
    top = max(spec.code_range.top(width) for width in spec.bit_widths)
    info, computed = torch.finfo(x.dtype), torch.finfo(encoded.scale.dtype)
    reach = flat.double().abs().max() + top * scale.max()
    # Rounding errors: in the computing dtype, four operations at the largest magnitude reached; and in
    # the conversion to the dtype of the data.
    eps = 2.0**-52 if x.dtype == torch.float64 else EPS
    slack = 4 * eps * reach + info.eps * flat.double().abs() + info.smallest_normal
    # Dividing by a step below the smallest normal number is impossible: the bucket decodes to code 0.
    tiny = computed.smallest_normal
    steps = torch.where(scale < tiny, top * scale + tiny, scale)
    assert ((decoded - flat.double()).abs() <= steps + slack).all()


@given(float_tensors(), specs(), seeds)
def test_finite_data_stay_finite(x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    assert round_trip(x, spec, seed).isfinite().all()


@given(float_tensors(), specs(), seeds)
def test_decoding_twice_gives_the_same_bits(
        x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    flat = x.reshape(-1)
    encoded = encode(flat, spec, seed)
    first, second = (decode(encoded, spec, seed, flat.numel(), x.dtype) for _ in range(2))
    assert same_bits(first, second)


@each_spec
@pytest.mark.parametrize("exponent", [-100, -30, 3, 60])
def test_powers_of_two_scale_through(spec: BucketQuantSpec, exponent: int) -> None:
    # 2**-100 is about 1e-30: such small data quantize as well as data of size 1.
    x = normals((1000,), 2).float()
    plain, scaled = (encode(t, spec, seed=4) for t in (x, x * 2.0**exponent))
    assert torch.equal(plain.payload, scaled.payload)
    assert torch.equal(plain.scale * 2.0**exponent, scaled.scale)


def test_an_absolute_epsilon_would_be_noticed() -> None:
    # Positive control: the epsilon of the reference implementations of ActNN.
    x = normals((64,), 2).float() * 2.0**-100
    scale = (x.max() - x.min() + 1e-8) / 3
    assert (x / scale).round().unique().numel() == 1


@each_dtype
@pytest.mark.parametrize("width", range(1, 9))
def test_a_constant_bucket_is_exact(width: int, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (0.0, 3.7, -3.7, info.tiny, -info.tiny / 4, info.max, info.min):
        x = torch.full((100,), value, dtype=dtype)
        for rounding, integer in ((NEAREST, False), (STOCHASTIC, False), (STOCHASTIC, True)):
            spec = BucketQuantSpec(width, 64, rounding=rounding, integer_zero_point=integer)
            assert torch.equal(round_trip(x, spec), x)


def test_dividing_by_an_empty_range_would_be_noticed() -> None:
    # Positive control: the formula without its special case.
    x = torch.full((64,), 3.7)
    assert ((x - x.min()) / ((x.max() - x.min()) / 3)).isnan().all()


@pytest.mark.parametrize("code_range", (UNSIGNED, NARROW, SIGN_MAGNITUDE), ids=stage_name)
@pytest.mark.parametrize("width", range(2, 9))
def test_values_on_the_grid_are_exact_at_every_seed(code_range: CodeRange, width: int) -> None:
    top, lowest = code_range.top(width), code_range.lowest(width)
    rule = MAX if code_range.signed else MIN_MAX
    spec = BucketQuantSpec(width, None, rule, code_range)
    offset = 0.0 if code_range.signed else -1.5
    x = torch.arange(lowest, top + 1) * 0.25 + offset
    for seed in range(20):
        assert torch.equal(round_trip(x, spec, seed), x)


def test_the_smallest_draw_does_not_move_a_grid_point() -> None:
    # Noise of exactly zero occurs once in 2**24 draws.
    x, scale = torch.tensor([[-1.0, 0.0, 2.0, 0.001]]), torch.ones(1, 1)
    codes = STOCHASTIC.round_(scaled(x, scale, None), torch.zeros(1, 4), 3)
    assert codes.tolist() == [[-1, 0, 2, 1]]


@pytest.mark.parametrize("name", [n for n in SPECS if "nearest" in n and "l2" not in n])
def test_quantizing_again_gives_the_same_bytes(name: str) -> None:
    # This does not hold for norms: quantized values have another norm.
    spec = SPECS[name]
    x = normals((1000,), 3).float()
    first = encode(x, spec, seed=0)
    again = encode(decode(first, spec, 0, 1000, x.dtype), spec, seed=0)
    assert torch.equal(first.payload, again.payload)


def bytes_of_bucket(spec: BucketQuantSpec, numel: int, seed: int, bucket: int) -> slice:
    """Returns the slice of the payload with the codes of one bucket."""
    n, size = bucket_shape(numel, spec.bucket_size)
    layout = draw_layout(n, spec, seed)
    slot, position = int(layout.slots()[bucket]), 0
    for start, stop, width in width_runs(layout, spec):
        nbytes = size * width // 8
        if slot < stop:
            position += (slot - start) * nbytes
            return slice(position, position + nbytes)
        position += (stop - start) * nbytes
    raise AssertionError(slot)


@each_spec
@pytest.mark.parametrize("bucket", [0, 3, 15])
def test_a_changed_bucket_changes_its_own_bytes_only(spec: BucketQuantSpec, bucket: int) -> None:
    x = normals((1000,), 5).float()
    y = x.clone()
    y[bucket * 64:(bucket + 1) * 64] *= -3
    before, after = encode(x, spec, seed=8), encode(y, spec, seed=8)
    own = torch.zeros(before.payload.shape, dtype=torch.bool)
    own[bytes_of_bucket(spec, 1000, 8, bucket)] = True
    assert torch.equal(before.payload[~own], after.payload[~own])
    assert not torch.equal(before.payload[own], after.payload[own])
    assert (before.scale != after.scale).nonzero().tolist() == [[bucket]]


@each_dtype
@each_spec
@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_bad_value_makes_its_bucket_nan_and_no_other(
        spec: BucketQuantSpec, bad: str, dtype: torch.dtype) -> None:
    x = normals((1000,), 6)
    broken = NON_FINITE[bad](x, dtype).to(dtype)
    inside = slice(500 // 64 * 64, 500 // 64 * 64 + 64)
    clean, decoded = round_trip(x.to(dtype), spec), round_trip(broken, spec)
    assert decoded[inside].isnan().all()
    clean[inside] = decoded[inside] = 0
    assert torch.equal(clean, decoded)


def test_the_tail_has_its_own_range() -> None:
    x = torch.cat([torch.zeros(64), torch.linspace(5, 6, 7)])
    encoded = encode(x, AFFINE, seed=0)
    assert encoded.offset is not None
    assert (encoded.scale[1] * 3).item() == 1 and encoded.offset[1] == 5


def test_padding_with_zeros_would_be_noticed() -> None:
    # Positive control: padding with zero, as other implementations do, brings 0 into the range.
    tail = to_buckets(torch.linspace(5, 6, 7), 64, pad_with_zero=True)
    assert tail.max() - tail.min() == 6


def test_padding_does_not_enter_a_norm() -> None:
    spec = BucketQuantSpec(2, 64, L2, NARROW)
    tail = torch.tensor([3.0, 4.0])
    assert encode(torch.cat([torch.ones(64), tail]), spec, seed=0).scale.tolist() == [8, 5]


@each_spec
def test_a_tensor_takes_its_codes_and_metadata_and_no_more(spec: BucketQuantSpec) -> None:
    x = normals((1000,), 5).float()
    encoded = encode(x, spec, seed=8)
    layout = draw_layout(16, spec, 8)
    widths = torch.where(layout.is_mixed(), spec.mix_bit_width or 0, spec.bit_width)
    assert encoded.payload.numel() == int((64 * widths // 8).sum())
    assert encoded.metadata.shape == (16 * (1 + spec.affine),)


@each_spec
def test_working_in_chunks_changes_no_byte(
        spec: BucketQuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals((1000,), 5).float()
    whole = encode(x, spec, seed=8)
    decoded = decode(whole, spec, 8, 1000, x.dtype)
    monkeypatch.setattr(reference, "_CHUNK", 3 * 64)
    assert all(map(same_bits, whole.tensors, encode(x, spec, seed=8).tensors))
    assert same_bits(decode(whole, spec, 8, 1000, x.dtype), decoded)


@pytest.mark.parametrize("size", [None, 512])
@each_spec
def test_working_in_pieces_of_a_bucket_changes_no_byte(
        spec: BucketQuantSpec, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals((1501,), 5).float()
    spec = replace(spec, bucket_size=size)
    for width in range(2, 9):
        spec = replace(spec, bit_width=width)
        whole = encode(x, spec, seed=8)
        decoded = decode(whole, spec, 8, 1501, x.dtype)
        with monkeypatch.context() as context:
            context.setattr(reference, "_CHUNK", 200)
            context.setattr(arithmetic, "_RUN", 100)
            assert all(map(same_bits, whole.tensors, encode(x, spec, seed=8).tensors))
            assert same_bits(decode(whole, spec, 8, 1501, x.dtype), decoded)


def test_square_roots_of_float64_are_correctly_rounded() -> None:
    """They equal numpy's. With AVX-512, ``torch.sqrt`` is off by one place for some values."""
    x = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = torch.arange(100_000, dtype=torch.float64)
    values = torch.cat((
        x, x * 1e-80, x * 1e77, whole, (whole.square() - 1).abs(),
        torch.tensor([0.0, float("inf"), float("nan")], dtype=torch.float64)))
    assert same_bits(arithmetic.square_root(values), torch.from_numpy(np.sqrt(values.numpy())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_tree_of_a_norm_is_that_of_a_naive_oracle(
        dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_RUN", 4)
    for size in range(1, 70):
        x = normals((3, size), size).to(dtype)
        unit = x.abs().amax(-1, keepdim=True) if dtype == torch.float64 else torch.ones(3, 1)
        terms = list((x.double() / unit).square().unbind(-1))
        while len(terms) > 1:
            half = (len(terms) + 1) // 2
            later = [*terms[half:], torch.zeros(3)][:half]
            terms = [a + b for a, b in zip(terms[:half], later)]
        root = torch.from_numpy(np.sqrt(terms[0].numpy()))
        expected = (root.unsqueeze(-1) * unit).to(dtype)
        assert same_bits(arithmetic.l2_norm(x), expected)
        assert same_bits(arithmetic.l2_norm(x, size), expected)
        padded = torch.nn.functional.pad(x, (0, 5))
        assert same_bits(arithmetic.l2_norm(x, size + 5), arithmetic.l2_norm(padded))


def test_a_sum_from_left_to_right_would_be_noticed() -> None:
    # Positive control: float64 sums in another order differ in some bits.
    x = normals((64, 70), 1)
    assert not torch.equal(arithmetic.l2_norm(x), (x * x).cumsum(-1)[:, -1:].sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("size", [None, 64])
@each_spec
def test_temporaries_are_a_few_chunks(
        spec: BucketQuantSpec, size: int | None, dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals((1 << 14,), 5).to(dtype)[:-3]
    spec = replace(spec, bucket_size=size)

    def most() -> int:
        encoded = encode(x, spec, seed=8)
        stored = sum(t.nbytes for t in encoded.tensors)
        return max(
            peak_bytes(lambda: encode(x, spec, seed=8)) - stored,
            peak_bytes(lambda: decode(encoded, spec, 8, x.numel(), dtype)) - x.nbytes)

    monkeypatch.setattr(reference, "_CHUNK", 512)
    monkeypatch.setattr(arithmetic, "_RUN", 64)
    # At most eight tensors of a chunk in the computing dtype, and the partial sums of a norm: one per
    # level, each with a few copies. Padding and slots of buckets are as small.
    computed = compute_dtype(dtype).itemsize
    bound = 8 * 512 * computed + (10 + 6) * 64 * 8 + 1024
    assert most() <= bound
    # Positive control: everything in one chunk.
    monkeypatch.setattr(reference, "_CHUNK", 1 << 20)
    assert most() > 4 * bound


def test_an_integer_zero_point_puts_zero_on_the_grid() -> None:
    spec = replace(AFFINE, integer_zero_point=True)
    x = normals((64,), 7).float()
    x[10] = 0
    assert round_trip(x, spec)[10] == 0
    assert round_trip(x, AFFINE)[10] != 0


# bfloat16 metadata.


@given(float_tensors((torch.float32,), MODERATE))
def test_bfloat16_metadata_enclose_the_range(x: Tensor) -> None:
    flat = x.reshape(-1)
    encoded = encode(flat, replace(AFFINE, metadata_dtype=torch.bfloat16), seed=0)
    assert encoded.offset is not None
    buckets = to_buckets(flat, 64).double()
    low, step = encoded.offset.double(), encoded.scale.double()
    assert encoded.scale.dtype == encoded.offset.dtype == torch.bfloat16
    assert (low <= buckets.amin(-1)).all()
    # The range is a float32 subtraction and division, then it is rounded up.
    top = low + step * 3 * (1 + EPS) + torch.finfo(torch.float32).smallest_normal
    assert (top >= buckets.amax(-1)).all()


def mean_error_of_buckets(decode_as: torch.dtype, encode_as: torch.dtype) -> tuple[float, float]:
    """Returns mean error, in steps, of 64 equal buckets in [5, 6] at 8 bits, and its tolerance."""
    spec = BucketQuantSpec(8, 256, metadata_dtype=encode_as)
    generator = torch.Generator().manual_seed(1)
    bucket = 5 + torch.rand(256, generator=generator)
    x = bucket.repeat(64)
    encoded = encode(x, spec, seed=0)
    assert encoded.affine
    # ActNN, EXACT and DIVISION do this: cast the metadata after making the codes.
    cast = Encoded(encoded.payload, encoded.metadata.to(decode_as).to(encode_as), affine=True)
    error = (decode(cast, spec, 0, x.numel(), x.dtype).double() - x).mean()
    step = encoded.scale.double().mean()
    # In steps, each error lies in an interval of length 1. Float32 arithmetic at size 6 adds two half
    # spacings of 2**-21.
    return abs(float(error / step)), hoeffding(x.numel()) + 2.0**-21 / float(step)


@pytest.mark.parametrize("metadata", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_rounded_metadata_leave_no_bias(metadata: torch.dtype) -> None:
    bias, tolerance = mean_error_of_buckets(metadata, metadata)
    assert bias < tolerance


def test_metadata_that_are_cast_after_the_codes_bias_them() -> None:
    # Positive control.
    bias, tolerance = mean_error_of_buckets(torch.bfloat16, torch.float32)
    assert bias > 10 * tolerance


def test_float64_data_keep_float64_metadata() -> None:
    spec = replace(AFFINE, metadata_dtype=torch.bfloat16)
    x = normals((100,), 7) * 1e-300
    assert encode(x, spec, seed=0).scale.dtype == torch.float64
    assert (round_trip(x, spec) - x).abs().max() < (x.max() - x.min()) / 3


# The size of the error.

# From algorithms.md 13, measured on N(0, 1): (rule, bits) -> mean squared error for each bucket size.
GOLDEN_ERRORS = {
    ("unsigned", 2): {64: 0.401, 128: 0.500, 256: 0.597, 512: 0.689},
    ("unsigned", 4): {64: 0.0160, 128: 0.0199, 256: 0.0238, 512: 0.0274},
    ("sign_magnitude", 4): {64: 0.0706, 128: 0.0843, 256: 0.0979, 512: 0.1101},
    ("sign_magnitude", 6): {64: 0.0044, 128: 0.0053, 256: 0.0061, 512: 0.0069}}
ERRORS = [
    (code_range, width, size, error)
    for (code_range, width), row in GOLDEN_ERRORS.items() for size, error in row.items()]


def squared_error(x: Tensor, name: str, width: int, size: int, rounding: Rounding) -> float:
    code_range = CodeRange.named(name)
    rule = MAX if code_range.signed else MIN_MAX
    spec = BucketQuantSpec(width, size, rule, code_range, rounding)
    return float((round_trip(x, spec) - x).double().square().mean())


@pytest.fixture(scope="module")
def many_normals() -> Tensor:
    return normals((1 << 20,), 8).float()


@pytest.mark.parametrize(("code_range", "width", "size", "error"), ERRORS)
def test_the_squared_error_is_the_golden_one(
        many_normals: Tensor, code_range: str, width: int, size: int, error: float) -> None:
    measured = squared_error(many_normals, code_range, width, size, STOCHASTIC)
    # Relative standard deviations: 0.3 for a bucket's squared range at G >= 64 (that of a Gumbel
    # maximum), 2.4 for an element's squared error (at most D**4 / 6, with a mean of D**2 / 6). The
    # tolerance is six of them, doubled because the golden number was sampled too, plus its last digit.
    deviation = math.hypot(0.3 / math.sqrt(many_normals.numel() / size), 2.4 / 1024)
    digit = 0.5 * 10.0**-(3 if error > 0.2 else 4)
    assert measured == pytest.approx(error, rel=2 * 6 * deviation, abs=digit)


@pytest.mark.parametrize(("code_range", "width"), GOLDEN_ERRORS)
def test_nearest_rounding_has_half_the_squared_error(
        many_normals: Tensor, code_range: str, width: int) -> None:
    # Positive control for the golden numbers: D**2 / 12 instead of D**2 / 6.
    stochastic, nearest = (
        squared_error(many_normals, code_range, width, 256, rounding)
        for rounding in (STOCHASTIC, NEAREST))
    assert 0.4 < nearest / stochastic < 0.6
