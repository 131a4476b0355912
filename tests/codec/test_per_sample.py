"""Bits per sample: the allocation, its bytes, and the decoded values."""

import copy
import heapq
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.codec import PerSampleCodec
from brevitas_bp.codec.per_sample import greedy_widths
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.quant import Int4DynamicActPerBucketFloatStochastic as Int4
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from brevitas_bp.quant import ShiftedUint2DynamicActPerTensorFloatStochastic as PerTensor
from brevitas_bp.quant import ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Mix
from tests.stats import hoeffding
from tests.strategies import DTYPES, LAYOUTS, awkward_tensors, dtype_name, normals
from tests.support import same_bits

WIDTHS = (1, 2, 3, 4, 8)


def variance(widths: Sequence[int]) -> Tensor:
    return (2.0**torch.tensor(widths, dtype=torch.float64) - 1)**-2


def naive_greedy(costs: Tensor, total: int, widths: Sequence[int]) -> list[int]:
    """Lowers the sample that adds least cost per bit; ties go to the widest sample, then the last."""
    falls = variance(widths).tolist()
    steps = len(widths) - 1
    level = [steps] * len(costs)

    def entry(i: int) -> tuple[float, int, int]:
        k = level[i]
        return float(costs[i]) * (
            (falls[k - 1] - falls[k]) / (widths[k] - widths[k - 1])), -k, -i

    heap = [entry(i) for i in range(len(costs))]
    heapq.heapify(heap)
    while sum(widths[k] for k in level) > total:
        i = -heapq.heappop(heap)[2]
        level[i] -= 1
        if level[i] > 0:
            heapq.heappush(heap, entry(i))
    return [widths[k] for k in level]


def greedy(costs: Tensor, total: int, widths: Sequence[int]) -> list[int]:
    return greedy_widths(costs, total, widths, variance(widths)).tolist()


COSTS: dict[str, Callable[[int], Tensor]] = {
    "spread": lambda n: torch.exp(5 * normals((n,), n)),
    "ties": lambda n: normals((n,), n).abs().round(),
    "equal": lambda n: torch.ones(n, dtype=torch.float64),
    "zero": lambda n: torch.zeros(n, dtype=torch.float64)}


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("widths", [WIDTHS, tuple(range(1, 9)), (2, 8)])
def test_sorting_all_lowerings_is_the_greedy(kind: str, widths: tuple[int, ...]) -> None:
    for n, part in itertools.product((1, 2, 7, 40), (0.0, 0.1, 0.3, 0.77, 1.0)):
        costs = COSTS[kind](n)
        total = int(n * (widths[0] + part * (widths[-1] - widths[0])))
        assert greedy(costs, total, widths) == naive_greedy(costs, total, widths)


def test_widths_one_bit_apart_are_optimal() -> None:
    widths = (1, 2, 3, 4)
    for seed in range(20):
        costs = torch.exp(3 * normals((5,), seed))
        every = torch.tensor(list(itertools.product(widths, repeat=5)))
        objective = (costs * (2.0**every - 1)**-2.0).sum(1)
        least = objective[every.sum(1) <= 11].min()
        chosen = torch.tensor(greedy(costs, 11, widths))
        # Both are sums of five terms.
        assert (costs * (2.0**chosen - 1)**-2.0).sum() <= least * (1 + 1e-15 * 5)


GOLDEN = {1: [1, 1, 1, 1, 1, 1], 1.25: [2, 1, 1, 1, 1, 1], 1.5: [3, 2, 1, 1, 1, 1],
          2: [4, 3, 2, 1, 1, 1]}


@pytest.mark.parametrize("average", GOLDEN)
def test_golden_allocations(average: float) -> None:
    # C = 1000, 100, ...: ranges are the square roots.
    ranges = torch.tensor([1000, 100, 10, 1, 0.1, 0.01], dtype=torch.float64).sqrt()
    codec = PerSampleCodec(Uint2, average, range(1, 9), bucket_size=64)
    assert codec.widths(torch.linspace(0, 1, 64) * ranges.unsqueeze(-1)).tolist() == GOLDEN[average]


