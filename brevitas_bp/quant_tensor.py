"""The quantized tensor that a bucket quantizer returns in the forward pass."""

from typing import Any, NamedTuple

import torch
from brevitas.quant_tensor.base_quant_tensor import QuantTensor, _unpack_quant_tensor
from torch import Tensor

from brevitas_bp.core.average import spread
from brevitas_bp.core.bucket import flatten, memory_order, unflatten
from brevitas_bp.format.arithmetic import reciprocal
from brevitas_bp.format.reference import to_buckets


def _plain(data: Any) -> Any:
    """Replaces quantized tensors in ``data`` with their values."""
    return _unpack_quant_tensor(data)


class _BucketwiseIntQuantTensorFields(NamedTuple):
    value: Tensor
    scale: Tensor
    zero_point: Tensor
    bucket_size: int | None
    bit_width: Tensor
    signed_t: Tensor
    training_t: Tensor
    average_size: int = 1
    has_codes: bool = True


class BucketwiseIntQuantTensor(_BucketwiseIntQuantTensorFields, QuantTensor):
    """A dequantized value with one scale, zero point and bit width per bucket.

    Buckets run along the flattened tensor, so no layer can propagate them. Every operation therefore
    returns a plain tensor, as Brevitas' groupwise tensors do.

    Attributes:
        value: dequantized tensor, any shape.
        scale: [N, 1], one per bucket.
        zero_point: [N, 1] or 0-d, in codes.
        bucket_size: elements of a bucket; None: the whole tensor is one bucket.
        bit_width: 0-d or [N, 1], bits.
        signed_t: 0-d bool.
        training_t: 0-d bool.
        average_size: neighbours along the last dimension that share one code.
        has_codes: values are codes times scale plus offset. They are not if buckets are rotated, codes
            are dithered, or levels are not equally far apart.
    """

    def __new__(
            cls, value: Tensor, scale: Tensor, zero_point: Tensor, bucket_size: int | None,
            bit_width: Tensor, signed: bool | Tensor,
            training: bool | Tensor, average_size: int = 1,
            has_codes: bool = True) -> "BucketwiseIntQuantTensor":
        return super().__new__(
            cls, value, scale, zero_point, bucket_size, bit_width, torch.as_tensor(signed),
            torch.as_tensor(training), average_size, has_codes)

    @property
    def signed(self) -> bool:
        """Whether codes are signed."""
        return bool(self.signed_t)

    @property
    def training(self) -> bool:
        """Whether the quantizer was in training mode."""
        return bool(self.training_t)

    @property
    def tensor(self) -> Tensor:
        """The dequantized value."""
        return self.value

    @property
    def device(self) -> torch.device:
        """Device of the value."""
        return self.value.device

    def int(self, float_datatype: bool = False) -> Tensor:
        """Returns the codes in the shape of the value, recomputed from the value.

        ``tensor_quant.quantize`` is faster.

        Raises:
            RuntimeError: the values do not determine the codes.
        """
        if not self.has_codes:
            raise RuntimeError(
                "brevitas_bp.BucketwiseIntQuantTensor.int: codes cannot be recomputed from values that "
                "were rotated, dithered or rounded to levels; use the values, or store the tensor with "
                "codec_from(config), which keeps the codes")
        values = self._stored().to(self.scale.dtype)
        buckets = to_buckets(flatten(values), self.bucket_size)
        codes = torch.round(buckets * reciprocal(self.scale) + self.zero_point)
        codes = unflatten(codes.reshape(-1)[:values.numel()], values)
        if self.average_size > 1:
            length = self.value.shape[-1] if self.value.dim() else 1
            flat = spread(codes, self.average_size, length, memory_order(self.value))
            codes = unflatten(flat, self.value)
        return codes if float_datatype else codes.to(torch.int32)

    def _stored(self) -> Tensor:
        """Returns the values that have their own code: all, or one of each averaged group."""
        if self.average_size == 1:
            return self.value
        value = self.value if self.value.dim() else self.value.reshape(1)
        return value[..., ::self.average_size].contiguous()

    @classmethod
    def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Do not use Brevitas' handlers: some would pass on metadata that belongs to other elements.
        return func(*_plain(args), **_plain(kwargs or {}))

    def view(self, *shape: Any) -> Tensor:
        """Returns a view of the value."""
        return self.value.view(*shape)

    def reshape(self, *shape: Any) -> Tensor:
        """Returns the reshaped value."""
        return self.value.reshape(*shape)

    def flatten(self, *dims: Any, **kwargs: Any) -> Tensor:
        """Returns the flattened value."""
        return self.value.flatten(*dims, **kwargs)

    def contiguous(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the value in row-major order, which its buckets no longer follow."""
        return self.value.contiguous()

    def transpose(self, *dims: Any) -> Tensor:
        """Returns the transposed value."""
        return self.value.transpose(*dims)

    def permute(self, *dims: Any) -> Tensor:
        """Returns the permuted value."""
        return self.value.permute(*dims)

    def __neg__(self) -> Tensor:
        return -self.value

    def __abs__(self) -> Tensor:
        return abs(self.value)

    def __add__(self, other: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.value + _plain(other)

    def __mul__(self, other: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.value * _plain(other)

    def __truediv__(self, other: Any) -> Tensor:
        return self.value / _plain(other)
