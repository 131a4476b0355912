"""Pooled maps: blocks as by a loop, exact sums, a stated bias, and the shortcut for 1x1 convolutions."""

import pytest
import torch
from torch.nn import functional as F

from brevitas_bp.codec import PooledCodec
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloatStochastic as Uint8
from tests.codec.test_two_frequencies import naive_means
from tests.stats import chi_square
from tests.strategies import normals


@pytest.mark.parametrize("kernel", [2, 3, (1, 2), (4, 3), 40])
@pytest.mark.parametrize("shape", [(2, 3, 12, 12), (1, 2, 13, 7), (2, 1, 2, 1)])
def test_each_element_is_the_mean_of_its_block(
        kernel: int | tuple[int, int], shape: tuple[int, ...]) -> None:
    x = normals(shape).float()
    decoded = PooledCodec(kernel).encode(x, seed=0).decode().double()
    block = (kernel, kernel) if isinstance(kernel, int) else kernel
    # bfloat16 rounds by at most 2**-8 of the value.
    torch.testing.assert_close(decoded, naive_means(x, block), rtol=2.0**-8 + 1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 2), (torch.float64, 8)])
def test_bytes(dtype: torch.dtype, size: int) -> None:
    x = normals((2, 3, 8, 12)).to(dtype)
    assert PooledCodec(2).encode(x, seed=0).nbytes == 2 * 3 * 4 * 6 * size
    assert PooledCodec((1, 3)).encode(x, seed=0).nbytes == 2 * 3 * 8 * 4 * size
    # 72 means of a sample in one bucket of 8-bit codes.
    inner = PooledCodec(2, inner=Uint8).encode(x, seed=0)
    assert inner.nbytes == 2 * (3 * 4 * 6 + (8 if dtype != torch.float64 else 16))


def test_the_error_is_that_of_the_mean_and_has_a_fixed_part() -> None:
    # Independent normals lose the share 1 - 1 / k**2 of their squares: 3 of 4 degrees of each block.
    x = normals((16, 8, 32, 32)).float()
    decoded = PooledCodec(2).encode(x, seed=0).decode()
    blocks, error = 16 * 8 * 16 * 16, float((decoded - x).double().square().sum())
    # bfloat16 means add less than 2**-16 of the energy.
    assert error < chi_square(3 * blocks) * (1 + 1e-4) and error > 0.97 * 3 * blocks
    # The same at every seed: it is bias, not noise.
    assert torch.equal(PooledCodec(2).encode(x, seed=1).decode(), decoded)


def test_sums_of_blocks_survive() -> None:
    x = torch.randint(-8, 8, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    decoded = PooledCodec(2).encode(x, seed=0).decode()
    assert torch.equal(F.avg_pool2d(decoded, 2), F.avg_pool2d(x, 2))


def test_the_gradient_of_a_1x1_convolution_follows_from_pooled_gradients() -> None:
    x, delta = normals((4, 3, 8, 8)), normals((4, 5, 8, 8), 1)
    decoded = PooledCodec(2).encode(x, seed=0).decode()
    expected = torch.einsum("nohw,nihw->oi", delta, decoded)
    pooled = torch.einsum("nohw,nihw->oi", F.avg_pool2d(delta, 2), F.avg_pool2d(x, 2)) * 4
    torch.testing.assert_close(expected, pooled, rtol=1e-12, atol=1e-12)
