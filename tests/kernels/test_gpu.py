"""The Triton kernels give the reference's bytes: interpreted, compiled without a device, and on one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp import codec_from, quant
from brevitas_bp.activations.derivatives import derivative
from brevitas_bp.format import arithmetic, reference
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.rotation import hadamard
from brevitas_bp.format.spec import BucketQuantSpec, is_rotatable
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    UNBIASED,
    UNSIGNED,
    ZERO_IN_RANGE,
    ScaleRule,
)
from brevitas_bp.kernels import dispatch
from brevitas_bp.kernels.launchers import Launcher, StepwiseLauncher
from tests.kernels.gpu_worker import Compiled, Interpreted, Worker, compile_kernels
from tests.kernels.table import DTYPES, SPECS, UNIT_SPECS, check, joined, same_bytes, samples
from tests.strategies import VALUES, dtype_name, float_tensors, normals, seeds, specs
from tests.support import same_bits, stage_name

pytest.importorskip("triton")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
MIXED = BucketQuantSpec(3, 24, mix_bit_width=6, mix_prob=0.3)
# The second width has a table of levels in memory.
ROTATED_MIX = BucketQuantSpec(
    2, 64, CENTRED, NORMAL, NEAREST, mix_bit_width=5, mix_prob=0.3, transform=ROTATED_TWICE,
    metadata_dtype=torch.bfloat16)


# Rows that do and do not fill their buckets: (bucket_size, row_size, rows). Most need several programs.
ROWS = [
    (8, 1, 600), (8, 40, 14), (16, 1, 300), (24, 17, 140), (56, 49, 70), (64, 49, 70), (104, 1001, 2),
    (256, 300, 12)]
# Cases of NUMEL elements: (statistics, elements of each in a run, bucket_size, row_size).
NUMEL = 2520
STATISTICS = {
    "one for all": (1, NUMEL, 256, None),
    "one in a bucket": (7, 120, 40, None),
    "one in a row": (5, 252, 24, 42),
    "one in several rows": (4, 90, 24, 45),
    "channels last": (360, 1, 24, None),
    "few channels last": (7, 1, 24, None),
    "channels last in rows": (7, 1, 24, 21),
    "several in a bucket": (3, 5, 104, None),
    "several in a bucket of a row": (14, 9, 104, 60),
    "a run over several buckets": (2, 315, 56, 180),
    "one in a row of powers of two": (5, 252, 32, 42),
    "several in powers of two": (7, 3, 64, None),
    "several in a row of powers of two": (7, 1, 16, 21)}


def row_specs(bucket_size: int | None, row_size: int | None) -> list[BucketQuantSpec]:
    """Returns one quantizer of each scale rule; with two rotated quantizers, if the size allows them."""
    specs = [
        BucketQuantSpec(3, bucket_size, row_size=row_size),
        BucketQuantSpec(5, bucket_size, MAX, NARROW, NEAREST, row_size=row_size),
        BucketQuantSpec(
            2, bucket_size, L2, NARROW, mix_bit_width=4, mix_prob=0.4, row_size=row_size),
        BucketQuantSpec(4, bucket_size, CENTRED, NORMAL, NEAREST, row_size=row_size)]
    if is_rotatable(bucket_size):
        specs += [
            replace(ROTATED_MIX, bucket_size=bucket_size, row_size=row_size),
            BucketQuantSpec(
                3, bucket_size, rounding=DITHERED, row_size=row_size, transform=ROTATED)]
    return specs


def normalized_cases(name: str) -> list[tuple[Tensor, BucketQuantSpec, Affine]]:
    """Returns cases of one of ``STATISTICS``, with and without shifts; rules and dtypes vary by name."""
    kinds, inner, size, row = STATISTICS[name]
    number, specs = list(STATISTICS).index(name), row_specs(size, row)
    chosen = [specs[(number // 3 + i) % 3] for i in range(2)] + specs[3:]
    return [
        (joined(DTYPES[(number + i) % 3], NUMEL), spec, statistics(kinds, inner, shifted=i % 2 == 0))
        for i, spec in enumerate(chosen)]


class Normalizing(Protocol):
    """A ``table.Form`` with kernels that normalize."""

    def encode(
        self, flat: Tensor, spec: BucketQuantSpec, seed: int,
        affine: Affine | None = None) -> Encoded: ...

    def decode(
        self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int, dtype: torch.dtype,
        affine: Affine | None = None) -> Tensor: ...


def statistics(kinds: int, inner: int, shifted: bool) -> Affine:
    shift = normals((kinds,), 1).float() if shifted else None
    return Affine(normals((kinds,), 2).float() * 3, shift, inner)


def normalized_reference(spec: BucketQuantSpec, x: Tensor) -> Launcher:
    """Returns rows and normalization in torch operations."""
    return StepwiseLauncher(reference, spec, x.numel(), x.dtype, derivative)


def check_normalized(form: Normalizing, x: Tensor, spec: BucketQuantSpec, affine: Affine) -> None:
    """Runs ``table.check`` for a normalized tensor."""
    oracle = normalized_reference(spec, x)
    expected, got = oracle.encode(x, 3, affine=affine), form.encode(x, spec, 3, affine)
    for name, a, b in zip(("payload", "metadata"), expected, got.tensors):
        assert same_bytes(a, b), (name, spec)
    values = oracle.decode(*expected, 3, x.shape, x.stride(), affine)
    decoded = form.decode(Encoded(*expected, spec.affine), spec, 3, x.numel(), x.dtype, affine)
    assert same_bits(values, decoded), ("values", spec)


# In the interpreter.


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    worker = Interpreted()
    yield worker
    worker.close()


@pytest.mark.parametrize("part", range(3))
def test_interpreted_bytes_equal_the_reference(interpreted: Interpreted, part: int) -> None:
    # The interpreter is slow, and dtypes differ in conversions only: each spec runs with one dtype.
    x = joined(DTYPES[part], 2311)
    for spec in SPECS[part::3]:
        check(interpreted, x, spec)


@pytest.mark.parametrize("part", range(3))
def test_interpreted_levels_rotations_and_dither_equal_the_reference(
        interpreted: Interpreted, part: int) -> None:
    x = joined(DTYPES[part], 2311)
    for spec in UNIT_SPECS[part::15]:
        check(interpreted, x, spec)


@each_dtype
@pytest.mark.parametrize("name", ["one", "seven", "whole", "broken"])
def test_interpreted_lengths(interpreted: Interpreted, name: str, dtype: torch.dtype) -> None:
    # "whole" fills programs to the last element; the other cases leave tails.
    check(interpreted, samples(dtype)[name], BucketQuantSpec(5, 256))
    check(interpreted, samples(dtype)[name], replace(ROTATED_MIX, bucket_size=256))


@pytest.mark.parametrize("numel", [3071, 3072, 3073, 7000])
@pytest.mark.parametrize(
    "spec", [BucketQuantSpec(4, 24, L2, NARROW), MIXED, ROTATED_MIX], ids=["l2", "mix", "rotated mix"])
def test_interpreted_tensors_of_several_programs(
        interpreted: Interpreted, spec: BucketQuantSpec, numel: int) -> None:
    check(interpreted, joined(torch.float32, numel), spec)


@pytest.mark.parametrize("size", [8, 16, 40, 104, 192, 1000, 1024, 8192, 16384, 65528, 65536])
@pytest.mark.parametrize("rule", [MIN_MAX, MAX, L2], ids=stage_name)
def test_interpreted_bucket_sizes(interpreted: Interpreted, size: int, rule: ScaleRule) -> None:
    code_range = NARROW if rule.signed else UNSIGNED
    # Do not use all values: norms of a tensor with large and broken values would be equal by chance.
    check(interpreted, normals((2100,)).float(), BucketQuantSpec(7, size, rule, code_range))


# Sizes of rotated buckets, and of other buckets that are coded by levels.
POWERS, OTHER_SIZES = (16, 32, 128, 512, 1024, 4096, 16384), (8, 40, 1000, 2040)


def sized_specs(size: int) -> list[BucketQuantSpec]:
    """Returns quantizers in units with buckets of one size."""
    plain = [
        BucketQuantSpec(7, size, CENTRED, NORMAL, NEAREST),
        BucketQuantSpec(2, size, UNBIASED, NORMAL, NEAREST, metadata_dtype=torch.bfloat16)]
    if not is_rotatable(size):
        return plain
    return [replace(spec, transform=ROTATED_TWICE) for spec in plain] + [
        BucketQuantSpec(3, size, rounding=DITHERED, transform=ROTATED)]


@pytest.mark.parametrize("size", (*POWERS, *OTHER_SIZES))
def test_interpreted_bucket_sizes_in_units(interpreted: Interpreted, size: int) -> None:
    for spec in sized_specs(size):
        check(interpreted, normals((6000,)).float(), spec)


def test_another_order_of_sums_gives_other_bits() -> None:
    # Positive control: the data above tell one order from another.
    x = normals((6000,)).float()[:5888].view(-1, 128)
    assert (x.flip(-1).cumsum(-1)[:, -1:] != arithmetic.tree_sum(x)).any()
    # Strides 64, 32, ... in place of 1, 2, ...
    backwards = [int(f"{i:07b}"[::-1], 2) for i in range(128)]
    assert (hadamard(x[:, backwards])[:, backwards] != hadamard(x)).any()


def norms_on_the_edge(size: int) -> Tensor:
    """Returns buckets [20000, size] whose norms lie within a few float64 spacings of a float32 tie.

    Two elements make the tie: ``(k + 1/2)**2 = k**2 + odd**2 / 4`` with ``k = (odd**2 - 1) / 4``, times
    ``2**-23``. The other elements are less than a float64 spacing each. Some of them are lost, depending
    on the order of the sum.
    """
    generator = torch.Generator().manual_seed(0)
    n, odd = 20_000, 5801
    present = torch.rand((n, size), generator=generator) < torch.rand((n, 1), generator=generator) / 2
    x = present * (0.6 * 2.0**-26)
    places = torch.rand((n, size), generator=generator).argsort()[:, :2]
    tie = torch.tensor([(odd**2 - 1) / 4 * 2.0**-23, odd * 2.0**-24])
    return x.scatter_(1, places, tie.expand(n, 2).contiguous())


def swapped_norm(x: Tensor) -> Tensor:
    """Computes ``arithmetic.l2_norm`` with its first two halvings in the wrong order."""
    eighths = x.view(x.shape[0], 8, -1)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    return arithmetic.l2_norm(eighths[:, order].reshape(x.shape))


def shuffled_norm(x: Tensor) -> Tensor:
    """Computes ``arithmetic.l2_norm`` with other partners within an eighth."""
    eighths = x.view(x.shape[0], 8, -1)
    parts = torch.cat([eighths[..., ::2], eighths[..., 1::2]], -1)
    return arithmetic.l2_norm(parts.reshape(x.shape))


@pytest.mark.parametrize("size", [40, 64])
def test_interpreted_norms_are_summed_in_order(interpreted: Interpreted, size: int) -> None:
    x = norms_on_the_edge(size)
    expected = arithmetic.l2_norm(x)
    for other in (swapped_norm, shuffled_norm):
        # Positive control: random data would not tell one order from another.
        telling = x[(other(x) != expected).view(-1)][:50]
        assert len(telling) >= 5
        check(interpreted, telling.view(-1), BucketQuantSpec(2, size, L2, NARROW))


@given(float_tensors(DTYPES, tuple(VALUES)), specs(), seeds)
def test_interpreted_bytes_of_any_tensor(
        interpreted: Interpreted, x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    if spec.bucket_size is not None:
        check(interpreted, x.reshape(-1)[:5000].contiguous(), spec, seed)


@given(float_tensors(DTYPES, tuple(VALUES)), st.sampled_from(UNIT_SPECS), seeds)
def test_interpreted_levels_rotations_and_dither_of_any_tensor(
        interpreted: Interpreted, x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    check(interpreted, x.reshape(-1)[:2000].contiguous(), spec, seed)


def test_another_seed_gives_other_bytes(interpreted: Interpreted) -> None:
    # Positive control.
    x, spec = normals((300,)).float(), BucketQuantSpec(2, 24)
    expected, got = reference.encode(x, spec, 1), interpreted.encode(x, spec, 2)
    assert same_bytes(expected.scale, got.scale)
    assert not same_bytes(expected.payload, got.payload)
    # The scale of levels is rounded at random, and a rotation is random.
    plain = BucketQuantSpec(2, 16, UNBIASED, NORMAL, NEAREST, metadata_dtype=torch.bfloat16)
    for spec, same in ((plain, True), (replace(plain, transform=ROTATED), False)):
        expected, got = reference.encode(x, spec, 1), interpreted.encode(x, spec, 2)
        assert not same_bytes(expected.scale, got.scale)
        assert same_bytes(expected.payload, got.payload) is same


def test_empty_tensors_launch_nothing(interpreted: Interpreted) -> None:
    check(interpreted, torch.empty(0), MIXED)


@pytest.mark.parametrize("size, row, rows", ROWS)
def test_interpreted_buckets_end_with_rows(
        interpreted: Interpreted, size: int, row: int, rows: int) -> None:
    for number, spec in enumerate(row_specs(size, row)):
        check(interpreted, joined(DTYPES[number % 3], rows * row), spec)


@pytest.mark.parametrize("name", STATISTICS)
def test_interpreted_tensors_are_normalized(interpreted: Interpreted, name: str) -> None:
    for case in normalized_cases(name):
        check_normalized(interpreted, *case)


def test_only_the_end_of_a_long_period_matters(interpreted: Interpreted) -> None:
    # Several programs, each shorter than a period.
    x, (spec, *_) = joined(torch.float32, 6600), row_specs(24, None)
    long_rows = replace(spec, row_size=3300)
    cases = [statistics(2, 3300, True), statistics(6600, 1, True)]
    with interpreted.constant("_LONG", 3100):
        for affine in cases:
            check_normalized(interpreted, x, spec, affine)
    with interpreted.constant("_LONG", 130):
        check(interpreted, x, long_rows)
    # Positive control: a slice that reaches further.
    with interpreted.constant("_LONG", 2):
        for case, affine in ((spec, cases[0]), (spec, cases[1]), (long_rows, None)):
            expected = normalized_reference(case, x).encode(x, 3, affine=affine)
            assert not same_bytes(expected[0], interpreted.encode(x, case, 3, affine).payload)


def test_another_padding_or_statistic_gives_other_bytes(interpreted: Interpreted) -> None:
    # Positive controls.
    x = normals((NUMEL,)).float()
    for spec in row_specs(24, 42):
        affine, got = statistics(4, 7, True), interpreted.encode(x, spec, 3)
        padded = reference.pad_rows(x, 42, 24, not spec.pads_with_zero)
        other = reference.encode(padded, reference.without_rows(spec), 3)
        assert not same_bytes(other.payload, got.payload)
        expected, _ = normalized_reference(spec, x).encode(x, 3, affine=affine)
        for wrong in (
                affine._replace(inner=1), affine._replace(shift=None),
                affine._replace(scale=affine.scale.roll(1))):
            assert not same_bytes(expected, interpreted.encode(x, spec, 3, wrong).payload)


# Compiled for devices that are not present: this shows what the interpreter cannot see.


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    yield worker
    worker.close()


COMPILED = {
    "2 bits": (torch.float32, BucketQuantSpec(2, 256)),
    "bfloat16": (torch.bfloat16, BucketQuantSpec(3, 512, metadata_dtype=torch.bfloat16)),
    "integer zero point": (torch.float16, BucketQuantSpec(4, 64, integer_zero_point=True)),
    "zero in range": (torch.float32, BucketQuantSpec(4, 64, ZERO_IN_RANGE)),
    "nearest": (torch.float32, BucketQuantSpec(8, 1024, MAX, NARROW, NEAREST)),
    "two widths": (torch.float32, BucketQuantSpec(2, 256, mix_bit_width=4, mix_prob=0.5)),
    "norm": (torch.float32, BucketQuantSpec(4, 256, L2, NARROW)),
    "norm of an odd size": (torch.bfloat16, BucketQuantSpec(4, 40, L2, NARROW)),
    "smallest": (torch.float32, BucketQuantSpec(1, 8)),
    "largest": (torch.float32, BucketQuantSpec(2, 1 << 16)),
    "rows of one statistic": (torch.bfloat16, BucketQuantSpec(2, 56, row_size=50)),
    "rows of several": (torch.float32, BucketQuantSpec(2, 56, row_size=50)),
    "several statistics": (torch.float32, BucketQuantSpec(2, 256, MAX, NARROW)),
    "dithered": (torch.float32, BucketQuantSpec(4, 256, rounding=DITHERED)),
    "rotated": (
        torch.float32, BucketQuantSpec(2, 256, CENTRED, NORMAL, NEAREST, transform=ROTATED_TWICE)),
    "rotated, two widths": (torch.float32, ROTATED_MIX),
    "rotated, dithered": (
        torch.float16, BucketQuantSpec(3, 4096, rounding=DITHERED, transform=ROTATED)),
    "rows of levels": (
        torch.bfloat16, BucketQuantSpec(4, 56, UNBIASED, NORMAL, NEAREST, row_size=50))}
# (statistics, elements of each in a run, whether there are shifts).
COMPILED_STATISTICS = {
    "rows of one statistic": (10, 100, False),
    "rows of several": (5, 10, True),
    "rows of levels": (5, 10, True),
    "several statistics": (50, 1, True)}


def compiled(
        compiler: Worker, name: str, capability: int = 90,
        calls: list[tuple[int, int]] | None = None) -> list[Compiled]:
    """Compiles the kernels of one of ``COMPILED``."""
    affine = statistics(*COMPILED_STATISTICS[name]) if name in COMPILED_STATISTICS else None
    return compiler.run(compile_kernels, capability, *COMPILED[name], calls or [(5000, 1)], affine)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_arithmetic_is_exact(compiler: Worker, name: str) -> None:
    kernels, units = compiled(compiler, name), "_in_units" * COMPILED[name][1].works_in_units
    assert [kernel.name for kernel in kernels] == [f"encode{units}_kernel", f"decode{units}_kernel"]
    assert [kernel.inexact for kernel in kernels] == [set(), set()]
    assert kernels[0].operations(r"div\.rn\.f32")
    # A plain max would leave a NaN out of a range. numpy's maximum cannot show this.
    assert kernels[0].operations(r"max\.NaN\.f32")


@pytest.mark.parametrize(
    "capability, name",
    [(80, "bfloat16"), (86, "bfloat16"), (100, "bfloat16"), (80, "rows of several"),
     (100, "rows of one statistic"), (80, "rotated, dithered")])
def test_kernels_compile_for_other_devices(
        compiler: Worker, capability: int, name: str) -> None:
    kernels = compiled(compiler, name, capability)
    assert [kernel.inexact for kernel in kernels] == [set(), set()]


def test_fused_arithmetic_would_be_seen(compiler: Worker) -> None:
    # Positive control.
    kernels = compiler.run(fused)
    assert any(kernel.inexact for kernel in kernels)


def fused() -> list[Compiled]:
    """Compiles kernels with Triton's defaults; runs in the worker."""
    return compile_kernels(90, *COMPILED["2 bits"], [(5000, 1)], enable_fp_fusion=True)


