"""The codec that projects the features of each row at random before it quantizes them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import FallbackCodec, check_share, fallback_from
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.plain import WHOLE_ROWS, plain_codec
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.format.arithmetic import compute_dtype, to_range
from brevitas_bp.format.random import ROTATION, derive, noise_keys, words_
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.codec.ProjectedCodec"
# Features that are projected together. A matrix of signs has at most a quarter of a million elements
# with the default share.
_LONGEST = 2048
# Path from the seed of an encode to that of the signs; the rounding draws from the seed itself.
_SIGNS = 0x5167


class _Facts(NamedTuple):
    """How a tensor was projected.

    Attributes:
        stored: ``Packed`` of the projections [rows, kept].
        seed: seed of the signs.
        length: features of a row.
    """

    stored: Packed
    seed: int
    length: int


@final
class ProjectedCodec(FallbackCodec):
    """Stores random projections of the rows of a tensor, in ``bits`` bits for each (EXACT).

    For rows ``h`` of D features, and a matrix of random signs ``S`` [D, k]::

        p  = h S / sqrt(k),  rounded stochastically with one range for each row
        h~ = p~ S' / sqrt(k)

    ``k`` is ``kept * D``, rounded up to a multiple of 8, because codes of a row fill whole bytes. Rows
    of more than 2048 features are projected in equal parts. The signs are not stored: decoding draws
    them again from the seed. All rows of a tensor have the same signs, as in the paper.

    **Unbiased**, because the mean of ``S S'`` is ``k`` times the identity. But the error is large::

        E |h~ - h|^2 = (D - 1) / k |h|^2 + D / k |error of p~|^2

    The gradient of a linear weight has this relative error too: since all rows share their signs, more
    rows do not reduce it. For the same reason, errors of different elements are not independent.
    Backward of a norm multiplies them, which would bias the gradient by the order of ``1 / k``. So the
    policy uses this code only for tensors that reach the gradient of one weight, unlike the authors.

    **Bytes**: ``bits k`` bits and 4 bytes of range for each row of D features (8 for float64).

    *Rows* are the last dimension. In tensors of four or more dimensions they are the channels,
    dimension 1, unless the policy says that the rows are the last dimension. If ``k`` would reach D, the
    fallback stores the tensor. NaN and Inf spread to their row (or part). A tensor with values near the
    largest float decodes to finite values.

    Args:
        kept: share of the numbers that is kept, in (0, 1]. 1 leaves all tensors to the fallback.
        bits: width of the codes.
        fallback: codec or quantizer of other tensors, and of short rows; None: plain stochastic ``bits``
            bits.

    Raises:
        ValueError: an argument is out of range.

    Source: Liu et al., "EXACT: Scalable Graph Neural Networks Training via Extreme Activation
    Compression", 2022.

    >>> codec = ProjectedCodec(1 / 8)
    >>> x = torch.randn(1000, 256)
    >>> packed = codec.encode(x, seed=0)
    >>> packed.nbytes * 8 / x.numel()                   # (2 * 32 + 32) / 256
    0.375
    """

    def __init__(self, kept: float = 1 / 8, bits: int = 2, *, fallback: Any = None) -> None:
        self.kept = check_share(_WHERE, "kept", kept)
        self.bits = check_bit_width(_WHERE, bits)
        super().__init__(fallback_from(_WHERE, fallback, bits))
        self._rows: int | None = None
        self._by_channel: bool | None = None
        self.name = f"{bits}-bit projections to {self.kept:.3g}"

    def with_fallback(self, fallback: Codec) -> "ProjectedCodec":
        return ProjectedCodec(self.kept, self.bits, fallback=fallback)

    def in_rows(self, length: int, last: int) -> Codec:
        other = self.with_fallback(self.fallback.in_rows(length, last))
        other._by_channel = length != last
        other._rows = length if length == last else None
        return other

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Projects the rows of ``x``, and rounds the projections."""
        layout = self.layout_of(x, where)
        length = self._length(layout)
        parts, size, kept = _sizes(length, self.kept)
        if layout.numel == 0 or kept >= size:
            return self.fallback.encode(x, seed=seed, where=where)
        with torch.no_grad():
            rows = self._to_rows(x.detach(), layout, length).to(compute_dtype(x.dtype))
            rows = torch.nn.functional.pad(rows, (0, parts * size - length)).view(-1, size)
            signs = _signs(seed, size, kept, rows.dtype, rows.device)
            # The unit keeps sums over a row finite.
            projected = (rows * (1 / _unit(size))) @ signs * kept**-0.5
            stored = self._inner(kept).encode(projected, seed=seed, where=where)
        return Packed(self, stored.tensors, layout, _Facts(stored, seed, length), where)

    def decode(self, packed: Packed) -> Tensor:
        """Draws the signs again, and projects back."""
        stored, seed, length = packed.facts
        layout = packed.layout
        parts, size, kept = _sizes(length, self.kept)
        with torch.no_grad():
            projected = stored.with_tensors(packed.tensors).decode()
            signs = _signs(seed, size, kept, projected.dtype, projected.device)
            rows = (projected * kept**-0.5) @ signs.T * _unit(size)
            rows = to_range(rows.view(-1, parts * size)[:, :length], layout.dtype)
        return self._from_rows(rows.contiguous(), layout)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        (stored, _, length), layout = packed.facts, packed.layout
        expected = self._layout_of_projections(layout)
        if not layout.dtype.is_floating_point or length != self._length(layout) or (
                (stored.layout.shape, stored.layout.dtype) != (expected.shape, expected.dtype)):
            refuse(packed, f"projections {list(expected.shape)} of rows of {length}", stored.layout)
        return stored.codec.tensor_types(stored)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        _, size, kept = _sizes(self._length(layout), self.kept)
        if layout.numel == 0 or kept >= size:
            return self.fallback.stored_nbytes(layout)
        return self._inner(kept).stored_nbytes(self._layout_of_projections(layout))

    def _layout_of_projections(self, layout: TensorLayout) -> TensorLayout:
        length = self._length(layout)
        parts, _, kept = _sizes(length, self.kept)
        shape = torch.Size((layout.numel // max(length, 1) * parts, kept))
        return TensorLayout(shape, (), shape, compute_dtype(layout.dtype), layout.device)

    def _inner(self, kept: int) -> Codec:
        return in_rows(plain_codec(self.bits, WHOLE_ROWS), Rows(kept, kept))

    def _channels(self, layout: TensorLayout) -> bool:
        """Whether rows are channels, dimension 1."""
        dims = len(layout.base_shape)
        return dims >= 4 if self._by_channel is None else self._by_channel and dims >= 3

    def _in_memory(self, layout: TensorLayout) -> bool:
        """Whether rows are the consecutive elements that the policy named."""
        return self._rows is not None and layout.numel % self._rows == 0

    def _length(self, layout: TensorLayout) -> int:
        """Returns the features of a row."""
        if self._rows is not None and layout.numel % self._rows == 0:
            return self._rows
        shape = layout.base_shape or torch.Size((1,))
        return shape[1] if self._channels(layout) else shape[-1]

    def _to_rows(self, x: Tensor, layout: TensorLayout, length: int) -> Tensor:
        if self._in_memory(layout):
            return layout.flatten(x).view(-1, length)
        base = TensorLayout.base(x).resolve_neg()
        return (base.movedim(1, -1) if self._channels(layout) else base).reshape(-1, length)

    def _from_rows(self, rows: Tensor, layout: TensorLayout) -> Tensor:
        if self._in_memory(layout):
            return layout.restore_flat(rows.view(-1))
        shape = layout.base_shape
        if self._channels(layout):
            return layout.restore(rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1))
        return layout.restore(rows.view(shape))


def _sizes(length: int, share: float) -> tuple[int, int, int]:
    """Returns the parts of a row, the features of a part, and the numbers kept of a part.

    >>> _sizes(64, 1 / 8), _sizes(100, 0.5), _sizes(5000, 1 / 8)
    ((1, 64, 8), (1, 100, 56), (3, 1667, 216))
    """
    parts = max(-(-length // _LONGEST), 1)
    size = -(-length // parts)
    # Products with shares such as 1 / 3 are not exact. The tolerance keeps them from adding 8 numbers.
    return parts, size, math.ceil(share * size / 8 - 1e-9) * 8


def _unit(size: int) -> float:
    """Returns a power of two of at least ``size``."""
    return 2.0 ** (size - 1).bit_length()


def _signs(
        seed: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns random signs [rows, columns], the same for equal arguments on every backend."""
    index = torch.arange(rows * columns, dtype=torch.int64, device=device).to(torch.int32)
    words = words_(index, noise_keys(derive(seed, _SIGNS), ROTATION))
    return torch.where(words < 0, -1.0, 1.0).to(dtype).view(rows, columns)
