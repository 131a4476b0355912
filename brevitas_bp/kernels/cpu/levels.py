"""Codes by levels and their unbiased scale, for one bucket, in numba.

See :mod:`brevitas_bp.format.levels` and ``bucket.encode_in_units``. Up to 4 bits, a level is found by
one comparison for each threshold, which is vector code. With more bits, a table of narrow cells says
which threshold to compare with: no cell holds two.
"""

import math
from typing import Any

import numpy as np

from brevitas_bp.format.levels import levels, thresholds
from brevitas_bp.format.stages import CENTRED, NORMAL, UNBIASED
from brevitas_bp.kernels.cpu.compiling import inline, jit, wide_vectors
from brevitas_bp.kernels.cpu.metadata import reciprocal, tree_sum

#: The scale rules and the code range that this module implements.
RULES = frozenset({UNBIASED, CENTRED})
CODES = frozenset({NORMAL})

_F, _I, _U8 = np.float32, np.int32, np.uint8
# Positive levels and thresholds.
_A0, = (_F(level) for level in levels(1)[1:])
_B0, _B1 = (_F(level) for level in levels(2)[2:])
_BT, = (_F(threshold) for threshold in thresholds(2))
_C0, _C1, _C2, _C3 = (_F(level) for level in levels(3)[4:])
_CT0, _CT1, _CT2 = (_F(threshold) for threshold in thresholds(3))
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7 = (_F(level) for level in levels(4)[8:])
_DT0, _DT1, _DT2, _DT3, _DT4, _DT5, _DT6 = (_F(threshold) for threshold in thresholds(4))
_CELLS_PER_UNIT = 64
_CELLS = 512


def _cells(width: int) -> tuple[Any, Any]:
    """Returns for each cell the place of the level below its threshold, and the threshold."""
    borders = np.array(thresholds(width), np.float64)
    starts = np.arange(_CELLS) / _CELLS_PER_UNIT
    places = np.searchsorted(borders, starts, side="right")
    within = np.append(borders, np.inf)[places]
    assert np.diff(borders).min() > 1 / _CELLS_PER_UNIT and borders.max() < starts[-1]
    return places.astype(_U8), within.astype(_F)


_PLACES, _BORDERS = (np.stack(tables) for tables in zip(*map(_cells, range(5, 9))))
_TABLE = np.zeros((9, 256), _F)
for _width in range(1, 9):
    _TABLE[_width, :2**_width] = levels(_width)


@inline
def _level1(a: Any) -> Any:
    return _I(0), _A0


@inline
def _level2(a: Any) -> Any:
    return (_I(1), _B1) if a >= _BT else (_I(0), _B0)


@inline
def _place3(a: Any) -> Any:
    return _I(a >= _CT0) + _I(a >= _CT1) + _I(a >= _CT2)


@inline
def _level3(a: Any) -> Any:
    low = _C1 if a >= _CT0 else _C0
    high = _C3 if a >= _CT2 else _C2
    return high if a >= _CT1 else low


@inline
def _place4(a: Any) -> Any:
    return (_I(a >= _DT0) + _I(a >= _DT1) + _I(a >= _DT2) + _I(a >= _DT3) + _I(a >= _DT4)
            + _I(a >= _DT5) + _I(a >= _DT6))


@inline
def _level4(a: Any) -> Any:
    p = _D1 if a >= _DT0 else _D0
    q = _D3 if a >= _DT2 else _D2
    r = _D5 if a >= _DT4 else _D4
    s = _D7 if a >= _DT6 else _D6
    p = q if a >= _DT1 else p
    r = s if a >= _DT5 else r
    return r if a >= _DT3 else p


@jit
def _encode1(z: Any, inverse: Any, codes: Any, terms: Any) -> None:
    wide_vectors()
    number = z.dtype.type
    for i in range(z.size):
        codes[i] = _U8(_I(0) if z[i] * inverse < number(0) else _I(1))
        terms[i] = abs(z[i]) * number(_A0)