@pytest.mark.parametrize("name", ["2 bits", "rotated"])
def test_memory_is_accessed_by_vectors(compiler: Worker, name: str) -> None:
    encode, decode = compiled(compiler, name, calls=[(1 << 16, 1)])
    assert any(".v4" in name for name in encode.operations(r"ld\.global"))
    assert any(".v4" in name for name in decode.operations(r"st\.global"))
    # Packed codes are stored four bytes at a time.
    assert not encode.operations(r"st\.global\S*b8")
    assert not decode.operations(r"ld\.global\S*b8")


def test_rotations_stay_in_registers(compiler: Worker) -> None:
    _, decode = compiled(compiler, "rotated")
    assert decode.operations(r"shfl\.sync\.bfly")
    assert not decode.operations(r"(?:ld|st)\.(?:shared|local)")
    # Positive control: a bucket of several warps.
    _, decode = compiled(compiler, "rotated, dithered")
    assert decode.operations(r"(?:ld|st)\.shared")


@pytest.mark.parametrize("spec", [MIXED, ROTATED_MIX], ids=["min max", "rotated"])
def test_lengths_and_seeds_share_one_kernel(compiler: Worker, spec: BucketQuantSpec) -> None:
    calls = [(1, 0), (16, 1), (1000, 2), (4096, 3), (100_000, 2**64 - 1)]
    kernels = compiler.run(compile_kernels, 90, torch.float32, spec, calls)
    assert len(kernels) == 2 * len(calls)
    assert len({kernel.key for kernel in kernels}) == 2


