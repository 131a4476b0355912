"""A codec that chooses a bit width for each sample of a tensor."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.buckets import BucketCodec
from brevitas_bp.codec.derived import variants
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.quantized import codec_from
from brevitas_bp.core.bucket import memory_order
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.random import derive
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.codec.PerSampleCodec"


class _Facts(NamedTuple):
    """Static facts of a payload: what each width stored, and how many samples have that width."""

    parts: tuple[Packed, ...]
    counts: tuple[int, ...]


@final
class PerSampleCodec(Codec):
    """Gives the samples of a tensor (its first dimension) widths that average to ``average_bits``.

    :func:`greedy_widths` chooses the widths ``b_n``, which minimise the variance of rounding ::

        sum C_n / T(b_n)**2    subject to  sum b_n <= average_bits * N,    C_n = sum of R**2

    ``R`` is the range of each bucket, divided among samples by their elements in the bucket. ``T`` is
    the top code. The ordinary codec of a width stores the samples of that width one after another. Its
    buckets run on from one sample to the next.

    This codec is as unbiased as the codec of each width, because widths follow from ranges, not from the
    noise. If all samples have equal ranges, they get equal widths; the bytes are then those of the codec
    of that width, bit for bit. A bucket with NaN or Inf decodes to NaN and does not count. Tensors of
    fewer than two dimensions, expanded tensors and batches of one count as one sample.

    **Bytes** depend on the data only through:

    * the unused rest of the budget: less than one step between candidates for one sample,
    * one padded bucket for each width in use,
    * one byte per sample for its width, if there are several widths.

    **Costs** are a pass for the ranges, a copy of the tensor sorted by width, and on a device one wait
    for the ranges.

    Args:
        quantizer: config class of a bucket quantizer.
        average_bits: bits per element that the widths average to, without metadata.
        bit_widths: candidate widths.
        **settings: settings of the quantizer.

    Raises:
        ValueError: the average lies outside the candidates, there are fewer than two candidates, or the
            quantizer has no buckets.
        UnsupportedQuantizerError: the quantizer is not a bucket quantizer, has two widths, or remembers
            ranges of earlier tensors.

    Source: Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed
    Training", 2021, without its gradient magnitudes.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic
    >>> codec = PerSampleCodec(ShiftedUint2DynamicActPerBucketFloatStochastic, average_bits=2)
    >>> x = torch.linspace(-1, 1, 1024) * torch.logspace(0, 3, 8).unsqueeze(-1)
    >>> codec.widths(x).tolist()
    [1, 1, 1, 1, 2, 2, 4, 4]
    """

    restores = FLOATS

    def __init__(
            self,
            quantizer: Any,
            average_bits: float = 2,
            bit_widths: Sequence[int] = (1, 2, 3, 4, 8),
            **settings: Any) -> None:
        self.candidates = tuple(sorted({check_bit_width(_WHERE, bits) for bits in bit_widths}))
        self.average_bits = average_bits
        if len(self.candidates) < 2:
            raise ValueError(
                f"{_WHERE}: there is nothing to choose between the bit_widths {tuple(bit_widths)}; name "
                "two or more, or use the quantizer itself")
        if not self.candidates[0] <= average_bits <= self.candidates[-1]:
            raise ValueError(
                f"{_WHERE}: average_bits must lie between the smallest and the largest of bit_widths, "
                f"{self.candidates[0]} and {self.candidates[-1]}, got {average_bits!r}")
        codecs = {
            bits: _bucket_codec(codec_from(quantizer, bit_width=bits, **settings))
            for bits in self.candidates}
        self._codecs: dict[int, Codec] = {**codecs}
        recipe = codecs[self.candidates[0]].recipe
        assert recipe is not None
        self._made_from = recipe
        # Ranges are measured in buckets that run on from row to row.
        self._measure = codecs[self.candidates[0]]
        steps = torch.tensor(
            [codec.steps_in_range(bits) for bits, codec in codecs.items()], dtype=torch.float64)
        self._variance = 1 / steps / steps
        self.name = f"{average_bits:g}-bit average per sample"

    def widths(self, x: Tensor) -> Tensor:
        """Returns the width of each sample of ``x``, int64 on the CPU."""
        return self._widths(*_by_sample(x.detach(), TensorLayout.of(x)))

    def at_least(self, bits: int) -> Codec:
        """Returns this codec with no width below ``bits``; a codec of one width if no choice is left."""
        if self.candidates[0] >= bits:
            return self
        return variants.get(self, bits, lambda: self._at_least(bits))

    def _at_least(self, bits: int) -> Codec:
        recipe = self._made_from
        settings = {k: v for k, v in recipe.settings.items() if k != "bit_width"}
        widths = (bits, *(w for w in self.candidates if w > bits))
        if self.average_bits <= bits or len(widths) == 1:
            return codec_from(recipe.config, bit_width=bits, **settings)
        return PerSampleCodec(recipe.config, self.average_bits, widths, **settings)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Chooses widths, sorts the samples by width, and encodes the samples of each width."""
        layout = self.layout_of(x, where)
        flat, samples = _by_sample(x.detach(), layout)
        widths = self._widths(flat, samples)
        used: list[int] = widths.unique().tolist()
        if len(used) == 1:
            packed = self._codecs[used[0]].encode(flat, seed=seed, where=where)
            return Packed(self, packed.tensors, layout, _Facts((packed,), (samples,)), where)
        rows = flat.view(samples, -1)
        parts, counts = [], []
        for bits in used:
            chosen = (widths == bits).nonzero().view(-1)
            part = rows.index_select(0, chosen.to(flat.device)).view(-1)
            parts.append(self._codecs[bits].encode(part, seed=derive(seed, bits), where=where))
            counts.append(len(chosen))
        tensors = (*(t for p in parts for t in p.tensors), widths.to(torch.uint8).to(flat.device))
        return Packed(self, tensors, layout, _Facts(tuple(parts), tuple(counts)), where)

    def decode(self, packed: Packed) -> Tensor:
        """Decodes the samples of each width, and puts them back in order."""
        parts, counts, layout = _parts(packed), packed.facts.counts, packed.layout
        flat = parts[0].decode()
        if len(parts) > 1:
            rows = torch.cat([flat, *(part.decode() for part in parts[1:])]).view(sum(counts), -1)
            # The place of each sample, computed on the device, so that nothing waits for it.
            place = packed.tensors[-1].argsort(stable=True).argsort()
            flat = rows.index_select(0, place).view(-1)
        if _is_sample_major(layout):
            return layout.restore_flat(flat)
        return layout.restore(flat.view(layout.base_shape))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        parts, counts = packed.facts
        dtypes = {part.layout.dtype for part in parts}
        if sum(p.layout.numel for p in parts) != packed.layout.numel or dtypes != {
                packed.layout.dtype}:
            refuse(packed, f"{packed.layout.numel} elements of {dtypes}", packed.layout)
        # The parts compare their tensors with their layouts when they are decoded.
        types = [TensorType(tuple(t.shape), t.dtype) for part in parts for t in part.tensors]
        return [*types, TensorType.flat(sum(counts))] if len(parts) > 1 else types

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return self._codecs[self.candidates[0]].stored_nbytes(layout)

    def in_rows(self, length: int, last: int) -> Codec:
        other = copy.copy(self)
        other._codecs = {
            bits: codec.in_rows(length, last) for bits, codec in self._codecs.items()}
        return other

    def quantizers(self) -> Iterator[nn.Module]:
        for codec in self._codecs.values():
            yield from codec.quantizers()

    def _widths(self, flat: Tensor, samples: int) -> Tensor:
        if flat.numel() == 0:
            return torch.tensor(self.candidates[:1])
        total = int(self.average_bits * samples)
        size = self._measure.bucket_size
        assert size is not None
        costs = _shared_out(self._squared_ranges(flat), size, flat.numel(), samples)
        return greedy_widths(costs, total, self.candidates, self._variance)

    def _squared_ranges(self, flat: Tensor) -> Tensor:
        """Returns R**2 of the buckets of the whole tensor [n], float64 on the CPU, 0 if not finite."""
        squares = self._measure.ranges(flat).cpu().double().square()
        return torch.where(squares.isfinite(), squares, 0)


