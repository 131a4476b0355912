"""The common part of codecs of bucket quantizers, fused or not."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.base import FLOATS, Codec
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.reference import to_buckets

#: A quantizer with a view of buckets and a bit width for each.
BucketQuantizer = BucketRescalingIntQuant | BucketLevelQuant

# Elements whose ranges are taken at once if they must be converted first.
_CHUNK = 1 << 18


class BucketCodec(Codec):
    """A codec of a bucket quantizer. It has variants with other widths.

    Attributes:
        quantizer: the quantizer as the user configured it. A variant of the codec shares it, or its
            parts, and may have another width and other buckets.
    """

    restores = FLOATS

    quantizer: Any

    def quantizers(self) -> Iterator[nn.Module]:
        yield self.quantizer

    def _variant(self, bits: int, bucket_size: int | None, average_size: int) -> Codec:
        if bucket_size is not None and bucket_size == self.bucket_size:
            same = self.variant(bits, None, average_size)
            assert same is not None
            return same
        codec = self._with_width(bits, bucket_size)
        return codec if average_size == 1 else AverageCodec(codec, average_size)

    @abstractmethod
    def _with_width(self, bits: int, bucket_size: int | None) -> Codec:
        """Returns a new codec of one width; without ``bucket_size`` the buckets stay as they are."""

    @property
    def bucket_size(self) -> int | None:
        """Elements of a bucket as the user configured it; None: one bucket for the whole tensor."""
        return getattr(self._view, "bucket_size", None)

    @property
    def measures_ranges(self) -> bool:
        """Whether the range of a bucket depends on its values alone, so that :meth:`ranges` works."""
        return hasattr(self.quantizer.scaling_impl, "scaling_stats_impl")

    def ranges(self, flat: Tensor) -> Tensor:
        """Returns the range of each bucket of a flat tensor [n], by the quantizer's own rule."""
        measure: Any = self.quantizer.scaling_impl.scaling_stats_impl
        buckets = to_buckets(flat, self.bucket_size, self._view.bucket_pad_zero)
        dtype = compute_dtype(flat.dtype)
        with torch.no_grad():
            return torch.cat([
                measure(part.to(dtype)).view(-1)
                for part in buckets.split(max(1, _CHUNK // buckets.shape[1]))])

    def steps_in_range(self, bits: int) -> float:
        """Returns the number of steps that ``bits``-bit codes divide the range of a bucket into."""
        return float(self.quantizer.int_scaling_impl(torch.tensor(float(bits))))

    @property
    def _view(self) -> Any:
        return self.quantizer.input_view_impl


def codec_name(widths: tuple[int, ...], rounding: str | None) -> str:
    """Returns a short name for reports.

    >>> codec_name((2, 4), "stochastic")
    '2/4-bit stochastic'
    """
    bits = "/".join(str(w) for w in widths) + "-bit"
    return bits if rounding is None else f"{bits} {rounding}"
