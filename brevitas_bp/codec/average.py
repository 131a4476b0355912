"""The codec that averages groups of neighbours and stores the averages with another codec."""

from collections.abc import Hashable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.core.average import check_average_size, group_means, spread, to_dtype
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.averages import group_count
from brevitas_bp.kernels import dispatch


@final
class AverageCodec(Codec):
    """Stores the mean of every ``average_size`` neighbours along the last dimension, with ``inner``.

    Each element of a group decodes to the stored mean of the group. This codec computes the same values
    as :class:`~brevitas_bp.core.average.AverageQuant`; see there for groups, bias and edges.

    **Gradients of weights are biased**: with an averaged input, the gradient of a linear or convolution
    weight is the gradient for an input whose neighbours are equal. So the op-aware policy does not
    average tensors whose error passes on to other layers (derivatives, factors, attention); see
    :attr:`per_element`.

    Args:
        inner: codec of the means, which are float32 (float64 for float64) and contiguous.
        average_size: elements of a group.
    """

    restores = FLOATS
    #: Means of a row have buckets of their own.
    bucket_elements = 0

    def __init__(self, inner: Codec, average_size: int) -> None:
        self.inner = inner
        self.average_size = check_average_size("brevitas_bp.codec.AverageCodec", average_size)
        self.bit_widths = inner.bit_widths
        self.stores_differences = inner.stores_differences
        self.in_graphs = inner.in_graphs
        self.name = f"{inner.name}, means of {average_size}"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Averages ``x``, then encodes the averages."""
        layout = self.layout_of(x, where)
        # Kernels read memory, and memory does not show a lazy negation.
        base = TensorLayout.base(x.detach()).resolve_neg()
        means = group_means(base, self.average_size, dispatch.group_means)
        stored = self.inner.encode(means, seed=seed, where=where)
        return Packed(self, stored.tensors, layout, stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Decodes the averages, and repeats each one for its group."""
        layout = packed.layout
        # The inner ``Packed`` gets the tensors stored now, so that its decode checks these.
        stored = packed.facts.with_tensors(packed.tensors)
        length = layout.base_shape[-1] if layout.base_shape else 1
        order = sorted(range(len(layout.stride)), key=lambda d: -layout.stride[d])
        with torch.no_grad():
            means = to_dtype(stored.decode(), layout.dtype)
            flat = spread(means, self.average_size, length, order, dispatch.spread)
        return layout.restore_flat(flat)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        stored, means = packed.facts, self._layout_of_means(packed.layout)
        if not packed.layout.dtype.is_floating_point:
            refuse(packed, "a tensor of floats", packed.layout)
        if (stored.layout.shape, stored.layout.dtype) != (means.shape, means.dtype):
            refuse(packed, f"means {means.dtype} {list(means.shape)}", stored.layout)
        return stored.codec.tensor_types(stored)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return self.inner.stored_nbytes(self._layout_of_means(layout))

    def graph_key(self) -> Hashable | None:
        inner = self.inner.graph_key()
        return None if inner is None else (self.average_size, inner)

    def in_rows(self, length: int, last: int) -> Codec:
        if length % last:
            return self
        groups = group_count(last, self.average_size)
        return AverageCodec(self.inner.in_rows(length // last * groups, groups), self.average_size)

    @property
    def per_element(self) -> Codec:
        """The codec that stores the averages."""
        return self.inner

    @property
    def for_factors(self) -> Codec:
        return self.inner.for_factors

    def variant(
            self, bits: int, bucket_size: int | None = None, average_size: int = 1) -> Codec | None:
        return self.inner.variant(bits, bucket_size, average_size)

    def at_least(self, bits: int) -> Codec:
        return self.inner.at_least(bits)

    def quantizers(self) -> Iterator[nn.Module]:
        return self.inner.quantizers()

    def in_graph(self, x: GraphTensor) -> GraphForm | None:
        # Graphs have no groups across channels. They store elements with codes of the same width.
        return self.inner.in_graph(x)

    def _layout_of_means(self, layout: TensorLayout) -> TensorLayout:
        shape = layout.base_shape or torch.Size((1,))
        shape = torch.Size((*shape[:-1], group_count(shape[-1], self.average_size)))
        return TensorLayout(shape, (), shape, compute_dtype(layout.dtype), layout.device)
