"""Stores the inputs of norms as backward uses them: normalized.

NOTE [ Inputs of norms are stored normalized ]
1. Backward of a norm uses ``(x - mean) * rstd``. A rounding of ``x`` counts ``rstd`` times, and ``rstd``
   differs by any factor from row to row, or from channel to channel. A rounding of the normalized input
   counts once.
2. Autograd saves the input before the operation runs, but mean and inverse deviation afterwards. So the
   hook returns a :class:`Deferred`, which is filled when the operation has ended.
3. The input decodes to ``normalized / rstd``, and the mean decodes to zero. The formula of backward then
   gives the normalized input, whichever kernel computes it. So the mean itself is not kept.
4. The normalized values of a row or channel without deviation are zeros, which are stored exactly.
5. If mean and inverse deviation are not available (evaluation; custom Functions), the middle and the
   range of each channel replace them. The middle is kept, and decoding adds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.backward.rows import trailing
from brevitas_bp.backward.saved import NO_CALL, Call, Decision, SavedTensor
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.normalized import Undo
from brevitas_bp.codec.rows import Rows
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.normalizing import Affine

_LAYER, _GROUP = "layer_norm", "group_norm"
# If the variance is below eps times this number, rstd has too few digits to tell the variance from zero.
_NO_VARIANCE = 2.0**-20
_STATISTIC = Decision(None, "statistic of a norm")


class Deferred:
    """The result of a pack hook for a tensor that is stored only later in the forward pass.

    Args:
        hurry: called with :data:`~brevitas_bp.backward.saved.NO_CALL` if backward asks for the tensor
            before it is stored. It must store it.

    Attributes:
        packed: the stored tensor; None until then.
    """

    __slots__ = ("_hurry", "packed")

    def __init__(self, hurry: Callable[[Call], None] | None = None) -> None:
        self.packed: Any = None
        self._hurry = hurry

    def fill(self, packed: Any) -> None:
        """Notes the stored tensor."""
        self.packed, self._hurry = packed, None

    def found(self) -> Any:
        """Returns the stored tensor."""
        if self._hurry is not None:
            self._hurry(NO_CALL)
        return self.packed


@dataclass(eq=False)
class PendingNorm:
    """A running norm: its input, and the other tensors that it has saved so far.

    Attributes:
        saved: the input.
        decision: how the input is to be stored.
        deferred: the object that autograd holds for the input.
        originals: the tensors that plain autograd would have saved, for listeners.
        statistics: the other floating-point tensors that the norm has saved, in order.
    """

    saved: SavedTensor
    decision: Decision
    deferred: Deferred
    originals: Sequence[Tensor]
    statistics: list[tuple[SavedTensor, Decision, Deferred]] = field(default_factory=list)

    def has_computed(self, saved: SavedTensor, decision: Decision) -> bool:
        """Whether a saved tensor is a statistic of the norm, even if it is as large as the input."""
        return self.saved.call is saved.call and saved.tensor.is_floating_point() and (
            decision.codec is None or saved.position is None)

    def hold(self, saved: SavedTensor, decision: Decision) -> Deferred:
        """Adds a statistic, and returns an object that is filled when the norm has ended."""
        deferred = Deferred()
        self.statistics.append(
            (saved, decision if decision.codec is None else _STATISTIC, deferred))
        return deferred


@dataclass(frozen=True)
class NormUnits:
    """How the input of a norm is normalized, and the rows of its buckets.

    Attributes:
        affine: the map that normalizes.
        undo: the way back.
        rows: the rows with which buckets end. None: buckets may hold elements of several statistics,
            because all are normalized to one scale.
        drops_mean: whether the mean is decoded as zero.
    """

    affine: Affine
    undo: Undo
    rows: Rows | None
    drops_mean: bool


def units_of(pending: PendingNorm) -> NormUnits | None:
    """Returns how the input of a norm that has ended is normalized; None: it is stored as it is."""
    x, call = pending.saved.tensor, pending.saved.call
    # If elements share memory, fewer elements are stored than the statistics count.
    if x.numel() == 0 or x.dim() < 2 or TensorLayout.base(x).shape != x.shape:
        return None
    by_row = _LAYER in call.name or _GROUP in call.name
    found = [saved.tensor for saved, _, _ in pending.statistics[-2:]]
    count = found[0].numel() if len(found) == 2 else 0
    if count == 0 or found[1].numel() != count or not (
            x.numel() % count == 0 if by_row else x.shape[1] == count):
        return None if by_row else _own(x)
    mean, rstd = (t.detach().reshape(-1) for t in found)
    rows, largest = None, float("inf")
    if by_row:
        inner = x.numel() // count
        rows = _rows(x, inner)
        if rows is None:
            return None
    else:
        placed = _channels(x)
        if placed is None:
            return None
        inner, rows = placed
        largest = _largest(call)
    undo = Undo(rstd, largest, None, inner)
    return NormUnits(
        undo.forward(mean.to(compute_dtype(x.dtype))), undo, rows, drops_mean=True)


def _rows(x: Tensor, inner: int) -> Rows | None:
    """Returns rows of ``inner`` elements: whole trailing dimensions or equal parts of these, or None."""
    dims = 1
    while dims < x.dim() and prod(x.shape[-dims:]) < inner:
        dims += 1
    rows = trailing(x, dims)
    return None if rows is None or rows.length % inner else rows._replace(length=inner)


def _channels(x: Tensor) -> tuple[int, Rows | None] | None:
    """Returns how many elements of one channel are consecutive in memory, and the order to copy to.

    The order is None if no copy is needed. The result is None if elements share memory.
    """
    base = TensorLayout.base(x)
    if base.shape != x.shape:
        return None
    plane = x.shape[2:].numel()
    if x.is_contiguous():
        return plane, None
    if x.stride(1) == 1 and all(
            s >= x.shape[1] for d, s in enumerate(x.stride()) if d != 1 and x.shape[d] > 1):
        return 1, None
    inside = all(
        x.stride(d) * x.shape[d] <= x.stride(1) for d in range(2, x.dim()) if x.shape[d] > 1)
    if inside and (x.shape[0] == 1 or x.stride(0) >= x.stride(1) * x.shape[1]):
        return plane, None
    return plane, Rows(x.numel(), x.shape[-1], tuple(range(x.dim())))


def _own(x: Tensor) -> NormUnits | None:
    """Returns units made of the ranges of the tensor's own channels; their middles are kept.

    Largest and smallest values are the same on every processor; sums are not.
    """
    placed = _channels(x)
    if placed is None:
        return None
    inner, rows = placed
    with torch.no_grad():
        dims, dtype = _all_but_channels(x), compute_dtype(x.dtype)
        lo, hi = (m.to(dtype) / 2 for m in (x.detach().amin(dims), x.detach().amax(dims)))
        # abs turns the range -0 of a channel of zeros into 0, whose reciprocal counts as 0.
        middle, scale = lo + hi, (hi - lo).abs().reciprocal()
    undo = Undo(scale, torch.finfo(dtype).max, middle, inner, owned=True)
    return NormUnits(undo.forward(middle), undo, rows, drops_mean=False)


def channel_units(x: Tensor) -> NormUnits | None:
    """Returns units that divide each channel by its largest magnitude, which is kept.

    None if elements of ``x`` share memory.
    """
    placed = _channels(x)
    if placed is None:
        return None
    inner, rows = placed
    with torch.no_grad():
        # abs turns the peak -0 of a channel of zeros into 0, whose reciprocal counts as 0.
        peak = _channel_peaks(x.detach()).abs().to(compute_dtype(x.dtype))
        undo = Undo(peak.reciprocal(), torch.finfo(peak.dtype).max, None, inner, owned=True)
    return NormUnits(undo.forward(None), undo, rows, drops_mean=False)


def _channel_peaks(x: Tensor) -> Tensor:
    """Returns the largest magnitude of each channel, without a copy of the tensor."""
    if x.is_contiguous():
        # Reduce over samples first, in vector code: ten times as fast for small planes on a CPU.
        samples = x.flatten(1)
        peaks = torch.maximum(samples.amax(0), -samples.amin(0))
        return peaks.view(x.shape[1], -1).amax(1)
    dims = _all_but_channels(x)
    return torch.maximum(x.amax(dims), -x.amin(dims))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _largest(call: Call) -> float:
    """Returns ``rstd`` of a channel without deviation, from ``eps`` of batch and instance norms."""
    eps = call.argument(7, "eps", 1e-5)
    return (eps * (1 + _NO_VARIANCE)) ** -0.5 if isinstance(eps, float) and eps > 0 else float("inf")