def test_rows_and_statistics_of_all_lengths_share_one_kernel(compiler: Worker) -> None:
    dtype, spec = COMPILED["rows of several"]
    found = set()
    for row, kinds, inner in ((50, 5, 10), (16, 1000, 1)):
        kernels = compiler.run(
            compile_kernels, 90, dtype, replace(spec, row_size=row), [(48_000, 1)],
            statistics(kinds, inner, True))
        found |= {kernel.key for kernel in kernels}
    assert len(found) == 2


# The kernels that serve a tensor.


def test_double_and_whole_tensors_go_to_the_reference() -> None:
    from brevitas_bp.kernels.gpu import launch as gpu

    assert not gpu.covers(BucketQuantSpec(), 1000, torch.float64)
    assert not gpu.covers(BucketQuantSpec(bucket_size=None), 1000, torch.float32)
    assert not gpu.covers(BucketQuantSpec(bucket_size=(1 << 16) + 8), 1000, torch.float32)
    assert gpu.covers(BucketQuantSpec(), 1000, torch.bfloat16)


def test_levels_rotations_and_dither_have_kernels() -> None:
    from brevitas_bp.kernels.gpu import launch as gpu

    for spec in UNIT_SPECS:
        assert gpu.covers(spec, 1000, torch.float32)
        assert not gpu.covers(spec, 1000, torch.float64)
    for size in (POWERS[-1], OTHER_SIZES[-1]):
        for spec in sized_specs(size):
            assert gpu.covers(spec, 1000, torch.float32)
            larger = replace(spec, bucket_size=2 * size)
            assert not gpu.covers(larger, 1000, torch.float32)


