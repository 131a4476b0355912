"""Finds the rows of a saved tensor: elements that backward multiplies by the same gradients.

See NOTE [ Rows ] in :mod:`brevitas_bp.codec.rows`. Each function here takes a saved tensor, or its local
shard, and the call that saves it. It returns the rows, or None if buckets may lie anywhere.
"""

from collections.abc import Callable
from math import prod

from torch import Tensor

from brevitas_bp.backward.saved import Call, tensors_in
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.rows import Rows

RowsOf = Callable[[Tensor, Call], Rows | None]

#: Least elements of a row, and of a plane of an image, for which separate buckets are worth their bytes.
#: Shorter rows share buckets with the rows beside them.
LEAST_ROW, LEAST_PLANE = 16, 40


def last_dimension(x: Tensor, call: Call) -> Rows | None:
    """Returns the rows of the last dimension, such as the features of a token."""
    return _wide_enough(x, 1)


def of_matrix(x: Tensor, call: Call) -> Rows | None:
    """Returns the rows of a factor of a matrix product; columns, if these are consecutive in memory.

    If a matrix is passed transposed, its columns were rows when it was computed.
    """
    base = TensorLayout.base(x)
    if base.dim() >= 2 and base.shape[-1] > 1 and base.stride(-2) == 1 and (
            base.stride(-1) >= base.shape[-2] >= LEAST_ROW):
        length = base.shape[-2]
        steps = [base.stride(d) for d in range(base.dim() - 2) if base.shape[d] > 1]
        if all(step >= length for step in steps):
            return Rows(length, length)
    return last_dimension(x, call)


def of_elements(x: Tensor, call: Call) -> Rows | None:
    """Returns the rows of a factor of an elementwise product.

    A row spans the dimensions along which the other factor is broadcast, because backward sums over them
    into one gradient. Otherwise a row is the last dimension; in images, it is at least a plane. In
    images with small planes, a row is a sample.
    """
    dims = 0
    for other in tensors_in(call.arguments[:2]):
        if other.numel() < x.numel() and other.dim() <= x.dim():
            shape = (1,) * (x.dim() - other.dim()) + tuple(other.shape)
            while dims < x.dim() and shape[-1 - dims] == 1:
                dims += 1
    dims = max(dims, 1)
    while dims < x.dim() - 2 and prod(x.shape[-dims:]) < LEAST_PLANE:
        dims += 1
    if dims == x.dim() - 2 > 1 and prod(x.shape[-dims:]) < LEAST_PLANE:
        dims += 1
    base = TensorLayout.base(x)
    if not base.is_contiguous() and base.dim() > 2 and base.stride(1) == 1:
        # Channels last: copying would cost more than it is worth.
        return Rows(base.numel() // base.shape[0], base.shape[-1])
    return _wide_enough(x, dims)


def of_halves(dim_of: Callable[[Call], int]) -> RowsOf:
    """Makes a function that returns, as rows, the halves of the dimension that a call halves (``glu``).

    The derivatives of the two halves differ by any factor.
    """
    def rows(x: Tensor, call: Call) -> Rows | None:
        dim = dim_of(call) % x.dim()
        if not x.is_contiguous():
            return of_elements(x, call)
        half = prod(x.shape[dim:]) // 2
        return Rows(half, x.shape[-1]) if half >= LEAST_ROW else None

    return rows


def _wide_enough(x: Tensor, dims: int) -> Rows | None:
    """Returns rows of the last ``dims`` dimensions, or of more if these have too few elements."""
    while dims < x.dim() and prod(x.shape[-dims:]) < LEAST_ROW:
        dims += 1
    # If tiny rows have grown to the whole tensor, they need no separate buckets.
    return None if dims == x.dim() > 1 else trailing(x, dims)


def trailing(x: Tensor, dims: int) -> Rows | None:
    """Returns rows of the last ``dims`` dimensions, in their own order."""
    base = TensorLayout.base(x)
    if base.dim() == 0:
        return None
    length = prod(base.shape[-dims:])
    last = base.shape[-1]
    if length == 0 or base.is_contiguous():
        return Rows(length, last) if length else None
    # The layout closes gaps between rows, so only the order of the dimensions counts.
    order = tuple(range(base.dim()))
    wide = [base.stride(d) for d in order if base.shape[d] > 1]
    in_order = wide == sorted(wide, reverse=True)
    return Rows(length, last, None if in_order else order)


def convolved(x: Tensor, call: Call) -> Rows | None:
    """Returns the rows of a convolution's input: a sample, or a sample's part in one group.

    Backward multiplies all channels of a group by the same gradients.
    """
    base = TensorLayout.base(x)
    spatial = _spatial(call)
    if spatial is None or base.dim() < spatial + 1:
        return trailing(x, 1)
    channels, plane = base.shape[-spatial - 1], prod(base.shape[-spatial:])
    groups = _groups(call)
    length = channels // groups * plane if groups > 1 and channels % groups == 0 else channels * plane
    if length == 0:
        return None
    if groups > 1 and shares_planes(x, call):
        length = channels * plane
    if groups > 1 and length < channels * plane:
        # The channels of a group must lie together in memory.
        rows = trailing(x, spatial + 1)
        return None if rows is None else rows._replace(length=length)
    # The dimensions of a sample may lie in any order.
    if base.dim() == spatial + 1 or base.shape[0] == 1 or base.stride(0) >= length:
        return Rows(length, base.shape[-1])
    return trailing(x, spatial + 1)


#: Least bits of the input of the network. It has few elements, and its layer has much of the gradient:
#: the input of a ResNet-50 has 1 % of the bytes and would make half of the error.
INPUT_BITS = 4


def is_small_input(x: Tensor, call: Call) -> bool:
    """Whether a layer's input needs no gradient, and has half the elements of the output at most.

    So is an image, and what frozen layers compute.
    """
    weight = call.argument(1, "weight")
    if x.requires_grad or not isinstance(weight, Tensor):
        return False
    if call.name == "linear" and weight.dim() == 2:
        return weight.shape[0] >= 2 * weight.shape[1]
    spatial = _spatial(call)
    if spatial is None or call.name != f"conv{spatial}d":
        return False
    stride = call.argument(3, "stride", 1)
    steps = prod(stride) ** (spatial if len(stride) == 1 else 1) if isinstance(
        stride, (tuple, list)) else stride**spatial
    return weight.shape[0] >= 2 * weight.shape[1] * _groups(call) * steps


def shares_planes(x: Tensor, call: Call) -> bool:
    """Whether the groups of a convolution have too few elements for buckets of their own.

    This is also true if the channels of a group do not lie together in memory. The gradients of two
    groups may differ by any factor. So the input then has to be stored in units of its channels.
    """
    spatial, groups = _spatial(call), _groups(call)
    if spatial is None or groups == 1 or x.dim() != spatial + 2:
        return False
    length = x.shape[1] // groups * prod(x.shape[2:])
    return length < LEAST_PLANE or (x.stride(1) == 1 and not x.is_contiguous())


def _spatial(call: Call) -> int | None:
    """Returns the number of an image's dimensions, from the shape [out, in, ...] of the weight."""
    weight = call.argument(1, "weight")
    return weight.dim() - 2 if isinstance(weight, Tensor) and weight.dim() > 2 else None


def _groups(call: Call) -> int:
    groups = call.argument(8 if call.name.strip("_") == "convolution" else 6, "groups", 1)
    return groups if isinstance(groups, int) else 1
