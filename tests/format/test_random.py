"""Counter-based noise: its numbers, its statistics, and the origin of its seeds."""

import math
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.random import (
    ROUNDING,
    WIDTHS,
    SeedStream,
    derive,
    next_seed,
    noise_keys,
    noise_like,
    seeded,
    splitmix64,
    uniform,
    uniform_,
    unit_float,
)
from tests.stats import chi_square, normal

N = 1 << 20


def hashed(index: int, keys: tuple[int, int]) -> float:
    """Computes the generator in Python integers."""
    x = (index + keys[0]) % 2**32
    x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32
    x ^= keys[1]
    x = (x ^ (x >> 11)) * 0xAC4C1B51 % 2**32
    x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
    x ^= x >> 14
    return (x >> 8) / 2**24


def test_golden_values() -> None:
    # Stored bytes depend on these numbers, so they may never change.
    assert (uniform(0, (4,)) * 2**24).tolist() == [4404907, 3776269, 7419967, 15804745]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_noise_is_the_hash_of_the_index(seed: int) -> None:
    index = [0, 1, 2, 255, 256, 2**31 - 1, 2**31, 2**32 - 1]
    as_int32 = torch.tensor(index).to(torch.int32)
    noise = uniform_(as_int32, noise_keys(seed))
    assert noise.tolist() == [hashed(i, noise_keys(seed)) for i in index]


def test_noise_is_float32_in_the_half_open_unit_interval() -> None:
    noise = uniform(5, (N,))
    assert noise.dtype == torch.float32
    assert noise.min() >= 0 and noise.max() < 1
    assert torch.equal(noise * 2**24, (noise * 2**24).floor())