@jit
def _encode2(z: Any, inverse: Any, codes: Any, terms: Any) -> None:
    wide_vectors()
    number = z.dtype.type
    for i in range(z.size):
        u = z[i] * inverse
        far = abs(u) >= number(_BT)
        place = _I(1) if far else _I(0)
        codes[i] = _U8(_I(1) - place if u < number(0) else _I(2) + place)
        # A level has the sign of its value.
        terms[i] = abs(z[i]) * (number(_B1) if far else number(_B0))


@jit
def _encode3(z: Any, inverse: Any, codes: Any, terms: Any) -> None:
    wide_vectors()
    number = z.dtype.type
    for i in range(z.size):
        u = z[i] * inverse
        place = _place3(abs(u))
        codes[i] = _U8(_I(3) - place if u < number(0) else _I(4) + place)
        terms[i] = abs(z[i]) * number(_level3(abs(u)))


@jit
def _encode4(z: Any, inverse: Any, codes: Any, terms: Any) -> None:
    wide_vectors()
    number = z.dtype.type
    for i in range(z.size):
        u = z[i] * inverse
        place = _place4(abs(u))
        codes[i] = _U8(_I(7) - place if u < number(0) else _I(8) + place)
        terms[i] = abs(z[i]) * number(_level4(abs(u)))


@jit
def _encode_many(z: Any, inverse: Any, codes: Any, terms: Any, width: Any) -> None:
    wide_vectors()
    number, half = z.dtype.type, _I(1 << (width - 1))
    places, borders, table = _PLACES[width - 5], _BORDERS[width - 5], _TABLE[width]
    for i in range(z.size):
        u = z[i] * inverse
        a = abs(u)
        scaled, last = a * number(_CELLS_PER_UNIT), number(_CELLS - 1)
        cell = _I(scaled if scaled < last else last)  # NaN gets the last cell
        place = _I(places[cell]) + _I(a >= number(borders[cell]))
        codes[i] = _U8(half - _I(1) - place if u < number(0) else half + place)
        terms[i] = abs(z[i]) * number(table[half + place])


@jit
def energy(z: Any, terms: Any) -> Any:
    """Returns the sum of squares; ``terms`` is scratch of the same size."""
    wide_vectors()
    for i in range(z.size):
        terms[i] = z[i] * z[i]
    return tree_sum(terms)


@jit
def encode_levels(z: Any, inverse: Any, width: Any, codes: Any, terms: Any) -> Any:
    """Writes the codes of ``z * inverse``, and returns the sum of ``z`` times its level.

    ``terms`` is scratch of the same size.
    """
    if width == 1:
        _encode1(z, inverse, codes, terms)
    elif width == 2:
        _encode2(z, inverse, codes, terms)
    elif width == 3:
        _encode3(z, inverse, codes, terms)
    elif width == 4:
        _encode4(z, inverse, codes, terms)
    else:
        _encode_many(z, inverse, codes, terms, width)
    return tree_sum(terms)


@jit
def encode_bucket(z: Any, width: Any, codes: Any, terms: Any) -> Any:
    """Writes the codes of a bucket in units, and returns its scale in units."""
    number = z.dtype.type
    total = energy(z, terms)
    spread = number(math.sqrt(np.float64(total * number(1.0 / z.size))))
    along = encode_levels(z, reciprocal(spread, z.dtype), width, codes, terms)
    return total / along if along > number(0) else number(0)


@jit
def _decode1(codes: Any, out: Any) -> None:
    wide_vectors()
    number = out.dtype.type
    for i in range(out.size):
        out[i] = number(_A0) if _I(codes[i]) > _I(0) else number(-_A0)


@jit
def _decode2(codes: Any, out: Any) -> None:
    wide_vectors()
    number = out.dtype.type
    for i in range(out.size):
        code = _I(codes[i])
        low = number(-_B0) if code == _I(1) else number(-_B1)
        high = number(_B1) if code == _I(3) else number(_B0)
        out[i] = high if code > _I(1) else low


@jit
def decode_levels(codes: Any, width: Any, out: Any) -> None:
    """Writes the levels of codes."""
    wide_vectors()
    number = out.dtype.type
    if width == 1:
        _decode1(codes, out)
    elif width == 2:
        _decode2(codes, out)
    else:
        table = _TABLE[width]
        for i in range(out.size):
            out[i] = number(table[codes[i]])