def uniform(samples: int, size: int, scale: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((samples, size), generator=generator) * scale.unsqueeze(-1)


def test_unlike_ranges_lose_less_than_at_one_width_with_equal_bytes() -> None:
    scale = torch.tensor([100.0, 1.0]).repeat(4)
    x = uniform(8, 4096, scale)
    codec, plain = PerSampleCodec(Uint2), codec_from(Uint2)
    widths = codec.widths(x)
    assert widths.tolist() == [3, 1] * 4
    packed, uniform_width = codec.encode(x, seed=1), plain.encode(x, seed=1)
    assert packed.nbytes == uniform_width.nbytes + 8  # a byte for the width of each sample

    def measured(decoded: Tensor, bits: Tensor | int) -> Tensor:
        """Returns the squared error, in squared steps of range 1 or 100, of narrow and wide samples."""
        step = scale / (2.0**torch.as_tensor(bits) - 1)
        return (((decoded - x) / step.unsqueeze(-1))**2).view(4, 2, -1).mean((0, 2))

    # Uniform values have uniform fractions: E a (1 - a) = 1/6, and 0 for the ends of each bucket. The
    # range of 256 uniform values is on average 255/257 of the whole; its mean square is no smaller.
    margin = hoeffding(4 * 4096, tests=4)
    for error in (measured(packed.decode(), widths), measured(uniform_width.decode(), 2)):
        assert (error <= 1 / 6 + margin).all()
        assert (error >= 254 / 256 / 6 * (255 / 257)**2 - margin).all()
    # (1e4 + 1) / 9 against 1e4 / 49 + 1: predicted 5.4, at least 3.9 within both margins.
    errors = [float((p.decode() - x).square().sum()) for p in (packed, uniform_width)]
    assert errors[1] / errors[0] > 3.9


def test_equal_ranges_give_the_ordinary_codec_bit_for_bit() -> None:
    x = normals((1, 1024)).float().expand(16, -1) * torch.tensor([1.0, -1.0]).repeat(8).unsqueeze(-1)
    packed, plain = (codec.encode(x, seed=5) for codec in (PerSampleCodec(Uint2), codec_from(Uint2)))
    assert packed.nbytes == plain.nbytes
    assert same_bits(packed.decode(), plain.decode())


def mean_deviation(config: Any, draws: int) -> tuple[Tensor, Tensor]:
    """Returns the mean error over seeds, and the step of each element; widths are [3, 1, 2]."""
    x = uniform(3, 64, torch.tensor([100.0, 1.0, 50.0]))
    codec = PerSampleCodec(config, bucket_size=64)
    assert codec.widths(x).tolist() == [3, 1, 2]
    step = (x.amax(1) - x.amin(1)) / torch.tensor([7.0, 1.0, 3.0])
    total = sum(codec.encode(x, seed=seed).decode().double() for seed in range(draws))
    return total / draws - x, step.unsqueeze(-1)


def test_stochastic_rounding_stays_unbiased() -> None:
    draws = 600
    limit = hoeffding(draws, tests=3 * 64) + 1e-5  # slack for a few float operations
    deviation, step = mean_deviation(Uint2, draws)
    assert (deviation.abs() <= limit * step).all()
    biased, step = mean_deviation(Nearest, 1)
    assert (biased.abs() > limit * step).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_name)
def test_samples_come_back_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    normal = normals((5, 9, 4, 11)) * torch.logspace(0, 2, 5).view(-1, 1, 1, 1)
    x = LAYOUTS[layout](normal.to(dtype))
    codec = PerSampleCodec(Uint2, 6, (5, 6, 7), bucket_size=8)
    packed = codec.encode(x, seed=0)
    decoded = packed.decode()
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    assert decoded.stride() == packed.layout.stride
    # A step of the narrowest width over the whole range, plus the rounding of the dtype.
    slack = x.float().abs() * torch.finfo(dtype).eps
    # Buckets of 8 do not divide a sample: a bucket may reach into the next sample of its width.
    span = (x.amax() - x.amin()).float()
    assert ((decoded - x).float().abs() <= span / 31 + slack).all()
    assert same_bits(packed.decode(), decoded)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_awkward_tensors_round_trip_as_the_ordinary_codec_or_finely(dtype: torch.dtype) -> None:
    codec, plain = PerSampleCodec(Uint2, bit_widths=(2, 4)), codec_from(Uint2)
    for name, x in awkward_tensors(dtype).items():
        packed = codec.encode(x, seed=3)
        decoded = packed.decode()
        assert decoded.shape == x.shape and decoded.dtype == x.dtype, name
        if x.dim() < 2 or x.numel() == 0:
            assert same_bits(decoded, plain.encode(x, seed=3).decode()), name
        assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors), name


SMALL = {"one element each": (300, 1), "three each": (512, 3), "a batch of one": (1, 700),
         "more than a bucket": (7, 300)}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_bytes_of_small_samples_are_those_of_the_budget(shape: tuple[int, int]) -> None:
    x = normals(shape).float() * torch.logspace(0, 2, shape[0]).unsqueeze(-1)
    packed = PerSampleCodec(Uint2).encode(x, seed=0)
    plain = codec_from(Uint2).encode(x, seed=0)
    # At most one byte per sample, and a padded bucket for each width (of 8 bits, with metadata).
    assert packed.nbytes <= plain.nbytes + shape[0] + len(WIDTHS) * (256 + 8)
    assert (packed.decode() - x).abs().max() <= x.max() - x.min()


def test_samples_within_a_bucket_count_with_what_they_share_it_with() -> None:
    # Each sample is constant, but the buckets that store samples are not.
    x = torch.arange(512.0).unsqueeze(-1)
    assert PerSampleCodec(Uint2).widths(x).tolist() == [2] * 512