def bin_statistic(noise: Tensor, bins: int) -> float:
    """Returns Pearson's chi-square of equal bins."""
    counts = torch.bincount((noise * bins).long().flatten(), minlength=bins)
    expected = noise.numel() / bins
    return float(((counts - expected)**2 / expected).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bins", [2, 256, 4096])
def test_noise_is_uniform(seed: int, bins: int) -> None:
    assert bin_statistic(uniform(seed, (N,)), bins) < chi_square(bins - 1)


def test_pairs_of_neighbours_are_uniform_in_the_square() -> None:
    first, second = uniform(3, (N // 2, 2)).unbind(-1)
    cells = (first * 64).floor() + second
    assert bin_statistic(cells / 64, 64 * 64) < chi_square(64 * 64 - 1)


def test_uniformity_sees_bfloat16_noise() -> None:
    # Positive control: 16-bit uniforms have 256 levels, so half of 512 bins are empty.
    noise = torch.rand(N, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert bin_statistic(noise.float(), 512) > chi_square(511)


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Returns z of the circular cross-correlation at every lag.

    The products of centred uniforms have variance 1/144 and, at one lag, no correlation.
    """
    spectra = [torch.fft.rfft(x.double() - 0.5) for x in (first, second)]
    sums = torch.fft.irfft(spectra[0] * spectra[1].conj(), n=len(first))
    return sums / math.sqrt(len(first) / 144)


def test_noise_is_uncorrelated_at_every_lag() -> None:
    noise = uniform(11, (1 << 17,))
    z = correlations(noise, noise)[1:]
    assert z.abs().max() < normal(len(z))


NEIGHBOURS = [(0, 1), (1, 2), (7, 7 + 2**32), (5, 5 ^ 2**63), (2**64 - 1, 0)]


@pytest.mark.parametrize(("first", "second"), NEIGHBOURS)
def test_neighbouring_seeds_are_uncorrelated_at_every_lag(first: int, second: int) -> None:
    z = correlations(uniform(first, (1 << 17,)), uniform(second, (1 << 17,)))
    assert z.abs().max() < normal(len(z))


def test_correlation_sees_seeds_that_shift_the_index() -> None:
    # Positive control: the most common mistake, which adds the seed to the counter.
    n = 1 << 17
    index = torch.arange(2 * n).to(torch.int32)
    noise = uniform_(index, (0, 0))
    assert correlations(noise[:n], noise[1000:n + 1000]).abs().max() > normal(n)


def test_splitmix64_gives_the_published_sequence() -> None:
    # Vigna's test vector: consecutive outputs from the state 1234567.
    state, golden = 1234567, 0x9E3779B97F4A7C15
    outputs = [splitmix64((state + i * golden) % 2**64) for i in range(5)]
    assert outputs == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]


def test_derived_seeds_differ_along_every_path() -> None:
    paths = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**63,)]
    derived = {derive(seed, *path) for seed in range(100) for path in paths}
    assert len(derived) == 100 * len(paths)
    assert all(0 <= seed < 2**64 for seed in derived)


def test_derive_chains_splitmix() -> None:
    assert derive(9, 4) == splitmix64(splitmix64(9) ^ 4)
    assert derive(2**64 + 9, 4) == derive(9, 4)


def test_unit_float_takes_the_top_53_bits() -> None:
    assert unit_float(0) == 0 and unit_float(2**64 - 1) == 1 - 2**-53
    assert unit_float(2**63) == 0.5


def test_the_operator_repeats_what_seeded_names() -> None:
    x = torch.zeros(3, 5)
    with seeded(42):
        draws = [noise_like(x), noise_like(x)]
    with seeded(42):
        again = [noise_like(x), noise_like(x)]
    assert all(map(torch.equal, draws, again))
    assert not torch.equal(*draws)


def test_the_first_draw_is_the_noise_of_the_seed() -> None:
    with seeded(42):
        assert torch.equal(noise_like(torch.zeros(3, 5)), uniform(42, (3, 5)))


def test_streams_do_not_disturb_one_another() -> None:
    with seeded(1):
        alone = [next_seed(ROUNDING) for _ in range(3)]
    with seeded(1):
        mixed = []
        for _ in range(3):
            next_seed(WIDTHS)
            mixed.append(next_seed(ROUNDING))
    assert alone == mixed


def test_torch_manual_seed_governs_draws_outside_of_seeded() -> None:
    x = torch.zeros(100)
    torch.manual_seed(1)
    first, second = noise_like(x), noise_like(x)
    torch.manual_seed(1)
    assert torch.equal(noise_like(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("draw", [
    lambda: noise_like(torch.zeros(100)), lambda: next_seed(WIDTHS), lambda: uniform(3, (10,))])
def test_the_global_generator_is_untouched_within_seeded(draw: Callable[[], object]) -> None:
    before = torch.get_rng_state()
    with seeded(3):
        draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_moves_outside_of_seeded() -> None:
    # Positive control of the test above.
    before = torch.get_rng_state()
    noise_like(torch.zeros(100))
    assert not torch.equal(torch.get_rng_state(), before)


def test_seeded_blocks_nest() -> None:
    with seeded(1):
        expected = [next_seed(ROUNDING), next_seed(ROUNDING)]
    with seeded(1):
        first = next_seed(ROUNDING)
        with seeded(2):
            next_seed(ROUNDING)
        assert [first, next_seed(ROUNDING)] == expected


def test_seeded_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    torch.manual_seed(0)
    first = next_seed(ROUNDING)
    torch.manual_seed(1)
    assert next_seed(ROUNDING) != first


def test_seeded_holds_for_its_own_thread() -> None:
    seen = []
    with seeded(1):
        expected = next_seed(ROUNDING)
        thread = threading.Thread(target=lambda: seen.append(next_seed(ROUNDING)))
        thread.start()
        thread.join()
    with seeded(1):
        assert next_seed(ROUNDING) == expected
    assert seen != [derive(1, ROUNDING, 0)] and seen != [derive(1, ROUNDING, 1)]


def test_the_operator_is_known_to_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        noise = noise_like(torch.empty(3, 5, dtype=torch.bfloat16))
    assert noise.shape == (3, 5) and noise.dtype == torch.float32


def test_a_stream_continues_where_its_state_was_taken() -> None:
    stream = SeedStream(7)
    stream.next()
    state = stream.state()
    expected = [stream.next() for _ in range(3)]
    other = SeedStream(0)
    other.set_state(state)
    assert [other.next() for _ in range(3)] == expected
    assert len({SeedStream(7).next(), *expected}) == 4


def test_a_stream_pickles_with_its_position() -> None:
    stream = SeedStream(7)
    stream.next()
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.next() == stream.next()


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SeedStream\.set_state: expected the keys"):
        SeedStream(7).set_state({"base": 1})


def test_threads_never_share_a_seed() -> None:
    stream, seeds = SeedStream(3), []
    threads = [
        threading.Thread(target=lambda: seeds.extend(stream.next() for _ in range(1000)))
        for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seeds)) == 4000
