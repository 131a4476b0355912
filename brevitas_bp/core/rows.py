"""Quantizers of the rows of a matrix: one scale for each row, with or without a mixing of rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from brevitas_bp.core.bucket import memory_order
from brevitas_bp.core.householder import RowHouseholder
from brevitas_bp.format.arithmetic import compute_dtype


class OverRowView(nn.Module):
    """Views a tensor as one bucket for each index of its first dimension. Fills ``input_view_impl``.

    A matrix is its own view. Rows have any length.

    >>> OverRowView()(torch.zeros(5, 3, 2)).shape
    torch.Size([5, 6])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Views ``x`` [N, ...] as [N, D]; a vector or a scalar is one row."""
        return x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)


class RowQuant(nn.Module):
    """Quantizes a tensor as a matrix of rows. Fills ``tensor_quant``.

    The rows are the indices of ``row_dim``; all other dimensions are merged: [N, D]. The inner quantizer
    gets this matrix. With ``mix_rows``, it gets the matrix after a
    :class:`~brevitas_bp.core.householder.RowHouseholder` transform, which is undone afterwards.

    The result has the shape, dtype and memory layout of the input. A vector or a scalar is one row. An
    empty tensor is returned as it is. NaN or Inf makes all elements of its row NaN. If rows are mixed,
    it makes all elements NaN.

    Args:
        bucket_quant: quantizes the matrix; a bucket quantizer.
        row_dim: dimension whose indices are the rows.
        mix_rows: whether rows are mixed.

    Raises:
        IndexError: the tensor has fewer dimensions than ``row_dim`` needs; raised by the call.
    """

    def __init__(self, bucket_quant: nn.Module, row_dim: int = 0, mix_rows: bool = False) -> None:
        super().__init__()
        self.bucket_quant = bucket_quant
        self.row_dim = row_dim
        self.mix_rows = mix_rows
        self.observer_only = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns value, and scale, zero point and bit width of the inner quantizer."""
        if x.numel() == 0:
            return self.bucket_quant(x)
        metadata: list[Tensor] = []

        def quantize(rows: Tensor) -> Tensor:
            value, *metadata[:] = self.bucket_quant(rows)
            return value

        value = self.apply_to_rows(x, quantize)
        scale, zero_point, bit_width = metadata
        return value, scale, zero_point, bit_width

    def apply_to_rows(self, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns ``quantize`` of the rows of ``x``, mixed if they are to be, in the shape of ``x``.

        Args:
            x: any shape with at least one element.
            quantize: rows [N, D] -> values [N, D], in the compute dtype.
        """
        order = self._order(x)
        moved = x.permute(order)
        rows = moved.reshape(moved.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
        rows = rows.to(compute_dtype(x.dtype)).contiguous()
        if self.mix_rows and len(rows) > 1:
            transform = RowHouseholder.of(rows.detach())
            values = transform.inverse(quantize(transform.forward(rows)))
        else:
            values = quantize(rows)
        limit = torch.finfo(x.dtype).max
        values = values.clamp(-limit, limit).to(x.dtype).view(moved.shape)
        values = values.permute([order.index(d) for d in range(x.dim())])
        return values if values.stride() == x.stride() else torch.empty_like(x).copy_(values)

    def _order(self, x: Tensor) -> list[int]:
        """Returns the dimensions with ``row_dim`` first, the others as they lie in memory."""
        if x.dim() < 2:
            return list(range(x.dim()))
        if not -x.dim() <= self.row_dim < x.dim():
            raise IndexError(
                f"brevitas_bp.core.RowQuant: row_dim={self.row_dim} needs a tensor with that dimension, "
                f"got the shape {list(x.shape)}; use a quantizer with row_dim=0 or per tensor")
        row = self.row_dim % x.dim()
        return [row, *(d for d in memory_order(x) or range(x.dim()) if d != row)]

    def extra_repr(self) -> str:
        return f"row_dim={self.row_dim}, mix_rows={self.mix_rows}"