def _parts(packed: Packed) -> list[Packed]:
    """Returns the ``Packed`` of each width, with the tensors of ``packed``, which have been checked."""
    tensors, parts = packed.tensors, []
    for part in packed.facts.parts:
        parts.append(part.with_tensors(tensors))
        tensors = tensors[len(part.tensors):]
    return parts


def greedy_widths(
        costs: Tensor, total: int, bit_widths: Sequence[int], variance: Tensor) -> Tensor:
    """Returns widths [N] that minimise ``sum costs * variance(width)`` with ``sum widths <= total``.

    All samples start with the largest candidate. The algorithm lowers one width at a time, until the sum
    fits. It lowers the width whose next lowering adds the least variance for each bit that it frees.
    Among equals, it lowers the widest first (so that samples without cost share the bits), then the
    last.

    Each lowering of a sample adds more than the one before, so all lowerings can be sorted at once. The
    result is optimal for candidates one bit apart; otherwise less than one step is left over.

    Args:
        costs: [N], float64, not negative.
        total: bits to spend, at least N times the smallest candidate.
        bit_widths: candidates, ascending.
        variance: variance of rounding a unit range with each candidate [len(bit_widths)], falling and
            convex.

    >>> costs = torch.tensor([1000, 100, 10, 1, 0.1, 0.01], dtype=torch.float64)
    >>> widths = torch.arange(1, 9)
    >>> greedy_widths(costs, 12, widths.tolist(), (2.0**widths - 1)**-2.0).tolist()
    [4, 3, 2, 1, 1, 1]
    """
    n, widths = len(costs), torch.tensor(bit_widths).flip(0)
    freed = widths[:-1] - widths[1:]
    slope = variance.flip(0).diff() / freed
    # Row k holds the k-th lowering of all samples, last sample first. This order decides among equals.
    added = (costs.flip(0) * slope.unsqueeze(-1)).view(-1)
    order = added.argsort(stable=True)
    bits = freed.repeat_interleave(n)[order].cumsum(0)
    count = int((bits < n * bit_widths[-1] - total).sum()) + 1
    taken = torch.zeros(len(added), dtype=torch.bool)
    if n * bit_widths[-1] > total:
        taken[order[:count]] = True
    return widths[taken.view(-1, n).sum(0)].flip(0)


