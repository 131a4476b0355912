"""The search for the largest batch that fits agrees with a naive scan, in few probes."""

from collections.abc import Callable

import pytest

from tests.examples.scripts import benchmark

module = benchmark("largest_batch")
Largest, largest_batch = module.Largest, module.largest_batch


def scan(peak: Callable[[int], float], limit: float) -> int:
    """Finds the batch naively: tries every batch, one after another."""
    batch = 0
    while peak(batch + 1) <= limit:
        batch += 1
    return batch


@pytest.mark.parametrize("fixed", [0, 20, 100, 300])
@pytest.mark.parametrize("each", [0.5, 3.1, 12.2, 300])
@pytest.mark.parametrize("start", [1, 64, 500])
def test_finds_what_a_scan_finds_to_a_16th(fixed: float, each: float, start: int) -> None:
    def peak(batch: int) -> float:
        return fixed + each * batch

    found = largest_batch(peak, 256, {start: peak(start)}, most=99)
    largest = scan(peak, 256)
    assert found.too_large is not None
    assert found.fits <= largest < found.too_large
    assert found.too_large - found.fits <= max(1, found.fits / 16)
    # Two points determine the line. One more probe is needed on each side of the limit.
    assert found.probes <= 4


def test_steps_and_curves_are_found_too() -> None:
    for peak in (lambda b: 2.0 ** (b / 10), lambda b: 40.0 * (b // 32), lambda b: b * b / 40):
        found = largest_batch(peak, 256, {64: peak(64)}, most=99)
        assert found.too_large is not None and found.fits <= scan(peak, 256) < found.too_large
        assert found.too_large - found.fits <= max(1, found.fits / 16)


def test_probes_are_bounded_and_not_repeated() -> None:
    seen = []

    def peak(batch: int) -> float:
        seen.append(batch)
        return 0.001 * batch

    found = largest_batch(peak, 256, {4: 0.004}, most=5, highest=1024)
    assert found == Largest(1024, None, len(seen))
    assert str(found) == "1024 (larger not tried)"
    assert len(set(seen)) == len(seen) <= 5 and max(seen) <= 1024


def test_nothing_fits() -> None:
    found = largest_batch(lambda batch: 300.0 + batch, 256, {64: 364.0})
    assert (found.fits, found.too_large) == (0, 1)