def test_plans_of_a_device_are_those_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from brevitas_bp.kernels.gpu import launch as gpu

    monkeypatch.setattr(dispatch, "_triton_works", lambda: True)
    device, spec = torch.device("cuda"), BucketQuantSpec(2, 56, row_size=49)
    assert isinstance(dispatch.launcher(spec, 490, torch.float32, device), gpu.Launcher)
    assert isinstance(dispatch.launcher(spec, 490, torch.float64, device), StepwiseLauncher)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_one_hint() -> None:
    dispatch._triton_works.cache_clear()
    device = torch.device("cuda")
    with pytest.warns(UserWarning, match="Triton kernels cannot run"):
        assert dispatch.backend(device, BucketQuantSpec(), 1000, torch.float32) is reference
    assert dispatch.backend(device, BucketQuantSpec(), 1000, torch.float32) is reference


# On a device.


class OnDevice:
    """The kernels on a CUDA device, with CPU tensors as input and output."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    def encode(
            self, flat: Tensor, spec: BucketQuantSpec, seed: int,
            affine: Affine | None = None) -> Encoded:
        plan = kernels().launcher(spec, flat.numel(), flat.dtype)
        payload, metadata = plan.encode(flat.to(self._device), seed, affine=self._moved(affine))
        return moved(Encoded(payload, metadata, spec.affine), "cpu")

    def decode(
            self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
            dtype: torch.dtype, affine: Affine | None = None) -> Tensor:
        plan = kernels().launcher(spec, numel, dtype)
        stored = moved(encoded, self._device).tensors
        return plan.decode(
            *stored, seed, torch.Size((numel,)), (1,), self._moved(affine)).cpu()

    def _moved(self, affine: Affine | None) -> Affine | None:
        if affine is None:
            return None
        shift = None if affine.shift is None else affine.shift.to(self._device)
        return Affine(affine.scale.to(self._device), shift, affine.inner)


def kernels() -> dispatch.ModuleType:
    """Returns the kernels that serve CUDA tensors."""
    form = dispatch.backend(torch.device("cuda"), BucketQuantSpec(), 1000, torch.float32)
    assert form.__name__ == "brevitas_bp.kernels.gpu.launch"
    return form


def moved(encoded: Encoded, device: str) -> Encoded:
    payload, metadata = (t.to(device) for t in encoded.tensors)
    return Encoded(payload, metadata, encoded.affine)


def gpu_test(function: object) -> object:
    """Marks a test that needs a device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(function))


