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
from brevitas_bp.format.arithmetic import compute_dtype, tree_sum
from brevitas_bp.format.bucket import elements_of
from brevitas_bp.format.levels import relative_error
from brevitas_bp.format.reference import to_buckets

#: A quantizer with a view of buckets and a bit width for each.
BucketQuantizer = BucketRescalingIntQuant | BucketLevelQuant

# Elements that are measured at once.
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
    def measures_spread(self) -> bool:
        """Whether the error of a bucket depends on its own values alone; :meth:`spread` needs that."""
        return self._by_energy or hasattr(self.quantizer.scaling_impl, "scaling_stats_impl")

    @property
    def _by_energy(self) -> bool:
        return isinstance(self.quantizer, BucketLevelQuant) or self.quantizer.transform_impl is not None

    def spread(self, flat: Tensor) -> Tensor:
        """Returns what the squared error of each bucket of a flat tensor is proportional to.

        The result is [n], float64. It is the squared range, by the quantizer's own rule. With levels or
        a rotation it is the energy, about the mean if the quantizer removes it.
        """
        buckets = to_buckets(flat, self.bucket_size, self._pads_with_zero)
        n, size = buckets.shape
        dtype, step = compute_dtype(flat.dtype), max(1, _CHUNK // size)
        measure: Any = self._energy if self._by_energy else self._squared_range
        with torch.no_grad():
            return torch.cat([
                measure(buckets[i:i + step].to(dtype), elements_of(
                    torch.arange(i, min(i + step, n), device=flat.device), flat.numel(), size))
                for i in range(0, n, step)])

    def _squared_range(self, buckets: Tensor, counts: Tensor) -> Tensor:
        return self.quantizer.scaling_impl.scaling_stats_impl(buckets).view(-1).double().square()

    def _energy(self, buckets: Tensor, counts: Tensor) -> Tensor:
        x = buckets.double()
        if getattr(self.quantizer.scaling_impl, "remove_mean", False):
            inside = torch.arange(x.shape[1], device=x.device) < counts
            x = torch.where(inside, x - tree_sum(x) / counts, 0)
        return tree_sum(x.square()).view(-1)

    def relative_error(self, bits: int) -> float:
        """Returns the squared error with ``bits``-bit codes, up to a factor that all widths share."""
        if isinstance(self.quantizer, BucketLevelQuant):
            return relative_error(bits)
        top = float(self.quantizer.int_scaling_impl(torch.tensor(float(bits))))
        return 1 / top / top

    @property
    def _pads_with_zero(self) -> bool:
        return self._view.bucket_pad_zero

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
