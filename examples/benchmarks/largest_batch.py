"""The largest batch that fits a limit of memory, found in few probes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Largest:
    """What a search found.

    Attributes:
        fits: the largest batch that was seen to fit; 0: none.
        too_large: the smallest that was seen not to; None: none was.
        probes: measurements that were made.
    """

    fits: int
    too_large: int | None
    probes: int

    def __str__(self) -> str:
        """How exact it is: ``48 (51 does not)``."""
        above = "larger not tried" if self.too_large is None else f"{self.too_large} does not"
        return f"{self.fits} ({above})"


def largest_batch(
        peak: Callable[[int], float], limit: float, known: dict[int, float], *, part: int = 16,
        most: int = 8, highest: int = 8192) -> Largest:
    """Looks between what fits and what does not until they are less than a ``part``-th apart.

    Peaks grow nearly linearly with the batch, so each probe is at the batch that the line through the
    nearest peaks says, or a little to the side of it that is still open: two or three probes instead
    of a doubling and a bisection.

    Args:
        peak: bytes of a step at a batch. Larger batches are taken to need no less.
        limit: bytes that a step may take.
        known: peaks measured already; at least one.
        part: precision.
        most: probes.
        highest: batch.
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
            # Not linear, or the measurement is noisy: halve what is open.
            batch = fits + fits // 4 + 1 if too_large is None else (fits + too_large) // 2
        batch = min(max(batch, fits + 1), highest if too_large is None else too_large - 1)
        peaks[batch] = peak(batch)
        probes += 1


def _next_probe(
        peaks: dict[int, float], limit: float, fits: int, too_large: int | None, part: int) -> int:
    """About the batch at which a line through the two nearest peaks meets the limit."""
    nearest, *others = sorted(peaks, key=lambda b: abs(peaks[b] - limit))
    # Through the origin where only one peak is known.
    other, base = (others[0], peaks[others[0]]) if others else (0, 0.0)
    slope = (peaks[nearest] - base) / (nearest - other)
    guess = int(other + (limit - base) / slope) if slope > 0 else 2 * nearest
    # Just beyond an end the answer is likely the same: one step further decides.
    step = max(1, fits // part)
    if fits:
        guess = max(guess, fits + step)
    return guess if too_large is None else min(guess, too_large - step)