@gpu_test
@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_device_bytes_equal_the_reference(part: int) -> None:
    # Compiling takes most of the time, so each spec runs with one of the dtypes.
    dtype = DTYPES[part]
    x, tail = joined(dtype, 20_000), samples(dtype)["seven"]
    for spec in SPECS[part::3]:
        check(OnDevice(), x, spec)
        check(OnDevice(), tail, spec)


@gpu_test
@each_dtype
def test_device_bytes_of_levels_rotations_and_dither(dtype: torch.dtype) -> None:
    x, tail = joined(dtype, 20_000), samples(dtype)["seven"]
    for spec in UNIT_SPECS[::5]:
        check(OnDevice(), x, spec)
        check(OnDevice(), tail, spec)


@gpu_test
@each_dtype
def test_device_bytes_of_all_values(dtype: torch.dtype) -> None:
    for x in samples(dtype).values():
        for spec in (BucketQuantSpec(5, 256), MIXED, BucketQuantSpec(4, 24, L2, NARROW), ROTATED_MIX):
            check(OnDevice(), x, spec)


@gpu_test
@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 40, 104, 192, 1000, 1024, 8192, 16384, 65528, 65536])
@pytest.mark.parametrize("rule", [MIN_MAX, MAX, L2], ids=stage_name)
def test_device_bucket_sizes(size: int, rule: ScaleRule) -> None:
    code_range = NARROW if rule.signed else UNSIGNED
    check(OnDevice(), normals((200_000,)).float(), BucketQuantSpec(7, size, rule, code_range))


