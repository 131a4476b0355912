"""The compiled CPU kernels give the reference's bytes."""

import threading
from itertools import product

import pytest
import torch
from torch import Tensor

from brevitas_bp.kernels import reference
from brevitas_bp.kernels.spec import BucketQuantSpec

cpu = pytest.importorskip("brevitas_bp.kernels.cpu")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULES = (("min_max", "unsigned"), ("max", "narrow"), ("l2", "narrow"), ("max", "sign_magnitude"))
SPECS = [
    BucketQuantSpec(width, size, rule, code_range, stochastic, metadata_dtype=metadata)
    for width, (rule, code_range), size, stochastic, metadata in product(
        range(1, 9), RULES, (24, 256), (False, True), (torch.float32, torch.bfloat16))
    if width > 1 or code_range == "unsigned"]
SPECS += [BucketQuantSpec(2, 256, integer_zero_point=True)]
SPECS += [
    BucketQuantSpec(base, 24, mix_bit_width=mix, mix_prob=p, mix_per=per)
    for base, mix in ((2, 4), (4, 2), (3, 6), (4, 8)) for p in (0.0, 0.3, 1.0)
    for per in ("bucket", "tensor")]


def samples(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    normal = torch.randn(1000, generator=generator)
    broken = torch.randn(2000, generator=generator)
    broken[[5, 700, 1500]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    data = {
        "one": normal[:1], "seven": normal[:7], "normal": normal, "whole": normal.repeat(5)[:4608],
        "shifted": normal + 100, "constant": torch.full((700,), 3.7), "zero": torch.zeros(300),
        "signed zeros": torch.tensor([-0.0, 0.0] * 100), "subnormal": normal * 1e-38,
        "broken": broken}
    out = {name: x.to(dtype) for name, x in data.items()}
    out["huge"] = (normal * largest).clamp(-largest, largest).to(dtype)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_equal_the_reference(dtype: torch.dtype) -> None:
    # 16-bit input differs from float32 only in its conversion: a part of the specs will do.
    specs = SPECS if dtype == torch.float32 else SPECS[::5]
    for spec, (name, x) in product(specs, samples(dtype).items()):
        expected, got = (form.encode(x, spec, seed=3) for form in (reference, cpu))
        assert all(map(same_bits, expected.tensors, got.tensors)), (spec, name)
        decoded = [
            form.decode(expected, spec, 3, x.numel(), dtype) for form in (reference, cpu)]
        assert same_bits(*decoded), (spec, name)


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
    assert all(map(same_bits, alone.tensors, split.tensors))


def test_python_threads_may_encode_at_once() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    spec = BucketQuantSpec()
    expected = cpu.encode(x, spec, seed=1)
    results: list[bool] = []

    def work() -> None:
        for _ in range(10):
            got = cpu.encode(x, spec, seed=1)
            results.append(all(map(same_bits, expected.tensors, got.tensors)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_double_and_whole_tensors_go_to_the_reference() -> None:
    assert not cpu.supports(torch.float64, BucketQuantSpec())
    assert not cpu.supports(torch.float32, BucketQuantSpec(bucket_size=None))
    assert cpu.supports(torch.bfloat16, BucketQuantSpec())
