"""A codec whose rounding error is small relative to each element, not only to the largest one."""

from collections.abc import Sequence
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.general import float_dtype
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.relative import bucket_count, range_dtype
from brevitas_bp.kernels import dispatch

# Widest codes that the codec may stand for. Their errors are larger.
_COARSER = 4


@final
class RelativeCodec(Codec):
    """Stores sign and magnitude of each element in 8 bits; 125 levels form a geometric sequence.

    Rounding between two levels is stochastic, and so unbiased. If the magnitudes of a bucket differ by
    up to ``2**R``, neighbouring levels have the ratio ``c = 2**(R / 124)``. The deviation of an element
    is at most ``(c - 1) / (2 sqrt(c))`` of the element itself: 0.03 for ``R = 10``, 0.1 for ``R = 35``,
    and 0.36 for ``R = 127``. All positive normal float32 numbers are within ``R = 254``: then 0.77.

    Zeros, infinities and NaN are exact, and change no other element. float16 and bfloat16 round the
    levels when they are decoded.

    **Bytes**: 1 for each element, and 4 (float64: 8) for each bucket of 256 elements.

    >>> x = torch.tensor([1e-8, 0.0, -1.0, float("inf")])
    >>> decoded = RelativeCodec().encode(x, seed=0).decode()
    >>> bool((decoded[0] / x[0] - 1).abs() < 0.3), decoded[1].item(), decoded[3].item()
    (True, 0.0, inf)
    """

    name = "8-bit relative"
    restores = FLOATS
    decodes_anew = True
    keeps_sign = True

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Rounds each magnitude to one of the two levels beside it."""
        layout = self.layout_of(x, where)
        with torch.no_grad():
            tensors = dispatch.encode_relative(layout.flatten(x.detach()), seed)
        return Packed(self, tensors, layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the levels."""
        codes, ranges = packed.tensors
        with torch.no_grad():
            return packed.layout.restore_flat(
                dispatch.decode_relative(codes, ranges, packed.layout.dtype))

    def is_finer_than(self, other: Codec) -> bool:
        """It may stand for any codes of few bits: it has more, and needs no rows."""
        return other is self or (bool(other.bit_widths) and max(other.bit_widths) <= _COARSER)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        dtype, numel = float_dtype(packed), packed.layout.numel
        return [TensorType.flat(numel), TensorType((2, bucket_count(numel)), range_dtype(dtype))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return layout.numel + 2 * bucket_count(layout.numel) * range_dtype(layout.dtype).itemsize


@lru_cache(maxsize=1)
def relative() -> RelativeCodec:
    """Returns the codec; operations share an encoding only if their codec is one object."""
    return RelativeCodec()
