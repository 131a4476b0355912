"""The general encode works in chunks: the bytes stay the same, and temporaries stay small."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import codec_from, quant, seeded
from brevitas_bp.codec import Codec, general
from brevitas_bp.codec.bucketwise import class_name
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.stats import BucketMinMaxRange
from brevitas_bp.format.random import noise_like, seeded_rows
from brevitas_bp.format.widths import WidthLayout
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMax,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
    StochasticRounding,
)
from tests.codec.test_bucket_codecs import GENERAL
from tests.live_bytes import peak_bytes
from tests.strategies import DTYPES, awkward_tensors, normals
from tests.support import same_bits


class Dithered(nn.Module):
    """A range of each bucket with its own noise, for buckets and for elements."""

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        peak = (x.abs() + noise_like(x).to(x.dtype)).amax(-1, keepdim=True)
        return peak + noise_like(peak).to(x.dtype)


class DitheredConfig(StochasticRounding, PerBucketMax, ActQuantSolver):
    bit_width = 4
    bucket_size = 64
    scaling_stats_impl = Dithered


class AlternateWidths(TwoBitWidthSelector):
    """Mixes other buckets than the library would."""

    bucketwise = True

    def __init__(self, bit_width: int, mix_bit_width: int, mix_prob: float) -> None:
        super().__init__(bit_width, mix_bit_width, mix_prob)

    def draw(self, n: int) -> WidthLayout:
        return WidthLayout(n, n // 2, shift=1)


class AlternateWidthsConfig(ShiftedUint2Mix4DynamicActPerBucketFloatStochastic):
    bit_width_impl = AlternateWidths


class MixPerTensor(ShiftedUint2Mix4DynamicActPerBucketFloatStochastic):
    mix_per = "tensor"


class PowerOfTwo(ShiftedUint4DynamicActPerBucketFloat):
    restrict_scaling_type = "power_of_two"


class AcrossBuckets(nn.Module):
    """One range for all buckets."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().amax().expand(len(x), 1)


class SaysItIsBucketwise(AcrossBuckets):
    bucketwise = True


class SilentSubclass(Dithered):
    pass


class OwnRange(BucketMinMaxRange):
    pass


# Averages use the same quantizers, so they are left out.
CHUNKED = {name: getattr(quant, name) for name in GENERAL if "Avg" not in name} | {
    config.__name__: config
    for config in (DitheredConfig, AlternateWidthsConfig, MixPerTensor, PowerOfTwo)}


def of_modules(config: Any, **overrides: Any) -> ModuleCodec:
    """Returns the general codec of a config, even if the config could be lowered."""
    codec: Any = codec_from(config, **overrides).per_element
    return codec if isinstance(codec, ModuleCodec) else ModuleCodec(codec.quantizer)


def tensors_of(codec: Codec, x: Tensor, seed: int) -> list[Tensor]:
    packed = codec.encode(x, seed=seed)
    return [*packed.tensors, packed.decode()]


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.float32) for name in CHUNKED),
    *((name, dtype) for name in [*CHUNKED][-6:] for dtype in DTYPES if dtype != torch.float32)])
