"""Codecs that store some of the elements of each bucket: the largest ones, or random ones."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import (
    FallbackCodec,
    check_share,
    check_size,
    fallback_from,
    half_dtype,
    to_half,
)
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.arithmetic import compute_dtype, to_random, to_range
from brevitas_bp.format.random import METADATA, ROTATION, noise_keys, words_

# Indices are stored in 8 or 16 bits.
_LARGEST_BUCKET = 1 << 15


class SparseCodec(FallbackCodec):
    """Stores ``k`` elements of each bucket; all others decode to 0.

    Buckets are equal parts of a row, consecutive in memory. Without rows, they are parts of the whole
    tensor. ``k`` is ``kept`` times the elements of a bucket, rounded to the nearest integer, and at
    least 1. A bucket with NaN or Inf decodes to NaN. An empty tensor is left to the fallback.

    Args:
        kept: share of the elements that is kept, in (0, 1].
        bucket_size: largest number of elements of a bucket.
        fallback: codec or quantizer of other tensors than inputs of layers; None: plain stochastic 2
            bits.
    """

    def __init__(self, kept: float, bucket_size: int, fallback: Any) -> None:
        where = f"brevitas_bp.codec.{type(self).__name__}"
        self.kept = check_share(where, "kept", kept)
        self.bucket_size = check_size(where, "bucket_size", bucket_size)
        if bucket_size > _LARGEST_BUCKET:
            raise ValueError(
                f"{where}: bucket_size must be at most {_LARGEST_BUCKET}, or indices would not fit into "
                f"16 bits, got {bucket_size}")
        super().__init__(fallback_from(where, fallback))
        self._row: int | None = None

    def with_fallback(self, fallback: Codec) -> "SparseCodec":
        return type(self)(self.kept, bucket_size=self.bucket_size, fallback=fallback)

    def in_rows(self, length: int, last: int) -> Codec:
        other = self.with_fallback(self.fallback.in_rows(length, last))
        other._row = length
        return other

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores the chosen elements of each bucket."""
        layout = self.layout_of(x, where)
        if layout.numel == 0:
            return self.fallback.encode(x, seed=seed, where=where)
        with torch.no_grad():
            buckets = self._buckets(layout.flatten(x.detach()), layout)
            values, *places = self._choose(buckets, self._sizes(layout)[2], seed, x.dtype)
            unknown = (buckets * 0).sum(1, keepdim=True).isnan()
            stored = to_half(torch.where(unknown, torch.nan, values), x.dtype)
        return Packed(self, (stored, *places), layout, seed, where)

    def decode(self, packed: Packed) -> Tensor:
        """Puts the stored elements in their places."""
        layout = packed.layout
        rows, size, kept = self._sizes(layout)
        with torch.no_grad():
            values = packed.tensors[0].to(compute_dtype(layout.dtype))
            out = values.new_zeros((len(values), size))
            out.scatter_(1, self._places(packed, size, kept), values * self._factor(size, kept))
            # 0 times NaN is NaN: a bucket with NaN decodes to NaN as a whole.
            out += values[:, :1] * 0
            flat = to_range(out, layout.dtype).view(rows, -1)
        return layout.restore_flat(flat[:, :self._length(layout)].reshape(-1))

    @abstractmethod
    def _choose(
            self, buckets: Tensor, kept: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the chosen values [n, kept] of buckets [n, size], and tensors that hold the places.

        ``dtype`` is the dtype of the tensor; buckets are in its compute dtype.
        """

    @abstractmethod
    def _places(self, packed: Packed, size: int, kept: int) -> Tensor:
        """Returns the places of the stored values in their buckets, int64 [n, kept]."""

    def _factor(self, size: int, kept: int) -> float:
        """Returns the factor of stored values."""
        return 1.0

    def _types(self, n: int, size: int, kept: int) -> list[TensorType]:
        """Returns the types of the tensors that hold the places."""
        return []

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        if not layout.dtype.is_floating_point:
            refuse(packed, "a tensor of floats", layout)
        rows, size, kept = self._sizes(layout)
        n = rows * self._per_row(layout)
        return [TensorType((n, kept), half_dtype(layout.dtype)), *self._types(n, size, kept)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        if layout.numel == 0:
            return self.fallback.stored_nbytes(layout)
        rows, size, kept = self._sizes(layout)
        n = rows * self._per_row(layout)
        types = self._types(n, size, kept)
        return n * kept * (half_dtype(layout.dtype).itemsize + sum(t.dtype.itemsize for t in types))

    def _length(self, layout: TensorLayout) -> int:
        """Returns the elements of a row."""
        if self._row is None or layout.numel % self._row:
            return layout.numel
        return self._row

    def _per_row(self, layout: TensorLayout) -> int:
        return -(-self._length(layout) // self.bucket_size)

    def _sizes(self, layout: TensorLayout) -> tuple[int, int, int]:
        """Returns the number of rows, the elements of a bucket, and how many of them are kept."""
        length = self._length(layout)
        size = -(-length // self._per_row(layout))
        return layout.numel // length, size, max(round(self.kept * size), 1)

    def _buckets(self, flat: Tensor, layout: TensorLayout) -> Tensor:
        """Returns buckets [n, size] in the compute dtype; rows are padded with zeros."""
        rows, size, _ = self._sizes(layout)
        x = flat.to(compute_dtype(flat.dtype)).view(rows, self._length(layout))
        missing = self._per_row(layout) * size - self._length(layout)
        return torch.nn.functional.pad(x, (0, missing)).view(-1, size)


@final
class TopKCodec(SparseCodec):
    """Stores the elements of largest magnitude of each bucket, with their indices.

    **Biased**: small elements decode to 0 at every step. So the policy uses this code only for tensors
    that reach the gradient of one weight, and the fallback for all others.

    **Bytes**: for each kept element 2 bytes of value (bfloat16, or the own 16-bit dtype; 8 bytes for
    float64), and 1 byte of index, or 2 bytes if the bucket has more than 256 elements. With ``kept`` of
    1/12 and buckets of 256, that is 2 bits for each element.

    Args:
        kept: share of the elements that is kept, in (0, 1].
        bucket_size: largest number of elements of a bucket.
        fallback: codec or quantizer of other tensors; None: plain stochastic 2 bits.

    Raises:
        ValueError: an argument is out of range.

    >>> x = torch.tensor([1.0, -8.0, 0.5, 3.0])
    >>> TopKCodec(0.5, bucket_size=4).encode(x, seed=0).decode().tolist()
    [0.0, -8.0, 0.0, 3.0]
    """

    def __init__(self, kept: float = 1 / 12, *, bucket_size: int = 256, fallback: Any = None) -> None:
        super().__init__(kept, bucket_size, fallback)
        self.name = f"largest {self.kept:.3g}"

    def _choose(
            self, buckets: Tensor, kept: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        places = buckets.abs().topk(kept, dim=1).indices
        return buckets.gather(1, places), places.to(_index_dtype(buckets.shape[1]))

    def _places(self, packed: Packed, size: int, kept: int) -> Tensor:
        # A corrupt index must not write outside of its bucket.
        return packed.tensors[1].long().clamp(0, size - 1)

    def _types(self, n: int, size: int, kept: int) -> list[TensorType]:
        return [TensorType((n, kept), _index_dtype(size))]


@final
class RandomKCodec(SparseCodec):
    """Stores random elements of each bucket, multiplied by ``size / k`` when they are decoded.

    **Unbiased**: each element is kept with probability ``k / size``, and values are rounded to 16 bits
    at random. But the error is large: ``E |x~ - x|^2 = (size / k - 1) |x|^2``. The indices are not
    stored: decoding draws them again from the seed.

    **Bytes**: 2 bytes for each kept element (8 for float64). With ``kept`` of 1/8, that is 2 bits for
    each element.

    Args:
        kept: share of the elements that is kept, in (0, 1].
        bucket_size: largest number of elements of a bucket.
        fallback: codec or quantizer of other tensors; None: plain stochastic 2 bits.

    Raises:
        ValueError: an argument is out of range.

    >>> packed = RandomKCodec(0.25, bucket_size=4).encode(torch.ones(8), seed=0)
    >>> packed.decode().view(2, 4).sum(1).tolist(), packed.nbytes
    ([4.0, 4.0], 4)
    """

    def __init__(self, kept: float = 1 / 8, *, bucket_size: int = 256, fallback: Any = None) -> None:
        super().__init__(kept, bucket_size, fallback)
        self.name = f"random {self.kept:.3g}"

    def _choose(
            self, buckets: Tensor, kept: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        places = _random_places(seed, len(buckets), buckets.shape[1], kept, buckets.device)
        values = buckets.gather(1, places)
        if half_dtype(dtype) is not dtype:
            words = words_(_index(values.numel(), values.device), noise_keys(seed, METADATA))
            values = to_random(
                values.abs(), torch.bfloat16, words.view(values.shape)).copysign(values)
        return (values,)

    def _places(self, packed: Packed, size: int, kept: int) -> Tensor:
        values = packed.tensors[0]
        return _random_places(packed.facts, len(values), size, kept, values.device)

    def _factor(self, size: int, kept: int) -> float:
        return size / kept


def _index_dtype(size: int) -> torch.dtype:
    return torch.uint8 if size <= 256 else torch.int16


def _index(numel: int, device: torch.device) -> Tensor:
    """Returns flat indices modulo 2**32, as the bits of int32."""
    return torch.arange(numel, dtype=torch.int64, device=device).to(torch.int32)


def _random_places(seed: int, n: int, size: int, kept: int, device: torch.device) -> Tensor:
    """Returns ``kept`` distinct places in each of ``n`` buckets, int64 [n, kept]."""
    words = words_(_index(n * size, device), noise_keys(seed, ROTATION)).view(n, size)
    # The lower bits tell equal words apart, so every backend chooses the same places.
    keys = (words.long() << 16) + torch.arange(size, device=device)
    return keys.topk(kept, dim=1).indices
