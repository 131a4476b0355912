"""The Triton kernels of masks and differences give the reference's bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations.predictions import PREDICTIONS, Prediction
from brevitas_bp.format import differences, masks
from brevitas_bp.format.masks import Interval
from brevitas_bp.testing.subject import same_bits
from tests.kernels.gpu_worker import Compiled, Interpreted, Worker, compile_functions
from tests.kernels.test_differences import derivative_of_silu, drawn

pytest.importorskip("triton")

HALVES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
each_numel = pytest.mark.parametrize("numel", [1, 7, 4095, 4096, 9001])


@pytest.fixture(scope="module")
def gpu() -> Iterator[Interpreted]:
    worker = Interpreted()
    yield worker
    worker.close()


def values(numel: int, dtype: torch.dtype) -> Tensor:
    """Returns numbers of both signs, zeros of both signs, subnormal numbers, NaN and infinity."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    special = torch.tensor([
        0.0, -0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).smallest_normal / 4,
        -torch.finfo(dtype).smallest_normal / 4, 1.0])
    x[::3] = special.to(dtype).repeat(-(-len(x[::3]) // 8))[:len(x[::3])]
    return x


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether bits are equal; NaN may have any bits."""
    return torch.equal(first.isnan(), second.isnan()) and same_bits(
        first.nan_to_num(7, 8, 9), second.nan_to_num(7, 8, 9))


@each_dtype
@each_numel
def test_masks(gpu: Interpreted, numel: int, dtype: torch.dtype) -> None:
    x = values(numel, dtype)
    tiny = masks.next_value(0.0, dtype, 1)
    for interval in (
            Interval(tiny, float("inf")), Interval(tiny, float("inf"), nan=True), Interval(-1.0, 1.0),
            Interval(1.0, 0.0), Interval(1.0, 0.0, nan=True)):
        (packed, seen), _ = gpu.call("masks", "pack_interval", x, interval)
        assert torch.equal(packed, masks.pack_interval(x, interval)[0]) and not seen
    mask = masks.pack_interval(x, Interval(tiny, float("inf")))[0]
    packed, _ = gpu.call("masks", "pack_bits", x > 0)
    assert torch.equal(packed, mask)
    for outside, inside in ((0.0, 1.0), (-0.1, float("inf")), (float("nan"), 2.0)):
        found, _ = gpu.call("masks", "unpack_select", mask, numel, outside, inside, dtype)
        assert alike(found, masks.unpack_select(mask, numel, outside, inside, dtype))
    for kind in (torch.bool, torch.uint8, torch.int64):
        found, _ = gpu.call("masks", "unpack_select", mask, numel, 1, 0, kind)
        assert torch.equal(found, masks.unpack_select(mask, numel, 1, 0, kind))


@each_dtype
@each_numel
def test_products_with_masks(gpu: Interpreted, numel: int, dtype: torch.dtype) -> None:
    x = values(numel, dtype)
    x[x.isinf()] = 3
    mask = masks.pack_interval(values(numel + 1, dtype)[1:], Interval(0.0, 9.0))[0]
    found, _ = gpu.call("masks", "rectify_", x, mask)
    assert alike(found, masks.rectify_(x.clone(), mask))
    for strays in (None, torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)):
        found, _ = gpu.call("masks", "mask_", x, mask, strays)
        assert alike(found, masks.mask_(x.clone(), mask, strays=strays))


@each_dtype
@each_numel
def test_strays(gpu: Interpreted, numel: int, dtype: torch.dtype) -> None:
    x, positive = values(numel, dtype).relu(), Interval(
        masks.next_value(0.0, dtype, 1), float("inf"), nan=True)
    mask = masks.pack_interval(x, positive)[0]
    found, _ = gpu.call("masks", "find_strays", x, mask)
    assert found.tolist() == masks.find_strays(x, mask).tolist() == [0]
    for place in (0, numel // 2, numel - 1):
        changed = x.clone()
        changed[place] = 0
        its = masks.pack_interval(changed, positive)[0]
        changed[place] = -torch.finfo(dtype).smallest_normal
        found, _ = gpu.call("masks", "find_strays", changed, its)
        assert found.tolist() == masks.find_strays(changed, its).tolist() == [1]


@each_dtype
@pytest.mark.parametrize(("row", "count"), [(1, 40), (5, 900), (49, 30), (256, 9), (1000, 7), (2500, 2)])
def test_filling(gpu: Interpreted, row: int, count: int, dtype: torch.dtype) -> None:
    x = drawn(row, count, torch.float64).relu().to(dtype)
    for strays in (None, torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)):
        found, changed = gpu.call("differences", "fill_zeros", x, row, strays)
        assert alike(found, differences.fill_zeros(x, row, strays)) and not changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", [*PREDICTIONS.values(), Prediction((1.0,))])
@pytest.mark.parametrize("chunk", [256, 1024, 1000, 8192])
@pytest.mark.parametrize(("row", "count"), [(1, 40), (5, 900), (49, 30), (256, 9), (1000, 7), (2500, 2)])
def test_predictions(
        gpu: Interpreted, row: int, count: int, chunk: int, prediction: Prediction,
        dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = drawn(row, count, dtype)
    y = F.silu(x)
    d = derivative_of_silu(x) + 0.03 * torch.randn(x.shape, dtype=dtype, generator=generator)
    d[3] = float("nan")
    for factors in (None, torch.rand(row, dtype=dtype, generator=generator)):
        rest, used = differences.subtract_prediction(y, d.clone(), prediction, row, factors, chunk)
        (its_rest, its_used), _ = gpu.call(
            "differences", "subtract_prediction", y, d, prediction, row, factors, chunk)
        assert torch.equal(used, its_used) and used.dtype == its_used.dtype
        assert alike(rest, its_rest)
        sums = differences.add_prediction_(rest.clone(), d, prediction, row, used, chunk)
        its_sums, _ = gpu.call(
            "differences", "add_prediction_", rest, d, prediction, row, used, chunk)
        assert alike(sums, its_sums)
    assert used.any() or row == 1 or len(prediction.coefficients) == 1


# Compiled without a device.


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    yield worker
    worker.close()


def fused() -> list[Compiled]:
    """Compiles with Triton's defaults; runs in the worker."""
    return compile_functions(90, torch.float32, enable_fp_fusion=True)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", HALVES)
def test_compiled_arithmetic_is_exact(
        compiler: Worker, dtype: torch.dtype, capability: int) -> None:
    kernels = compiler.run(compile_functions, capability, dtype)
    names = [kernel.name for kernel in kernels]
    assert names == [
        *["_pack_kernel"] * 2, *["_select_kernel"] * 2, "_strays_kernel", *["_multiply_kernel"] * 2,
        "_fill_kernel", "_subtract_kernel", "_add_kernel"]
    assert [kernel.inexact for kernel in kernels] == [set()] * len(names)
    assert kernels[-3].operations(r"div\.rn\.f32")


def test_fused_arithmetic_would_be_seen(compiler: Worker) -> None:
    # Positive control.
    assert any(kernel.inexact for kernel in compiler.run(fused))


# On a device.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("row", "count"), [(49, 3000), (1000, 70), (1 << 18, 2)])
def test_a_device_gives_the_same_bits(row: int, count: int, dtype: torch.dtype) -> None:
    from brevitas_bp.kernels.gpu import differences as kernels
    from brevitas_bp.kernels.gpu import masks as mask_kernels

    x = drawn(row, count, torch.float64).to(dtype)
    positive = Interval(masks.next_value(0.0, dtype, 1), float("inf"))
    y, mask = x.relu(), masks.pack_interval(x, positive)[0]
    there = y.cuda()
    before = torch.cuda.get_sync_debug_mode()
    # The first call of a kernel compiles it.
    for mode in (before, "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            its_mask = mask_kernels.pack_interval(there, positive)[0]
            strays = mask_kernels.find_strays(there, its_mask)
            filled = kernels.fill_zeros(there, row, strays)
            masked = mask_kernels.mask_(filled.clone(), its_mask, strays)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(mask, its_mask.cpu())
    assert torch.equal(masks.find_strays(y, mask), strays.cpu())
    assert alike(differences.fill_zeros(y, row, strays.cpu()), filled.cpu())
    assert alike(masks.mask_(filled.cpu(), mask, strays=strays.cpu()), masked.cpu())
    wide = F.silu(x.float())
    d = derivative_of_silu(x.float())
    rest, used = differences.subtract_prediction(wide, d.clone(), PREDICTIONS["silu"], row)
    its_rest, its_used = kernels.subtract_prediction(
        wide.cuda(), d.cuda(), PREDICTIONS["silu"], row)
    assert torch.equal(used, its_used.cpu()) and alike(rest, its_rest.cpu())
    assert alike(
        differences.add_prediction_(rest, d, PREDICTIONS["silu"], row, used),
        kernels.add_prediction_(its_rest, d.cuda(), PREDICTIONS["silu"], row, its_used).cpu())
