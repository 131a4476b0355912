"""The compiled CPU kernels give the reference's bytes."""

import threading
from itertools import product

import pytest
import torch

from brevitas_bp.kernels.spec import BucketQuantSpec
from tests.kernels.table import DTYPES, SPECS, check, same_bytes, samples
from tests.strategies import dtype_name

cpu = pytest.importorskip("brevitas_bp.kernels.cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
def test_bytes_equal_the_reference(dtype: torch.dtype) -> None:
    # 16-bit input differs from float32 only in its conversion: a part of the specs will do.
    specs = SPECS if dtype in (torch.float32, torch.float64) else SPECS[::5]
    for spec, x in product(specs, samples(dtype).values()):
        check(cpu, x, spec)


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    spec = BucketQuantSpec(mix_bit_width=4, mix_prob=0.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu.encode(x, spec, seed=1)
        torch.set_num_threads(3)
        split = cpu.encode(x, spec, seed=1)
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bytes, alone.tensors, split.tensors))


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


def test_whole_tensors_go_to_the_reference() -> None:
    assert cpu.supports(torch.float64, BucketQuantSpec())
    assert not cpu.supports(torch.float32, BucketQuantSpec(bucket_size=None))
    assert cpu.supports(torch.bfloat16, BucketQuantSpec())
