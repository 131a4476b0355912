"""Two frequencies: bytes as by the formula, unbiased about the rounded means, ragged maps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.codec import Packed, TwoFrequencyCodec
from brevitas_bp.codec.maps import block_means, spread_blocks
from brevitas_bp.codec.plain import plain_codec
from tests.stats import bernstein, hoeffding, rounding_variance
from tests.strategies import normals

COPIES = 1 << 12


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    ("height", "width", "block"), [(32, 32, 8), (16, 64, 8), (8, 8, 8), (64, 64, 4)])
def test_bits_per_element(bits: int, height: int, width: int, block: int) -> None:
    x = normals((2, 3, height, width)).float()
    packed = TwoFrequencyCodec(bits, block=block).encode(x, seed=0)
    assert packed.nbytes * 8 / x.numel() == 16 / block**2 + bits + 32 / (height * width)


@pytest.mark.parametrize(("shape", "means"), [
    ((2, 3, 20, 17), 3 * 3), ((2, 3, 5, 40), 1 * 5), ((2, 3, 9, 1), 2 * 1), ((2, 3, 2, 2), 1)])
def test_blocks_at_the_edge_hold_what_is_left(shape: tuple[int, ...], means: int) -> None:
    x = normals(shape).float()
    packed = TwoFrequencyCodec().encode(x, seed=0)
    plane = shape[2] * shape[3]
    assert packed.nbytes == 6 * (2 * means + -(-plane // 8) * 2 + 4)


def naive_means(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Returns the mean of its block for each element, in float64, block by block."""
    h, w = block
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[2], h):
        for j in range(0, x.shape[3], w):
            part = x[:, :, i:i + h, j:j + w].double()
            out[:, :, i:i + h, j:j + w] = part.mean((2, 3), keepdim=True)
    return out


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 2, 13, 9), (2, 1, 3, 20), (1, 1, 2, 1)])
@pytest.mark.parametrize("block", [(8, 8), (3, 2)])
def test_means_of_blocks_are_those_of_a_loop(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    x = normals(shape).float() + 1
    for layout in (torch.contiguous_format, torch.channels_last):
        means = block_means(x.contiguous(memory_format=layout), block)
        found = spread_blocks(means, block, x.shape)
        # Sums of up to 64 numbers of size 4 in float32.
        torch.testing.assert_close(found.double(), naive_means(x, block), rtol=0, atol=64 * 4 * 2.0**-24)


def test_means_of_large_and_of_small_numbers() -> None:
    signs = normals((1, 1, 16, 16)).sign()
    for size, tolerance in ((3.4e38, 1e-6), (1e-35, 1e-6)):
        x = (signs * size).float()
        found = spread_blocks(block_means(x, (8, 8)), (8, 8), x.shape).double()
        torch.testing.assert_close(found / size, naive_means(x, (8, 8)) / size, rtol=0, atol=tolerance)


def low_of(packed: Packed) -> Tensor:
    """Returns the stored means, at each element; the payload holds halves."""
    low = packed.tensors[0].double() * 2
    return spread_blocks(low, packed.codec.block, packed.layout.base_shape)  # pyright: ignore


def test_it_is_unbiased_about_the_means_that_are_stored() -> None:
    # Every copy is a sample with the same plane, so all have one scale and their own noise.
    plane = normals((1, 1, 8, 8), 3).float() + 100
    x = plane.expand(COPIES, 1, 8, 8).contiguous()
    packed = TwoFrequencyCodec().encode(x, seed=1)
    high = packed.facts
    scale, offset = (high.tensors[1].double().view(2, -1)[:, 0] * 2).tolist()
    low = low_of(packed)
    position = (plane.double() - low[:1] - offset) / scale
    variance = rounding_variance(position)

    def unbiased(decoded: Tensor) -> bool:
        error = ((decoded.double() - x.double()) / scale).view(COPIES, 64)
        # Five float32 operations on numbers of at most 110.
        slack = 5 * 110 * 2.0**-23 / scale
        each = error.mean(0).abs() < bernstein(variance.view(-1), COPIES, tests=64) + slack
        return bool(each.all()) and abs(float(error.mean())) < hoeffding(64 * COPIES) + slack

    decoded = packed.decode()
    assert unbiased(decoded)
    # The control: the distance to the mean, added to the mean rounded to bfloat16.
    exact = naive_means(x[:1], (8, 8))
    assert not unbiased(decoded + (low - exact).float())
    error = (decoded.double() - x.double()) / scale
    expected = float(variance.mean())
    # The squared errors lie in the unit interval.
    assert abs(float(error.square().mean()) - expected) < hoeffding(64 * COPIES) + 1e-3


def test_smooth_maps_have_less_error_than_without_the_means() -> None:
    # Planes that are linear in both directions: a block has a quarter of the range of a plane.
    coarse = normals((8, 16, 2, 2)).float()
    smooth = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=True)
    with_means, plain = (
        float((codec.encode(smooth, seed=0).decode() - smooth).square().mean())
        for codec in (TwoFrequencyCodec(), plain_codec(2, 1024).in_rows(1024, 32)))
    assert with_means < 0.2 * plain


def test_channels_last_maps_have_the_same_values() -> None:
    x = normals((2, 16, 12, 12)).float()
    codec = TwoFrequencyCodec()
    first = codec.encode(x, seed=1).decode()
    other = codec.encode(x.contiguous(memory_format=torch.channels_last), seed=1).decode()
    # Means may be summed in another order, which moves one float32 number at a time.
    assert float((first - other).abs().gt(1e-5).float().mean()) < 0.01
    assert other.is_contiguous(memory_format=torch.channels_last)
