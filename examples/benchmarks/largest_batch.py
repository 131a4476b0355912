"""Finds the largest batch that fits a memory limit, in few probes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Largest:
    """Result of a search.

    Attributes:
        fits: the largest batch known to fit; 0 if none is known.
        too_large: the smallest batch known not to fit; None if none is known.
        probes: number of measurements made.
    """

    fits: int
    too_large: int | None
    probes: int

    def __str__(self) -> str:
        """Shows how exact the result is: ``48 (51 does not)``."""
        above = "larger not tried" if self.too_large is None else f"{self.too_large} does not"
        return f"{self.fits} ({above})"


def largest_batch(
        peak: Callable[[int], float], limit: float, known: dict[int, float], *, part: int = 16,
        most: int = 8, highest: int = 8192) -> Largest:
    """Searches until the largest batch that fits and the smallest that does not are close.

    Close means that they differ by less than a ``part``-th.

    Peaks grow nearly linearly with the batch. So each probe is where the line through the two nearest
    peaks meets the limit, or slightly beyond it on the side that is still open. This takes two or three
    probes, where doubling and bisection take more.

    Args:
        peak: returns the peak bytes of a step at a batch. Assumed not to shrink as the batch grows.
        limit: bytes that a step may take.
        known: peaks measured already, by batch; at least one.
        part: precision: the search stops at a gap of less than 1/``part``.
        most: largest number of probes.
        highest: largest batch to try.
    """
    peaks, probes = dict(known), 0
    while True:
        fits = max((b for b, p in peaks.items() if p <= limit), default=0)
        above = [b for b, p in peaks.items() if p > limit and b > fits]
        too_large = min(above, default=None)
        close = too_large is not None and too_large - fits <= max(1, fits // part)
        if close or probes >= most or fits >= highest:
            return Largest(fits, too_large, probes)
        batch = _next_probe(peaks, limit, fits, too_large, part)
        if probes % 3 == 2:
            # Peaks are not linear, or the measurement is noisy: bisect the open interval.
            batch = fits + fits // 4 + 1 if too_large is None else (fits + too_large) // 2
        batch = min(max(batch, fits + 1), highest if too_large is None else too_large - 1)
        peaks[batch] = peak(batch)
        probes += 1


def _next_probe(
        peaks: dict[int, float], limit: float, fits: int, too_large: int | None, part: int) -> int:
    """Returns about the batch at which a line through the two nearest peaks meets the limit."""
    nearest, *others = sorted(peaks, key=lambda b: abs(peaks[b] - limit))
    # With one known peak, the line goes through the origin.
    other, base = (others[0], peaks[others[0]]) if others else (0, 0.0)
    slope = (peaks[nearest] - base) / (nearest - other)
    guess = int(other + (limit - base) / slope) if slope > 0 else 2 * nearest
    # If the guess is just beyond an end, the answer is probably that end: one step further decides.
    step = max(1, fits // part)
    if fits:
        guess = max(guess, fits + step)
    return guess if too_large is None else min(guess, too_large - step)
