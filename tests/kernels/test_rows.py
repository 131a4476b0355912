"""Buckets that end with rows, and normalized input: compiled kernels store the reference's bytes."""

from itertools import product

import pytest
import torch
from torch import Tensor

from brevitas_bp.activations.derivatives import derivative
from brevitas_bp.format import reference
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.normalizing import Affine, denormalize, normalize
from brevitas_bp.format.spec import BucketQuantSpec, row_bucket
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    L2,
    MAX,
    NARROW,
    NEAREST,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
)
from brevitas_bp.kernels import dispatch
from brevitas_bp.kernels.launchers import StepwiseLauncher
from tests.kernels.table import same_bytes
from tests.strategies import DTYPES, dtype_name
from tests.support import same_bits

cpu = pytest.importorskip("brevitas_bp.kernels.cpu.launch")

LENGTHS = (1, 17, 49, 192, 300)
SPECS = [
    BucketQuantSpec(2, 256), BucketQuantSpec(3, 256, metadata_dtype=torch.bfloat16),
    BucketQuantSpec(4, 64, MAX, NARROW), BucketQuantSpec(2, 256, L2, NARROW),
    BucketQuantSpec(2, 128, rounding=NEAREST, mix_bit_width=4, mix_prob=0.4),
    BucketQuantSpec(2, 256, CENTRED, NORMAL, NEAREST, transform=ROTATED_TWICE),
    BucketQuantSpec(
        1, 64, CENTRED, NORMAL, NEAREST, metadata_dtype=torch.bfloat16, mix_bit_width=3, mix_prob=0.4,
        transform=ROTATED_TWICE),
    BucketQuantSpec(3, 128, rounding=DITHERED, metadata_dtype=torch.bfloat16, transform=ROTATED),
    BucketQuantSpec(4, 256, rounding=DITHERED)]


def _values(numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator, dtype=torch.float64) * 3
    x[numel // 2] = torch.nan
    return x.to(dtype)


def _affines(rows: int, length: int, dtype: torch.dtype) -> list[Affine | None]:
    generator = torch.Generator().manual_seed(rows)

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=compute_dtype(dtype)) + 0.5

    zero = draw(rows)
    zero[1] = 0
    return [
        None, Affine(zero, draw(rows), length), Affine(draw(length), None, 1),
        Affine(draw(rows * length), draw(rows * length), 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bytes_and_values_are_those_of_the_reference(dtype: torch.dtype) -> None:
    rows = 11
    for length, spec in product(LENGTHS, SPECS):
        spec, x = spec.in_rows(length), _values(rows * length, dtype)
        fast = dispatch.launcher(spec, x.numel(), dtype, x.device)
        slow = StepwiseLauncher(reference, spec, x.numel(), dtype, derivative)
        assert isinstance(fast, cpu.Launcher)
        for affine in _affines(rows, length, dtype):
            expected, got = (plan.encode(x, 5, affine=affine) for plan in (slow, fast))
            assert all(map(same_bytes, expected, got)), (length, spec, affine)
            values = [
                plan.decode(*expected, 5, x.shape, (1,), affine) for plan in (slow, fast)]
            assert same_bits(*values), (length, spec, affine)


def test_large_half_precision_tensors_are_converted_in_whole_rows(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CHUNK", 1000)
    spec, x = BucketQuantSpec().in_rows(300), _values(300 * 20, torch.bfloat16)
    affine = Affine(torch.rand(20) + 0.5, torch.randn(20), 300)
    plan = cpu.Launcher(spec, x.numel(), x.dtype)
    slow = StepwiseLauncher(reference, spec, x.numel(), x.dtype, derivative)
    stored = plan.encode(x, 5, affine=affine)
    assert all(map(same_bytes, stored, slow.encode(x, 5, affine=affine)))
    assert same_bits(
        plan.decode(*stored, 5, x.shape, (1,), affine), slow.decode(*stored, 5, x.shape, (1,), affine))


def test_no_row_is_rounded_at_the_scale_of_another() -> None:
    x = torch.randn(10, 49, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-6, 3, 10).unsqueeze(-1)
    x[4] = 0
    for spec in (BucketQuantSpec(2, 256), BucketQuantSpec(2, 24)):
        rows = spec.in_rows(49)
        y = dispatch.decode(dispatch.encode(x.view(-1), rows, 1), rows, 1, x.numel(), x.dtype)
        y = y.view_as(x)
        assert not y[4].any()
        assert ((y - x).norm(dim=1) <= x.norm(dim=1)).all()
    # The control: flat buckets through the whole tensor.
    flat = BucketQuantSpec(2, 256)
    y = dispatch.decode(dispatch.encode(x.view(-1), flat, 1), flat, 1, x.numel(), x.dtype).view_as(x)
    assert y[4].any() and ((y - x).norm(dim=1) > 10 * x.norm(dim=1)).any()


def test_buckets_of_a_row_are_equal_and_no_larger_than_asked_for() -> None:
    for length, size in product(range(1, 700), (8, 64, 256)):
        bucket = row_bucket(length, size)
        parts = -(-length // size)
        assert bucket % 8 == 0 and bucket <= size
        # No bucket is empty, and each has less than 8 elements of padding.
        assert length <= bucket * parts < length + 8 * parts


def test_the_bytes_of_rows_follow_from_their_number() -> None:
    # A row of 49 elements: a bucket of 56 with two float32 numbers.
    spec = BucketQuantSpec(2, 256).in_rows(49)
    encoded = dispatch.encode(torch.randn(490), spec, 1)
    assert [t.numel() for t in encoded.tensors] == [10 * 56 * 2 // 8, 10 * 2]


def test_denormalize_undoes_normalize_up_to_rounding() -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    shift = torch.randn(6, dtype=torch.float64)
    y = normalize(x.view(-1), Affine(scale, shift, 5))
    expected = (x - shift.view(6, 1)) * scale.view(6, 1)
    torch.testing.assert_close(y, expected.view(-1), rtol=1e-15, atol=1e-15)
    back = denormalize(y, Affine(1 / scale, shift, 5), x.dtype)
    torch.testing.assert_close(back, x.view(-1), rtol=1e-14, atol=1e-14)


def test_decoded_values_stay_in_the_range_of_their_dtype() -> None:
    spec, x = BucketQuantSpec(), torch.linspace(-1, 1, 256, dtype=torch.float16)
    for plan in (
            cpu.Launcher(spec, 256, x.dtype),
            StepwiseLauncher(reference, spec, 256, x.dtype, derivative)):
        stored = plan.encode(x, 1)
        y = plan.decode(*stored, 1, x.shape, (1,), Affine(torch.tensor([1e6]), None, 256))
        assert y.isfinite().all() and y.max() == torch.finfo(torch.float16).max


def test_rows_need_buckets() -> None:
    assert BucketQuantSpec(2, None).in_rows(49) == BucketQuantSpec(2, None)
    with pytest.raises(ValueError, match="row_size must be a positive number"):
        BucketQuantSpec(2, None, row_size=49)