@gpu_test
@pytest.mark.slow
@pytest.mark.parametrize("size", (*POWERS, *OTHER_SIZES))
def test_device_bucket_sizes_in_units(size: int) -> None:
    for spec in sized_specs(size):
        check(OnDevice(), normals((200_000,)).float(), spec)


@gpu_test
@pytest.mark.slow
@pytest.mark.parametrize("size, row, rows", ROWS)
def test_device_buckets_end_with_rows(size: int, row: int, rows: int) -> None:
    for number, spec in enumerate(row_specs(size, row)):
        check(OnDevice(), joined(DTYPES[number % 3], 100 * rows * row), spec)


@gpu_test
@pytest.mark.slow
@pytest.mark.parametrize("name", STATISTICS)
def test_device_tensors_are_normalized(name: str) -> None:
    for x, spec, affine in normalized_cases(name):
        check_normalized(OnDevice(), x, spec, affine)
        check_normalized(OnDevice(), x.repeat(100), spec, affine)


@gpu_test
@pytest.mark.parametrize("size", [40, 64])
def test_device_norms_are_summed_in_order(size: int) -> None:
    x = norms_on_the_edge(size).view(-1)
    check(OnDevice(), x, BucketQuantSpec(2, size, L2, NARROW))


@gpu_test
def test_every_half_float_decodes_and_encodes_alike() -> None:
    every = torch.arange(1 << 16).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        check(OnDevice(), x, BucketQuantSpec(8, 8))
        # Mix negative numbers with positive ones, so that ranges are wide.
        order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
        check(OnDevice(), x[order], BucketQuantSpec(8, 8))


