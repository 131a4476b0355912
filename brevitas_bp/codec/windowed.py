"""The codec of maps in windows that are six deviations wide, with bins that end at zero."""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import fallback_from
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.maps import MapCodec
from brevitas_bp.format.arithmetic import compute_dtype, reciprocal, to_range, unit_of
from brevitas_bp.format.packing import pack, packed_nbytes, unpack
from brevitas_bp.format.reference import to_buckets
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.codec.WindowedCodec"
#: Width of a window, in standard deviations.
_WIDTH = 6.0
_PLANES = (0, 2, 3)


class _Windows(NamedTuple):
    """The windows of channels, each [1, C, 1, 1].

    Attributes:
        step: width of a bin; 0 for a constant channel.
        origin: where bin ``shift`` begins; 0 unless the window lies off zero.
        shift: bins before the origin, at least 1. 0 stands for 1, in a channel without negative values
            whose first bin holds zeros.
    """

    step: Tensor
    origin: Tensor
    shift: Tensor


@final
class WindowedCodec(MapCodec):
    """Stores maps in ``K = 2**bits`` equal bins of a window of six standard deviations (after BLPA).

    For each channel of a map [N, C, H, W], with its mean ``m`` and deviation ``s``::

        step  = 6 s / K,   shift = K / 2 - round(m / step), limited to 1 .. K - 1
        code  = ceil(x / step) - 1 + shift, limited to 0 .. K - 1
        x~    = (code - shift + 1/2) step

    Values outside the window are clipped, and each bin decodes to its middle.

    **The sign is exact.** A bin ends at zero, so ``x~ > 0`` exactly where ``x > 0``: the code of a
    ReLU's output also holds the ReLU's mask. In a channel without negative values, the lowest bin holds
    the zeros, and decodes to 0. If the limit of ``shift`` would clip the window, the step grows until
    the window fits. If all values lie on one side, three deviations or more from zero, the window lies
    around ``m``. (Where the tensor's dtype has no number as small as the middle of a bin, ``x~`` is 0.)

    **Biased** and deterministic: the same error at every step, about ``step**2 / 12`` in each element,
    and more in clipped elements.

    **Bytes**: ``bits`` bits for each element, and 9 bytes for each channel (17 for float64). Constant
    channels are exact. A channel with NaN or Inf decodes to NaN.

    The inputs of batch norms are stored normalized by the op-aware policy. There ``m`` is 0 and ``s`` is
    1. The authors take both from the parameters of the batch norm (``beta / gamma`` and 1), and store no
    numbers for a channel. They store one code before the ReLU, for three uses: batch norm, ReLU and the
    next convolution. Here the input of the norm and the input of the convolution are two tensors. They
    take ``floor`` in place of ``round``, which moves the window by up to a bin: with 2 bits, a quarter
    of its width.

    Args:
        bits: width of the codes. The authors use 4 and 8.
        fallback: codec or quantizer of tensors that are no maps; None: plain stochastic ``bits`` bits.

    Raises:
        ValueError: ``bits`` is out of range.

    Source: after Chakrabarti and Moseley, "Backprop with Approximate Activations for Memory-efficient
    Network Training", 2019.

    >>> x = torch.randn(8, 3, 16, 16).relu()
    >>> packed = WindowedCodec(4).encode(x, seed=0)
    >>> bool(((packed.decode() > 0) == (x > 0)).all()), packed.nbytes      # 6144 / 2 + 3 * 9
    (True, 3099)
    """

    def __init__(self, bits: int = 4, *, fallback: Any = None) -> None:
        self.bits = check_bit_width(_WHERE, bits)
        super().__init__(fallback_from(_WHERE, fallback, bits))
        self.bit_widths = (bits,)
        self.name = f"{bits}-bit windows"

    def with_fallback(self, fallback: Codec) -> Codec:
        return WindowedCodec(self.bits, fallback=fallback)

    def _variant(self, bits: int, bucket_size: int | None, average_size: int) -> Codec:
        if average_size > 1:
            raise ValueError("its codes are not averaged, so average_size must be 1")
        fallback = self.fallback.variant(bits, bucket_size)
        return WindowedCodec(bits, fallback=self.fallback if fallback is None else fallback)

    def encode_map(self, x: Tensor, layout: TensorLayout, seed: int, where: str) -> Packed:
        windows = _windows_of(x, 1 << self.bits)
        codes = _codes(x, windows, 1 << self.bits).contiguous().view(-1)
        stored = pack(to_buckets(codes, None), self.bits).view(-1)
        return Packed(self, (stored, *(t.view(-1) for t in windows)), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the middles of the bins."""
        layout = packed.layout
        stored, *windows = packed.tensors
        step, origin, shift = (t.view(1, -1, 1, 1) for t in windows)
        size = -(-layout.numel // 8) * 8
        codes = unpack(stored.view(1, -1), self.bits, size).view(-1)[:layout.numel]
        place = codes.view(layout.base_shape).to(step.dtype) - shift.clamp(min=1).to(step.dtype)
        values = (place + 0.5) * step
        # Multiply, so that NaN stays NaN.
        values = torch.where((shift == 0) & (place < 0), step * 0, values) + origin
        return layout.restore(to_range(values, layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        if len(layout.base_shape) != 4 or not layout.dtype.is_floating_point:
            refuse(packed, "a map of floats", layout)
        channels, dtype = layout.base_shape[1], compute_dtype(layout.dtype)
        return [
            TensorType.flat(self._payload(layout)), TensorType.flat(channels, dtype),
            TensorType.flat(channels, dtype), TensorType.flat(channels)]

    def map_nbytes(self, layout: TensorLayout) -> int:
        of_channel = 2 * compute_dtype(layout.dtype).itemsize + 1
        return self._payload(layout) + layout.base_shape[1] * of_channel

    def _payload(self, layout: TensorLayout) -> int:
        return packed_nbytes(-(-layout.numel // 8) * 8, self.bits)


def _windows_of(x: Tensor, count: int) -> _Windows:
    """Returns the windows of ``count`` bins of the channels of a map."""
    lo, hi = x.amin(_PLANES, keepdim=True), x.amax(_PLANES, keepdim=True)
    # Measure in units of a power of two, so that no square overflows or vanishes.
    unit, inverse = unit_of(torch.maximum(hi, -lo) + 0)
    variance, mean = torch.var_mean(x * inverse, _PLANES, correction=0, keepdim=True)
    constant = (lo == hi) & lo.isfinite()
    deviation = variance.sqrt().masked_fill(constant, 0)
    step = deviation * (_WIDTH / count)
    # Three deviations to either side; the window lies off zero only if no value is on the other side.
    reach = deviation * (_WIDTH / 2)
    off = ((lo > 0) & (mean > reach)) | ((hi <= 0) & (mean < -reach)) | constant
    rectified = (lo == 0) & ~off
    wanted = count // 2 - (mean * reciprocal(step)).round()
    wanted = torch.where(rectified, 1, wanted)
    shift = wanted.clamp(1, count - 1)
    # Bins above zero must reach mean + reach, bins below zero must reach mean - reach.
    above, below = (mean + reach) / (count - shift), (reach - mean) / shift
    clipped = ((wanted < 1) | rectified).to(step.dtype) * above
    clipped = torch.maximum(clipped, (wanted > count - 1).to(step.dtype) * below)
    step = torch.where(off, step, torch.maximum(step, clipped)) * unit
    step = step.clamp(max=torch.finfo(step.dtype).max)
    origin = torch.where(off, torch.where(constant, lo, mean * unit), 0) + step * 0
    shift = torch.where(off, count // 2, torch.where(rectified, 0, shift))
    return _Windows(step, origin, torch.nan_to_num(shift).to(torch.uint8))


def _codes(x: Tensor, windows: _Windows, count: int) -> Tensor:
    """Returns the bins of ``x`` as uint8."""
    step, origin, shift = windows
    first = shift.clamp(min=1).to(x.dtype)
    codes = ((x - origin) * reciprocal(step)).ceil_().add_(first - 1)
    # A quotient that vanishes must not lose its sign.
    codes = torch.where(x > origin, torch.maximum(codes, first), torch.minimum(codes, first - 1))
    return torch.nan_to_num(codes).clamp_(0, count - 1).to(torch.uint8)
