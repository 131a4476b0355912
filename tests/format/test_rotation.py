"""Random rotations: the transform, its signs and its inverse."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.random import ROTATION, derive, noise_keys, words_
from brevitas_bp.format.rotation import GROUP, hadamard, rotate, rotate_back, sign_words
from tests.stats import chi_square, hoeffding
from tests.strategies import normals

SIZES = (16, 32, 64, 256, 1024, 4096)
each_size = pytest.mark.parametrize("size", SIZES)
each_number = pytest.mark.parametrize("rotations", [1, 2])


def dense(size: int) -> Tensor:
    """Returns the Hadamard matrix: entry (i, j) is -1 to the number of common bits of i and j."""
    return torch.tensor([
        [(-1.0)**(i & j).bit_count() for j in range(size)] for i in range(size)], dtype=torch.float64)


def signs(word: int, rotation: int) -> list[int]:
    """Returns the signs of 16 elements in one rotation, by the definition."""
    return [1 - 2 * (word >> (GROUP * rotation + i) & 1) for i in range(GROUP)]


@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_the_transform_is_the_product_with_the_hadamard_matrix(size: int) -> None:
    x = normals((5, size), size)
    # A stage adds half a spacing of the largest partial sum, and there are log2(size) stages.
    slack = math.log2(size) * 2.0**-53 * float(x.abs().sum(-1).max())
    assert ((hadamard(x) - x @ dense(size)).abs() <= 2 * slack).all()


@each_size
def test_small_integers_are_transformed_exactly_and_back(size: int) -> None:
    x = torch.randint(-8, 9, (3, size), generator=torch.Generator().manual_seed(size)).float()
    assert torch.equal(hadamard(hadamard(x)), x * size)


@each_size
@each_number
def test_rotating_back_restores_integers_exactly(size: int, rotations: int) -> None:
    x = torch.randint(-3, 4, (3, size), generator=torch.Generator().manual_seed(size)).float()
    words = sign_words(torch.arange(3), size, seed=5)
    assert torch.equal(rotate_back(rotate(x.double(), words, rotations), words, rotations), x.double())


@each_number
def test_other_signs_do_not_restore(rotations: int) -> None:
    # Positive control.
    x, size = normals((3, 256)), 256
    first, second = (sign_words(torch.arange(3), size, seed) for seed in (5, 6))
    back = rotate_back(rotate(x, first, rotations), second, rotations)
    assert not torch.allclose(back, x, atol=0.5)


@pytest.mark.parametrize("size", [16, 64])
@each_number
def test_a_rotation_is_its_definition(size: int, rotations: int) -> None:
    x, words = normals((2, size)), sign_words(torch.tensor([3, 70]), size, seed=9)
    expected = []
    for bucket, row in zip(x, words.tolist()):
        for rotation in range(rotations):
            flips = [s for word in row for s in signs(word, rotation)]
            bucket = dense(size) @ (bucket * torch.tensor(flips, dtype=torch.float64)) / size
        expected.append(bucket)
    torch.testing.assert_close(rotate(x, words, rotations), torch.stack(expected))


@each_number
def test_the_norm_shrinks_by_the_root_of_the_size(rotations: int) -> None:
    x, words = normals((4, 256)), sign_words(torch.arange(4), 256, seed=1)
    norms = rotate(x, words, rotations).norm(dim=-1) * 16.0**rotations
    torch.testing.assert_close(norms, x.norm(dim=-1))


def test_words_are_those_of_the_stream_of_rotations() -> None:
    words = sign_words(torch.arange(4), 64, seed=11)
    assert words.shape == (4, 64 // GROUP)
    index = torch.arange(16, dtype=torch.int32)
    assert torch.equal(words.view(-1), words_(index, noise_keys(11, ROTATION)))
    assert noise_keys(11, ROTATION)[0] == derive(11, ROTATION, 0) & 0xFFFFFFFF


def test_a_bucket_beyond_four_billion_elements_has_words() -> None:
    # Indices wrap around at 2**32 words.
    first = sign_words(torch.tensor([5]), 256, seed=1)
    again = sign_words(torch.tensor([5 + (1 << 32) // 16]), 256, seed=1)
    assert torch.equal(first, again)


def test_signs_are_fair_and_independent() -> None:
    count = 20_000
    words = sign_words(torch.arange(count), 16, seed=2).view(-1, 1)
    bits = (words >> torch.arange(32)) & 1
    means = bits.double().mean(0)
    assert ((means - 0.5).abs() < hoeffding(count, tests=32)).all()
    # All pairs of the 32 signs of a group, within a word and with the next word.
    plus = 1.0 - 2.0 * bits.double()
    for lag in (0, 1):
        products = plus[:count - 1].T @ plus[lag:count - 1 + lag] / (count - 1)
        off = products - torch.eye(32, dtype=torch.float64) * (lag == 0)
        # A product lies in an interval of length 2.
        assert off.abs().max() < 2 * hoeffding(count - 1, tests=1024)


def test_signs_of_neighbouring_seeds_are_unrelated() -> None:
    bits = torch.stack([
        (sign_words(torch.arange(64), 16, seed).view(-1, 1) >> torch.arange(32)) & 1
        for seed in range(20)])
    ones = bits.sum((1, 2)).double()
    # Numbers of ones among 2048 fair bits.
    statistic = float(((ones - 1024)**2 / 512).sum())
    assert statistic < chi_square(20)
    assert len({tuple(row.flatten().tolist()) for row in bits}) == 20