@gpu_test
def test_a_view_at_an_odd_offset() -> None:
    x = normals((10_001,)).float().cuda()
    got = kernels().encode(x[1:], BucketQuantSpec(), 3)
    expected = reference.encode(x[1:].cpu(), BucketQuantSpec(), 3)
    assert all(map(same_bytes, expected.tensors, moved(got, "cpu").tensors))


@gpu_test
@pytest.mark.slow
def test_tensors_of_more_than_2_31_elements() -> None:
    numel = (1 << 31) + 5000
    if torch.cuda.mem_get_info()[0] < 16 * numel:
        pytest.skip("needs 32 GiB of device memory")
    spec = BucketQuantSpec(8, 256)
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    x[-10_000:] = torch.randn(10_000, device="cuda")
    expected, got = reference.encode(x, spec, 3), kernels().encode(x, spec, 3)
    assert torch.equal(expected.payload, got.payload)
    assert torch.equal(expected.scale, got.scale)
    decoded = kernels().decode(got, spec, 3, numel, x.dtype)
    assert torch.equal(decoded[-10_240:], reference.decode(got, spec, 3, numel, x.dtype)[-10_240:])


@gpu_test
def test_nothing_synchronises() -> None:
    x = normals((10_000,)).float().cuda()
    affine = Affine(x[:100].clone(), x[100:200].clone(), 1)
    cases = [
        (BucketQuantSpec(), None), (MIXED, None), (BucketQuantSpec(2, 56, row_size=50), affine),
        (ROTATED_MIX, affine)]
    for spec, normalizing in cases:
        plan = kernels().launcher(spec, x.numel(), x.dtype)
        stored = plan.encode(x, 3, affine=normalizing)
        plan.decode(*stored, 3, x.shape, x.stride(), normalizing)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stored = plan.encode(x, 4, affine=normalizing)
            plan.decode(*stored, 4, x.shape, x.stride(), normalizing)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@gpu_test
