"""Codecs that store tensors in the units in which backward uses them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import WrappingCodec
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.normalizing import Affine


@dataclass(frozen=True, eq=False)
class Undo:
    """Undoes a normalization: ``y / rstd``, or ``y / rstd + mean``.

    Attributes:
        rstd: inverse deviations [K], as they are kept.
        largest: an inverse deviation of this size or more means no deviation; ``y`` is then 0.
        mean: means [K]; None: not added.
        inner: see :class:`~brevitas_bp.format.normalizing.Affine`.
        owned: whether the statistics are kept for this tensor alone, and count as its bytes.
    """

    rstd: Tensor
    largest: float
    mean: Tensor | None
    inner: int
    owned: bool = False

    def __call__(self) -> Affine:
        """Returns the affine map that undoes the normalization."""
        return Affine(self._rstd, self.mean, self.inner, self.largest, True)

    def forward(self, mean: Tensor | None) -> Affine:
        """Returns the affine map that normalizes: ``(x - mean) * rstd``."""
        return Affine(self._rstd, mean, self.inner, self.largest)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The statistics that are kept for this tensor alone."""
        if not self.owned:
            return ()
        return (self.rstd,) if self.mean is None else (self.rstd, self.mean)

    @property
    def _rstd(self) -> Tensor:
        # Cast at each use: a stored copy in another dtype would be memory that nobody counts.
        computed = compute_dtype(self.rstd.dtype)
        return self.rstd if self.rstd.dtype == computed else self.rstd.to(computed)


@final
class NormalizedCodec(WrappingCodec):
    """Stores ``(x - mean) * rstd``, with one mean and inverse deviation for each row or channel.

    Rounding errors then have the same size in all rows or channels, whatever the size of their values.

    Args:
        inner: stores the normalized tensor.
        affine: normalizes the tensor; None in a codec that only decodes.
        undo: undoes the normalization.
    """

    def __init__(self, inner: Codec, affine: Affine | None, undo: Undo) -> None:
        super().__init__(inner)
        self.affine = affine
        self.undo = undo
        self.decodes_anew = inner.decodes_anew
        self.bucket_elements = inner.bucket_elements

    def factors(self, row: int) -> Tensor:
        rstd = self.undo.rstd
        each = torch.where(rstd < self.undo.largest, rstd, 0).repeat_interleave(self.undo.inner)
        return each.repeat(row // each.numel())

    def around(self, inner: Codec) -> Codec:
        return NormalizedCodec(inner, self.affine, self.undo)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Normalizes and stores ``x``; the compiled kernels do both at once."""
        assert self.affine is not None
        stored = self.inner.encode_normalized(x, self.affine, seed=seed, where=where)
        # The ``Packed`` gets a codec without ``affine``, so that it does not hold the means.
        codec = NormalizedCodec(self.inner, None, self.undo)
        return Packed(
            codec, (*stored.tensors, *self.undo.tensors), stored.layout, stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the tensor, without its mean if ``undo`` has none."""
        return self.inner.decode_normalized(self.stored_in(packed), self.undo())

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        inner = packed.facts.codec.tensor_types(packed.facts)
        return None if inner is None else [
            *inner, *(TensorType.flat(t.numel(), t.dtype) for t in self.undo.tensors)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        least = self.inner.stored_nbytes(layout)
        return None if least is None else least + sum(t.nbytes for t in self.undo.tensors)


def spared_nbytes(packed: Packed) -> int:
    """Returns the bytes of a mean that is not kept, because only deviations from it are stored."""
    while packed.codec.wraps:
        codec = packed.codec
        if isinstance(codec, NormalizedCodec) and codec.undo.mean is None and not codec.undo.owned:
            return codec.undo.rstd.numel() * codec.undo.rstd.element_size()
        packed = packed.facts
    return 0


@final
class QuotientCodec(WrappingCodec):
    """Stores a dividend ``a`` as the quotient ``a / b``; the divisor ``b`` is kept anyway.

    The gradient of the divisor is ``-g (a / b) / b``. A rounding error of the quotient counts the same
    in every element; a rounding error of ``a`` would count ``1 / b**2`` times. If ``b`` is zero, the
    stored quotient is zero.

    Args:
        divisor: returns the divisor, when the dividend is stored and when backward needs it.
        inner: stores the quotient.
    """

    def __init__(self, divisor: Callable[[], Tensor], inner: Codec) -> None:
        super().__init__(inner)
        self.divisor = divisor
        self.name = f"{inner.name}, of the quotient"

    def around(self, inner: Codec) -> Codec:
        return QuotientCodec(self.divisor, inner)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Divides ``x`` by the divisor, and stores the quotient."""
        with torch.no_grad():
            divisor = self.divisor()
            quotient = torch.where(divisor == 0, 0, x.detach() / divisor).to(x.dtype)
        stored = self.inner.encode(quotient, seed=seed, where=where)
        return Packed(self, stored.tensors, TensorLayout.of(x), stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the quotient times the divisor."""
        with torch.no_grad():
            values = (self.stored_in(packed).decode() * self.divisor()).to(packed.layout.dtype)
        return packed.layout.restore(
            values.expand(packed.layout.base_shape))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        return packed.facts.codec.tensor_types(packed.facts)
