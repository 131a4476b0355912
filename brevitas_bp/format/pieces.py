"""Pieces of a bucket that is too large for temporaries of its size.

NOTE [ A bucket in pieces ]
A byte of the planar layout holds codes that are B / k elements apart. Let k be the number of codes in a
byte of the narrowest plane. A bucket then consists of k segments of B / k elements. A piece consists of
the same columns of all segments, and is packed as a bucket of its own. Each plane of the piece is then
one run of bytes, or several, in the plane of the bucket. A bucket of a whole tensor therefore needs no
temporaries of its size.
"""

from brevitas_bp.format.packing import planes


def segments_of(width: int) -> int:
    """Returns the number of segments of a bucket: the codes in a byte of the narrowest plane.

    >>> [segments_of(width) for width in range(1, 9)]
    [8, 4, 8, 2, 8, 4, 8, 1]
    """
    return 8 // (width & -width)


def runs_of(width: int, period: int, start: int, stop: int) -> list[tuple[slice, slice]]:
    """Returns the bytes of the piece of columns ``start .. stop - 1``: (in the bucket, in the piece)."""
    found, plane, local = [], 0, 0
    for bits, _ in planes(width):
        count = segments_of(width) * bits // 8
        for i in range(count):
            begin = plane + i * period + start
            found.append((
                slice(begin, begin + stop - start), slice(local, local + stop - start)))
            local += stop - start
        plane += count * period
    return found


def pieces_of(size: int, width: int, chunk: int) -> list[tuple[int, int]]:
    """Returns the columns (start, stop) of the pieces of a bucket."""
    period = size // segments_of(width)
    step = max(1, chunk // segments_of(width))
    return [(start, min(start + step, period)) for start in range(0, period, step)]