def test_kernels_run_on_the_current_stream() -> None:
    x = normals((1 << 20,)).float().cuda()
    spec = BucketQuantSpec()
    expected = reference.encode(2 * x.cpu(), spec, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel on another stream would overtake the delay and read unwritten memory.
        torch.cuda._sleep(100_000_000)
        got = kernels().encode(2 * x, spec, 3)
        decoded = kernels().decode(got, spec, 3, x.numel(), x.dtype)
    stream.synchronize()
    assert all(map(same_bytes, expected.tensors, moved(got, "cpu").tensors))
    assert same_bits(reference.decode(expected, spec, 3, x.numel(), x.dtype), decoded.cpu())


@gpu_test
def test_kernels_run_on_the_device_of_the_tensor() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with torch.cuda.device(0):
        check(OnDevice("cuda:1"), joined(torch.float32, 5000), MIXED)


@gpu_test
@pytest.mark.parametrize("spec", [MIXED, ROTATED_MIX], ids=["min max", "rotated"])
def test_kernels_can_be_captured_in_a_graph(spec: BucketQuantSpec) -> None:
    x = normals((10_000,)).float().cuda()
    # The first call of a kernel loads it, and loading is not allowed in a capture.
    kernels().decode(kernels().encode(x, spec, 3), spec, 3, x.numel(), x.dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels().encode(x, spec, 3)
        decoded = kernels().decode(got, spec, 3, x.numel(), x.dtype)
    fresh = normals((10_000,), 1).float()
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    expected = reference.encode(fresh, spec, 3)
    assert all(map(same_bytes, expected.tensors, moved(got, "cpu").tensors))
    assert same_bits(reference.decode(expected, spec, 3, x.numel(), x.dtype), decoded.cpu())


@gpu_test
def test_the_codec_uses_them() -> None:
    x = normals((3, 5, 7, 11)).float()
    codec = codec_from(quant.ShiftedUint2Mix4DynamicActPerBucketFloatStochastic)
    here, there = (codec.encode(t, seed=3) for t in (x, x.cuda()))
    assert all(same_bytes(a, b.cpu()) for a, b in zip(here.tensors, there.tensors))
    assert same_bits(here.decode(), there.decode().cpu())