def test_chunks_give_the_same_bytes(
        name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = of_modules(CHUNKED[name], bucket_size=64)
    assert codec.bucketwise
    for case, x in awkward_tensors(dtype).items():
        for seed in range(len(codec.bit_widths)):
            with monkeypatch.context() as context:
                expected = tensors_of(codec, x, seed)
                # Three buckets at a time, and a remainder.
                context.setattr(general, "_CHUNK", 3 * 64)
                assert all(map(same_bits, expected, tensors_of(codec, x, seed))), (case, seed)


def test_noise_that_begins_anew_in_each_chunk_would_be_noticed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    # Positive control.
    codec = of_modules(DitheredConfig)
    x = normals((1000,)).float()
    expected = tensors_of(codec, x, 0)
    monkeypatch.setattr(general, "_CHUNK", 3 * 64)
    monkeypatch.setattr(general, "seeded_rows", lambda seed, rows: seeded(seed))
    assert not same_bits(expected[0], tensors_of(codec, x, 0)[0])


def with_statistic(statistic: type[nn.Module]) -> ModuleCodec:
    return of_modules(quant.Int4DynamicActPerBucketFloatStochastic, scaling_stats_impl=statistic)


def test_a_part_that_looks_across_buckets_is_given_all_of_them(
        monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals((4000,)).float()
    honest, careless = with_statistic(AcrossBuckets), with_statistic(SaysItIsBucketwise)
    expected = tensors_of(honest, x, 0)
    assert all(map(same_bits, expected, tensors_of(careless, x, 0)))
    monkeypatch.setattr(general, "_CHUNK", 512)
    assert all(map(same_bits, expected, tensors_of(honest, x, 0)))
    # Positive control: this range computes another value in chunks.
    assert not same_bits(expected[1], tensors_of(careless, x, 0)[1])


@pytest.mark.parametrize("statistic", [AcrossBuckets, SilentSubclass])
def test_a_class_has_to_say_that_it_is_bucketwise_itself(statistic: type[nn.Module]) -> None:
    assert with_statistic(Dithered).bucketwise
    assert not with_statistic(statistic).bucketwise


def test_a_subclass_of_a_known_part_has_to_say_so_too() -> None:
    config = ShiftedUint4DynamicActPerBucketFloatStochastic
    assert not of_modules(config, scaling_stats_impl=OwnRange).bucketwise
    assert not of_modules(config, bucket_size=None).bucketwise


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_a_scripted_part_is_known_by_its_class() -> None:
    plain = [nn.ReLU(), nn.ReLU(inplace=True)]
    scripted = [torch.jit.script(part) for part in plain]
    assert len({part._c._type().qualified_name() for part in scripted}) == 2
    assert {class_name(part) for part in (*plain, *scripted)} == {
        "torch.nn.modules.activation.ReLU"}


def test_a_part_within_a_part_counts() -> None:
    codec = with_statistic(Dithered)
    scaling: Any = codec.quantizer.scaling_impl
    scaling.restrict_scaling_impl = nn.Sequential(AcrossBuckets())
    assert not ModuleCodec(codec.quantizer).bucketwise


def test_noise_that_is_not_of_buckets_is_refused() -> None:
    with seeded_rows(0, slice(2, 4)), pytest.raises(ValueError, match="expected noise"):
        noise_like(torch.zeros(5))


MIXED = ShiftedUint2Mix4DynamicActPerBucketFloatStochastic
PEAKS = {
    "one width": (ShiftedUint4DynamicActPerBucketFloatStochastic, {}),
    "two widths": (MIXED, {}),
    "padded": (ShiftedUint4DynamicActPerBucketFloatStochastic, {"bucket_size": 24}),
    "own part": (DitheredConfig, {"bucket_size": 256})}


@pytest.mark.parametrize("name", PEAKS)
def test_temporaries_are_a_few_percent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, overrides = PEAKS[name]
    codec = of_modules(config, **overrides)
    # 128 chunks.
    monkeypatch.setattr(general, "_CHUNK", 1 << 13)
    x = normals((1 << 20,)).float()[:-1]

    def shares() -> tuple[float, float]:
        packed = codec.encode(x, seed=1)
        encode = peak_bytes(lambda: codec.encode(x, seed=1)) - packed.nbytes
        decode = peak_bytes(packed.decode) - x.nbytes
        return encode / x.nbytes, decode / x.nbytes

    # In units of a chunk: running modules hold up to ten tensors of its size. Metadata exist twice, once
    # before the cast to their dtype: 8 bytes per bucket of 24 elements or more.
    bound = 10 / 128 + 2 * 8 / (4 * overrides.get("bucket_size", 256))
    assert max(shares()) < bound
    # Positive control: all buckets at once.
    codec.bucketwise = False
    encode, decode = shares()
    assert encode > 3 and decode > 1
