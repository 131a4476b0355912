"""Rows of a tensor, and values in units of their own statistic, in numba.

See :mod:`brevitas_bp.format.normalizing`.
"""

from typing import Any

from brevitas_bp.kernels.cpu.codes import copy_bytes
from brevitas_bp.kernels.cpu.compiling import inline, jit, wide_vectors, window


@jit
def place(bucket: Any, first: Any, size: Any, row: Any, per_row: Any) -> Any:
    """Returns the start of a bucket in a tensor that starts with bucket ``first``, and its limit.

    The limit is the most elements that the bucket may have. Rows of ``row`` elements have ``per_row``
    buckets each. ``row`` is 0 if there are no rows.
    """
    if row == 0:
        return (bucket - first) * size, size
    of_row = bucket // per_row
    inside = (bucket - of_row * per_row) * size
    return (of_row - first // per_row) * row + inside, min(size, row - inside)


@jit
def multiplier_of(scales: Any, kind: Any, largest: Any, divides: Any) -> Any:
    """Returns the factor that values of a statistic are multiplied by; see ``normalizing.Affine``."""
    scale, number = scales[kind], scales.dtype.type
    if scale >= largest:
        return number(0)
    return number(1) / scale if divides else scale


@jit
def normalize(
        x: Any, index: Any, shifts: Any, scales: Any, inner: Any, largest: Any, divides: Any,
        out: Any) -> None:
    """See ``normalizing.normalize``; ``x`` begins with element ``index`` of the tensor.

    ``shifts`` is empty if there are no shifts.
    """
    wide_vectors()
    done, kinds = 0, scales.size
    run = index // inner
    kind, left = run % kinds, (run + 1) * inner - index
    while done < x.size:
        if inner == 1:
            count = min(kinds - kind, x.size - done)
            u, v = window(x, done, count), window(out, done, count)
            copy_bytes(u, v)
            if shifts.size:
                a = window(shifts, kind, count)
                for i in range(count):
                    v[i] -= a[i]
            b = window(scales, kind, count)
            for i in range(count):
                v[i] *= multiplier_of(b, i, largest, divides)
            kind = 0
        else:
            count = min(left, x.size - done)
            u, v = window(x, done, count), window(out, done, count)
            scale = multiplier_of(scales, kind, largest, divides)
            if shifts.size:
                shift = shifts[kind]
                for i in range(count):
                    v[i] = (u[i] - shift) * scale
            else:
                for i in range(count):
                    v[i] = u[i] * scale
            kind, left = kind + 1, inner
            kind = 0 if kind == kinds else kind
        done += count


@inline
def bounded(x: Any, limit: Any) -> Any:
    """Clamps ``x`` between ``-limit`` and ``limit``; NaN stays NaN."""
    x = limit if x > limit else x
    return -limit if x < -limit else x


@jit
def denormalize(
        y: Any, index: Any, shifts: Any, scales: Any, inner: Any, largest: Any, divides: Any,
        limit: Any) -> None:
    """See ``normalizing.denormalize``; works in-place. ``shifts`` is empty if there are no shifts."""
    wide_vectors()
    done, kinds = 0, scales.size
    run = index // inner
    kind, left = run % kinds, (run + 1) * inner - index
    while done < y.size:
        if inner == 1:
            count = min(kinds - kind, y.size - done)
            v, b = window(y, done, count), window(scales, kind, count)
            if shifts.size:
                a = window(shifts, kind, count)
                for i in range(count):
                    v[i] = bounded(v[i] * multiplier_of(b, i, largest, divides) + a[i], limit)
            else:
                for i in range(count):
                    v[i] = bounded(v[i] * multiplier_of(b, i, largest, divides), limit)
            kind = 0
        else:
            count = min(left, y.size - done)
            v, scale = window(y, done, count), multiplier_of(scales, kind, largest, divides)
            if shifts.size:
                shift = shifts[kind]
                for i in range(count):
                    v[i] = bounded(v[i] * scale + shift, limit)
            else:
                for i in range(count):
                    v[i] = bounded(v[i] * scale, limit)
            kind, left = kind + 1, inner
            kind = 0 if kind == kinds else kind
        done += count
