"""The compiled CPU kernels give the reference's bytes."""

import threading
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from brevitas_bp.format import reference
from brevitas_bp.format.packing import pack, unpack
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NEAREST
from brevitas_bp.kernels import dispatch
from tests.kernels.table import (
    DTYPES,
    LARGE_DITHERED_SPECS,
    LARGE_SPECS,
    SPECS,
    UNIT_SPECS,
    check,
    same_bytes,
    samples,
)
from tests.strategies import dtype_name

cpu = pytest.importorskip("brevitas_bp.kernels.cpu.launch")
cpu_whole = pytest.importorskip("brevitas_bp.kernels.cpu.large")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_bytes_equal_the_reference(dtype: torch.dtype) -> None:
    # Other dtypes share the source and differ in a conversion only: a part of the specs will do.
    specs = SPECS if dtype == torch.float32 else SPECS[::3]
    for spec, x in product(specs, samples(dtype).values()):
        check(cpu, x, spec)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_levels_rotations_and_dither_give_the_reference_bytes(dtype: torch.dtype) -> None:
    specs = UNIT_SPECS if dtype == torch.float32 else UNIT_SPECS[::4]
    for spec in specs:
        assert dispatch.backend(torch.device("cpu"), spec, 700, dtype) is cpu
        for x in samples(dtype).values():
            check(cpu, x, spec)


def test_a_rotation_with_other_signs_would_be_noticed() -> None:
    # Positive control: another seed.
    x, spec = samples(torch.float32)["normal"], UNIT_SPECS[0]
    first, second = (cpu.encode(x, spec, seed) for seed in (3, 4))
    assert not same_bytes(first.payload, second.payload)


@pytest.mark.parametrize("size", [256, None])
def test_bytes_do_not_depend_on_the_number_of_threads(size: int | None) -> None:
    # Large enough that two threads are used.
    x = torch.randn((1 << 20) + 5, generator=torch.Generator().manual_seed(0))
    spec = BucketQuantSpec(3, size, mix_bit_width=4, mix_prob=0.5)
    form = cpu if size else cpu_whole
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            encoded = form.encode(x, spec, seed=1)
            decoded = form.decode(encoded, spec, 1, x.numel(), x.dtype)
            results.append((*encoded.tensors, decoded))
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bytes, *results))


def test_python_threads_may_encode_at_once() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    spec = BucketQuantSpec()
    expected = cpu.encode(x, spec, seed=1)
    results: list[bool] = []

    def work() -> None:
        for _ in range(10):
            got = cpu.encode(x, spec, seed=1)
            results.append(all(map(same_bytes, expected.tensors, got.tensors)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_large_buckets_give_the_reference_bytes(
        dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several conversions of 16-bit input, and several pieces of the widest and narrowest planes.
    monkeypatch.setattr(cpu_whole, "_CHUNK", 1 << 13)
    values = samples(dtype)
    values["several pieces"] = values["normal"].repeat(18)[:17_777]
    specs = LARGE_SPECS if dtype == torch.float32 else LARGE_SPECS[::5]
    for spec, x in product(specs, values.values()):
        check(cpu_whole, x, spec)


def test_dithered_buckets_of_any_size_have_a_plan() -> None:
    # Buckets that fit into the cache have compiled kernels; the reference serves larger ones.
    for spec, numel in product(LARGE_DITHERED_SPECS, (0, 700, 70_000)):
        x = samples(torch.float32)["normal"].repeat(70)[:numel]
        served = dispatch.backend(x.device, spec, numel, x.dtype)
        fits = numel > 0 and (spec.bucket_size or numel) <= cpu.LARGEST_BUCKET
        assert served is (cpu if fits else reference)
        check(Plans(), x, spec)


def test_several_large_buckets_give_the_reference_bytes() -> None:
    x = torch.randn(5 * 4096 + 11, generator=torch.Generator().manual_seed(0))
    for spec in LARGE_SPECS:
        for seed in range(2):
            check(cpu_whole, x, replace(spec, bucket_size=4096), seed)


def test_packing_pieces_one_after_another_would_be_noticed() -> None:
    # Positive control: the bytes of a bucket are not those of its pieces.
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    spec = BucketQuantSpec(2, None, rounding=NEAREST)
    codes = unpack(reference.encode(x, spec, 0).payload.unsqueeze(0), 2, x.numel())
    in_turn = pack(codes.view(2, -1), 2).view(1, -1)
    assert not same_bytes(in_turn, pack(codes, 2))


def test_an_empty_tensor_has_no_large_bucket() -> None:
    for spec in LARGE_SPECS:
        check(cpu_whole, torch.empty(0), spec)


class Plans:
    """Encodes and decodes as codecs do, by the launcher for a size."""

    def encode(self, flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
        plan = dispatch.launcher(spec, flat.numel(), flat.dtype, flat.device)
        return Encoded(*plan.encode(flat, seed), spec.affine)

    def decode(
            self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
            dtype: torch.dtype) -> Tensor:
        plan = dispatch.launcher(spec, numel, dtype, encoded.payload.device)
        return plan.decode(*encoded.tensors, seed, torch.Size((numel,)), (1,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_plans_have_the_bytes_of_the_reference(dtype: torch.dtype) -> None:
    for spec, x in product((*SPECS[::7], *LARGE_SPECS[::3], *UNIT_SPECS[::11]), samples(dtype).values()):
        check(Plans(), x, spec)


@pytest.mark.parametrize("numel", [1, 3000, cpu.LARGEST_BUCKET, cpu.LARGEST_BUCKET + 1])
def test_a_small_tensor_in_one_bucket_has_a_plan_of_its_own(numel: int) -> None:
    spec, x = BucketQuantSpec(3, None), torch.randn(numel)
    plan = dispatch.launcher(spec, numel, x.dtype, x.device)
    assert isinstance(plan, cpu.Launcher) is (numel <= cpu.LARGEST_BUCKET)
    check(Plans(), x, spec)


def test_each_bucket_size_has_its_kernels() -> None:
    sizes = {256: cpu, cpu.LARGEST_BUCKET: cpu, cpu.LARGEST_BUCKET + 8: cpu_whole, None: cpu_whole}
    for dtype, (size, form) in product((*DTYPES, torch.float64), sizes.items()):
        spec = BucketQuantSpec(bucket_size=size)
        assert dispatch.backend(torch.device("cpu"), spec, 1 << 20, dtype) is form