def test_constant_samples_share_the_bits() -> None:
    assert PerSampleCodec(Uint2, 3).widths(torch.ones(5, 512)).tolist() == [3] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_bucket_and_cost_no_other_sample_its_bits(bad: float) -> None:
    x = uniform(4, 512, torch.tensor([1.0, 10.0, 100.0, 1.0]))
    codec = PerSampleCodec(Uint2)
    without = codec.widths(torch.cat([x[:3], torch.zeros(1, 512)]))
    x[3, 100] = bad
    assert codec.widths(torch.where(x.isfinite(), x, bad)).tolist()[3] == 1
    decoded = codec.encode(x, seed=0).decode()
    assert decoded[3, :256].isnan().all()
    assert decoded[:3].isfinite().all() and decoded[3, 256:].isfinite().all()
    assert without.tolist()[3] == 1
    x[3] = bad
    assert torch.equal(codec.widths(x), without)


def test_values_near_the_largest_float_count() -> None:
    x = (uniform(2, 256, torch.ones(2)) * 2 - 1) * torch.tensor([[1.0], [3e38]])
    assert PerSampleCodec(Uint2).widths(x).tolist() == [1, 3]


def test_bytes_follow_from_the_seed() -> None:
    x = uniform(8, 512, torch.logspace(0, 2, 8))
    codec = PerSampleCodec(Uint2)
    first, again, other = (codec.encode(x, seed=seed).tensors for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_signed_codes_have_widths_of_their_own() -> None:
    x = uniform(2, 256, torch.tensor([1.0, 100.0]))
    codec = PerSampleCodec(Int4, 4, (2, 4, 6))
    assert codec.widths(x).tolist() == [2, 6]
    # The range of a symmetric quantizer is the largest magnitude.
    assert ((codec.encode(x, seed=0).decode() - x).abs() <= x.amax(1, keepdim=True) / torch.tensor(
        [[1.0], [31.0]]) * (1 + 1e-6)).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles_encode_alike(duplicate: Callable[[Any], Any]) -> None:
    x = uniform(8, 512, torch.logspace(0, 2, 8))
    codec = PerSampleCodec(Uint2)
    packed = codec.encode(x, seed=1)
    assert same_bits(duplicate(codec).encode(x, seed=1).decode(), packed.decode())


@pytest.mark.parametrize(("average", "bits", "widths"), [
    (2, 1, (1, 2, 3, 4, 8)), (2, 4, (4,)), (5, 4, (4, 8)), (3, 2, (2, 3, 4, 8)), (7, 5, (5, 8)),
    (8, 8, (8,))])
def test_at_least_leaves_out_what_is_narrower(
        average: float, bits: int, widths: tuple[int, ...]) -> None:
    codec = PerSampleCodec(Uint2, average, bucket_size=64)
    wider = codec.at_least(bits)
    assert codec.at_least(bits) is wider
    found = wider.candidates if isinstance(wider, PerSampleCodec) else wider.bit_widths
    assert found == widths
    x = torch.zeros(512)
    one = codec_from(Uint2, bucket_size=64, bit_width=widths[0]).encode(x, seed=0).nbytes
    assert wider.stored_nbytes(codec.encode(x, seed=0).layout) == one


def test_a_wrapper_takes_it_and_stores_what_its_report_says() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    x = uniform(256, 64, torch.logspace(0, 2, 256))
    wrapper = QuantBackwardWrapper(
        model, PerSampleCodec(Uint2, bucket_size=64), overrides={"2": PerSampleCodec(Uint2, 3)})
    with track_saved_memory(wrapper) as report:
        output = wrapper(x)
    assert torch.equal(output, model(x))
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Codes, metadata of buckets of 64 (256), and the widths. The input has 2 bits on average, Tanh's
    # derivative 4 for all samples, and the last layer's input, with partly equal ranges, 3.
    sizes = 256 * 64
    least = sizes * (2 + 4 + 3) // 8 + sizes // 64 * 8 * 2 + sizes // 256 * 8
    # Tolerance: one step between candidates, and a padded bucket for each width, in two tensors.
    assert abs(report.stored_bytes - least) <= 2 * (256 + 64 * 4 // 8 + 5 * (256 + 8))


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (Uint2, {"average_bits": 0.5}, ValueError, "1 and 8, got 0.5"),
    (Uint2, {"average_bits": 9}, ValueError, "got 9"),
    (Uint2, {"bit_widths": (2, 2)}, ValueError, "nothing to choose between"),
    (Uint2, {"bit_widths": (0, 2)}, ValueError, "got 0"),
    (Uint2, {"bucket_sise": 64}, ValueError, "did you mean 'bucket_size'"),
    (Int4, {}, ValueError, "1 bits leave no level"),
    (PerTensor, {}, ValueError, "one bucket for all samples"),
    (Mix, {"bit_widths": (2, 3)}, UnsupportedQuantizerError, "without Mix"),
    (Int8ActPerTensorFloat, {"bit_widths": (2, 8)}, UnsupportedQuantizerError, "bucket quantizer"),
    (codec_from(Uint2), {}, TypeError, "config class")]


@pytest.mark.parametrize(("config", "settings", "error", "message"), REFUSED)
def test_what_cannot_be_allocated_is_refused(
        config: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerSampleCodec(config, **settings)