def _shared_out(squares: Tensor, bucket_size: int, numel: int, samples: int) -> Tensor:
    """Returns the cost [samples] of buckets [n], each divided among samples by their elements in it."""
    size = numel // samples
    # bincount adds one by one. sum() groups its terms differently on different processors. That changes
    # the last bit, and widths may depend on the last bit.
    if size % bucket_size == 0:
        return torch.arange(samples).repeat_interleave(len(squares) // samples).bincount(
            squares, minlength=samples)
    cuts = torch.cat([torch.arange(0, numel, bucket_size), torch.arange(0, numel, size)]).unique()
    lengths = torch.diff(cuts, append=torch.tensor([numel]))
    shares = squares[cuts // bucket_size] * lengths / bucket_size
    return (cuts // size).bincount(shares, minlength=samples)


def _by_sample(x: Tensor, layout: TensorLayout) -> tuple[Tensor, int]:
    """Returns the stored elements [numel], sample after sample, and the number of samples."""
    shape = layout.base_shape
    samples = shape[0] if len(shape) > 1 and layout.numel else 1
    if _is_sample_major(layout):
        return layout.flatten(x), samples
    return layout.base(x).resolve_neg().reshape(-1), samples


def _is_sample_major(layout: TensorLayout) -> bool:
    """Whether each sample is one run of the memory that :meth:`TensorLayout.flatten` reads."""
    order = memory_order(torch.empty_strided(layout.shape, layout.stride, device="meta"))
    return order is None or order[0] == 0


def _bucket_codec(codec: Codec) -> BucketCodec:
    if not isinstance(codec, BucketCodec) or len(codec.bit_widths) > 1 or not codec.measures_ranges:
        raise UnsupportedQuantizerError(
            f"{_WHERE}: expected a bucket quantizer of one width that takes its ranges from the tensor "
            f"at hand, got {codec.name!r}; use one of brevitas_bp.quant, without Mix or RunningRange, and "
            "not a RotatedNormal, whose levels have no range")
    if codec.bucket_size is None:
        raise ValueError(
            f"{_WHERE}: one bucket for all samples of a width would have the largest range of them; set "
            "bucket_size, for instance 256")
    return codec
