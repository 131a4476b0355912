"""Tensors of which another stored tensor tells something: the parts that are left to be stored.

This is the reference, in torch operations. :mod:`brevitas_bp.kernels.cpu.differences` gives the same
bits and reads memory once.

All tensors are flat, contiguous, and (but for those that are filled) float32 or float64. They consist
of rows of equal length. A row is divided into chunks of consecutive elements, :data:`CHUNK` unless said
otherwise. The last chunk of a row may be shorter.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations.predictions import CENTRE, LEAST, MOST, Prediction
from brevitas_bp.format.arithmetic import compute_dtype, tree_sum

#: Elements of a chunk.
CHUNK = 256
# Elements converted at once.
_PIECE = 1 << 18


def fill_zeros(x: Tensor, row: int, strays: Tensor | None = None) -> Tensor:
    """Replaces the zeros of each chunk by the mean of its other elements.

    ``x`` has no negative elements. Where zeros are known, their code does not matter. The mean adds
    nothing to the range, and nothing to the energy about the mean. Zeros stay where all of a chunk are
    zero, or one is NaN or infinite.

    Args:
        x: floats [numel] of any dtype.
        row: elements of a row.
        strays: what :func:`~brevitas_bp.format.masks.find_strays` returned; if it is not zero, ``x``
            stays as it is. None: there are none.
    """
    filled = in_pieces(_filled, x, row)
    return filled if strays is None else torch.where(strays != 0, x, filled)


def in_pieces(fill: Callable[[Tensor, int], Tensor], x: Tensor, row: int) -> Tensor:
    """Converts halves a few rows at a time, or parts of a row, so that temporaries stay small."""
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype and x.numel():
        return fill(x, row)
    out = torch.empty_like(x)
    for place, length in _pieces(x.numel(), row):
        out[place] = fill(x[place].to(dtype), length)
    return out


def _pieces(numel: int, row: int) -> Iterator[tuple[slice, int]]:
    """Yields places, and the elements of a row there: whole rows, or parts of a row between chunks."""
    step = min(row, _PIECE) * max(1, _PIECE // max(row, 1))
    for first in range(0, numel, max(row, step) or 1):
        last = min(first + max(row, step), numel)
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield slice(start, stop), min(row, stop - start)


def _filled(x: Tensor, row: int) -> Tensor:
    chunks = _in_chunks(x, row, 0.0)
    given = chunks != 0
    count = given.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
    mean, highest = tree_sum(chunks) / count, chunks.amax(1, keepdim=True)
    # The sum of large elements may be infinite.
    mean = torch.where(mean > highest, highest, mean)
    mean = torch.where(mean <= torch.finfo(x.dtype).max, mean, 0)
    # Rows of one element would be a view of all chunks.
    return torch.where(given, chunks, mean).view(-1, _padded(row))[:, :row].reshape(-1).contiguous()


def predict(derivative: Tensor, prediction: Prediction) -> Tensor:
    """Evaluates a prediction at decoded derivatives, by Horner's rule; NaN counts as the least."""
    cut = torch.where(derivative > LEAST, derivative, LEAST)
    t = torch.where(cut < MOST, cut, MOST) - CENTRE
    *lower, highest = prediction.coefficients
    total = t * highest
    for coefficient in reversed(lower):
        total = (total + coefficient) * t
    return total


def subtract_prediction(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int,
        factors: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Subtracts the prediction from ``x`` in the chunks whose range that reduces.

    Args:
        x: outputs of the activation function [numel].
        derivative: its decoded derivatives [numel], whose memory may be used for the result.
        prediction: predicts ``x`` from the derivative.
        row: elements of a row.
        factors: by what the elements of a row are multiplied before their range is taken; None: by 1.
        chunk: elements of a chunk.

    Returns:
        The difference, or ``x`` itself in other chunks, [numel]; and which chunks have a difference,
        bool [chunks]. A chunk with NaN or infinity has none.
    """
    difference = x - predict(derivative, prediction)
    if factors is None:
        used = _range(difference, row, chunk) < _range(x, row, chunk)
    else:
        scaled = [(values.view(-1, row) * factors).view(-1) for values in (difference, x)]
        used = _range(scaled[0], row, chunk) < _range(scaled[1], row, chunk)
    return torch.where(_for_elements(used, row, chunk), difference, x), used


def add_prediction_(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int, used: Tensor,
        chunk: int = CHUNK) -> Tensor:
    """Undoes :func:`subtract_prediction` in place."""
    sums = x + predict(derivative, prediction)
    return x.copy_(torch.where(_for_elements(used, row, chunk), sums, x))


def chunk_count(numel: int, row: int, chunk: int = CHUNK) -> int:
    """Returns the number of chunks of a tensor."""
    return numel // row * -(-row // chunk) if row else 0


def _padded(row: int, chunk: int = CHUNK) -> int:
    return -(-row // chunk) * chunk


def _for_elements(used: Tensor, row: int, chunk: int) -> Tensor:
    return used.repeat_interleave(chunk).view(-1, _padded(row, chunk))[:, :row].reshape(-1)


def _range(x: Tensor, row: int, chunk: int) -> Tensor:
    # Copies of the last element of a row change no range.
    rows = x.view(-1, row)
    missing = _padded(row, chunk) - row
    if missing:
        rows = torch.cat((rows, rows[:, -1:].expand(-1, missing)), 1)
    chunks = rows.reshape(-1, chunk)
    return chunks.amax(1) - chunks.amin(1)


def _in_chunks(x: Tensor, row: int, padding: float) -> Tensor:
    return F.pad(x.view(-1, row), (0, _padded(row) - row), value=padding).reshape(-1, CHUNK)
