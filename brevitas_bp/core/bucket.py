"""The flat-bucket view of a tensor."""

from torch import Tensor, nn

from brevitas_bp.format.reference import to_buckets
from brevitas_bp.format.spec import check_bucket_size
from brevitas_bp.format.stages import NEUTRAL, Neutral


def memory_order(x: Tensor) -> list[int] | None:
    """Returns dimensions from the slowest to the fastest in memory; None if that is their own order.

    Buckets run along memory, so a channels_last tensor is read without a copy.

    >>> import torch
    >>> memory_order(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    [0, 2, 3, 1]
    """
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return None if order == list(range(x.dim())) else order


def flatten(x: Tensor) -> Tensor:
    """Returns all elements of ``x`` in memory order, 1-D; a view if ``x`` is dense."""
    order = memory_order(x)
    return (x if order is None else x.permute(order)).reshape(-1)


def unflatten(flat: Tensor, like: Tensor) -> Tensor:
    """Inverts :func:`flatten`: the result has the shape and the memory layout of ``like``."""
    order = memory_order(like)
    if order is None:
        return flat.view(like.shape)
    inverse = [order.index(d) for d in range(len(order))]
    return flat.view([like.shape[d] for d in order]).permute(inverse)


class OverBucketView(nn.Module):
    """Views a tensor as buckets [N, B] of consecutive elements. Fills ``input_view_impl``.

    The tensor is flattened in memory order. The last bucket is padded by repeating the last element,
    which changes no minimum, maximum or magnitude. For norms it is padded with zeros. A contiguous
    [N, B] tensor is its own view, so the module may be applied twice.

    Args:
        bucket_size: elements of a bucket, a positive multiple of 8; None makes one bucket.
        bucket_pad_zero: pads with zeros.

    Raises:
        ValueError: ``bucket_size`` is not a positive multiple of 8.

    >>> import torch
    >>> OverBucketView(8)(torch.arange(10.0)).tolist()[1]
    [8.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    """

    def __init__(self, bucket_size: int | None, bucket_pad_zero: bool = False) -> None:
        super().__init__()
        self.bucket_size = check_bucket_size("brevitas_bp.core.OverBucketView", bucket_size)
        self.bucket_pad_zero = bucket_pad_zero

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "input_view_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        """Views ``x`` [any shape] as [N, B]."""
        if x.dim() == 2 and x.is_contiguous() and self._is_bucketed(x):
            return x
        return to_buckets(flatten(x), self.bucket_size, self.bucket_pad_zero)

    def _is_bucketed(self, x: Tensor) -> bool:
        if self.bucket_size is None:
            return x.shape[0] == 1 and x.shape[1] % 8 == 0
        return x.shape[1] == self.bucket_size
