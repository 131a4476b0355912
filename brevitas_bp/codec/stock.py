"""Codecs of Brevitas' own quantizers: integer and minifloat codes, packed."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from brevitas.utils.quant_utils import groupwise_dequant_expand
from torch import Tensor, nn

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.keep import Keep
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.packing import pack, unpack
from brevitas_bp.format.random import seeded
from brevitas_bp.format.reference import to_buckets
from brevitas_bp.format.spec import MAX_BIT_WIDTH


def stock_codec(quantizer: nn.Module) -> Codec:
    """Returns the codec of a stock ``tensor_quant``.

    Raises:
        UnsupportedQuantizerError: the quantizer computes no codes.
    """
    kind = kind_of(quantizer)
    if kind == "RescalingIntQuant":
        return StockIntCodec(quantizer)
    if kind == "FloatQuant":
        return StockFloatCodec(quantizer)
    reasons = {
        "ClampedBinaryQuant": "binary quantizers give signs and no integer codes",
        "BinaryQuant": "binary quantizers give signs and no integer codes",
        "TernaryQuant": "its ternary codes come from a threshold and have no scale and zero point"}
    raise UnsupportedQuantizerError(
        f"brevitas_bp.codec: cannot store what {kind} quantizes: "
        f"{reasons.get(kind, 'it is neither an integer nor a minifloat quantizer')}; use an integer "
        "quantizer, for instance one of brevitas_bp.quant")


def kind_of(module: nn.Module) -> str:
    """Returns the class name of a module, even if BREVITAS_JIT=1 has scripted it."""
    return getattr(module, "original_name", type(module).__name__)


def is_stateful(quantizer: nn.Module) -> bool:
    """Whether a quantizer learns or collects anything between calls."""
    return any(True for _ in quantizer.parameters()) or keeps_statistics(quantizer)


def keeps_statistics(quantizer: nn.Module) -> bool:
    """Whether a part of a quantizer collects statistics of the tensors that it quantizes."""
    names = ("collect_stats_steps", "running_stats", "first_batch")
    return any(hasattr(m, name) for m in quantizer.modules() for name in names)


class StockCodec(Codec):
    """The common part of stock codecs: finite input, flat packed codes, a NaN scale for bad values."""

    restores = FLOATS

    quantizer: Any
    bit_width: int
    #: Dimension that is split into groups; None: no groups.
    group_dim: int | None

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Quantizes and packs a float tensor."""
        if x.numel() == 0:
            return Keep().encode(x, where=where)
        layout = self.layout_of(x, where)
        base, poison = _finite_input(x)
        with torch.no_grad(), seeded(seed):
            codes, scale, *rest = self._quantize(base)
        tensors = (_pack_flat(codes, self.bit_width), scale.detach() + poison, *rest)
        beside = tuple(TensorType(tuple(t.shape), t.dtype) for t in tensors[1:])
        return Packed(self, tensors, layout, (tuple(codes.shape), beside), where)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        shape, beside = packed.facts
        layout, numel = packed.layout, torch.Size(shape).numel()
        inner = compute_dtype(layout.dtype) if layout.dtype.is_floating_point else None
        grouped = self.group_dim is None or _fits(shape, self.group_dim, layout.base_shape)
        if numel < layout.numel or beside[0].dtype != inner or not grouped:
            refuse(packed, f"codes {list(shape)} with a scale of {beside[0].dtype}", layout)
        return [TensorType.flat(-(-numel // 8) * self.bit_width), *beside]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return layout.numel * self.bit_width // 8

    def quantizers(self) -> Iterator[nn.Module]:
        yield self.quantizer

    @abstractmethod
    def _quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns uint8 codes, scale, and any other tensor to store.

        ``x`` is a contiguous float32 or float64 tensor.
        """


class StockIntCodec(StockCodec):
    """Integer quantizers (per tensor, per channel, per group, fixed point, MX): ``to_int`` codes.

    Scale and zero point are stored as they were, so a statistic that moves later changes nothing. 16-bit
    input is computed in float32, because Brevitas' epsilons would underflow in 16 bits.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.bit_width = _static_width(quantizer.msb_clamp_bit_width_impl())
        width = torch.tensor(float(self.bit_width))
        self.lowest = int(quantizer.int_quant.min_int(width))
        if any(kind_of(module) == "AbsMaxAve" for module in quantizer.modules()):
            raise UnsupportedQuantizerError(
                "brevitas_bp.codec: batch quantizers take their scale from the channels of batches of "
                "one rank, but saved tensors have any rank; use a per-tensor or per-bucket quantizer")
        self.group_dim = _group_dim(quantizer.int_quant.input_view_impl)
        self.name = f"{self.bit_width}-bit stock"

    def _quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        quantizer = self.quantizer
        width = quantizer.msb_clamp_bit_width_impl()
        scale = quantizer.scaling_impl(x, quantizer.int_scaling_impl(width))
        zero_point = quantizer.zero_point_impl(x, scale, width)
        codes = quantizer.int_quant.to_int(scale, zero_point, width, x)
        stored = torch.nan_to_num(codes - self.lowest).to(torch.uint8)
        return stored, scale, zero_point.detach().clone()

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and dequantizes: ``(q - zero_point) * scale``."""
        payload, scale, zero_point = packed.tensors
        codes = _unpack_flat(payload, self.bit_width, packed.facts[0])
        values = (codes.to(scale.dtype) + self.lowest - zero_point) * scale
        return _restore(values, scale, self.group_dim, packed.layout)


class StockFloatCodec(StockCodec):
    """Minifloat quantizers (FP8 in all flavours, MXFP): sign, exponent and mantissa bits.

    The code of a value ``v`` (divided by the scale) is exact: Brevitas has rounded ``v`` to the format.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        if not quantizer.float_clamp_impl.saturating:
            raise UnsupportedQuantizerError(
                "brevitas_bp.codec: a minifloat quantizer that does not saturate turns large values "
                "into Inf or NaN, which its codes do not hold; set saturating=True")
        self.exponent_bits = int(quantizer.exponent_bit_width_impl())
        self.mantissa_bits = int(quantizer.mantissa_bit_width_impl())
        self.bias = int(quantizer.exponent_bias_impl())
        self.bit_width = _static_width(1 + self.exponent_bits + self.mantissa_bits)
        self.group_dim = _group_dim(quantizer.input_view_impl)
        self.name = f"e{self.exponent_bits}m{self.mantissa_bits} stock"

    def _quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        quantizer = self.quantizer
        threshold = None
        mantissa = quantizer.compute_max_mantissa(quantizer.mantissa_bit_width_impl())
        exponent, bias = quantizer.exponent_bit_width_impl(), quantizer.exponent_bias_impl()
        if quantizer.float_scaling_impl is not None:
            threshold = quantizer.float_scaling_impl(exponent, mantissa, bias)
        scale = quantizer.scaling_impl(x, threshold)
        values, scale = quantizer.quantize(x, scale)
        values = quantizer.float_clamp_impl(values, exponent, mantissa, bias)[0]
        return self._to_codes(torch.nan_to_num(values)), scale

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and scales."""
        payload, scale = packed.tensors
        codes = _unpack_flat(payload, self.bit_width, packed.facts[0])
        values = self._from_codes(codes, scale.dtype) * scale
        return _restore(values, scale, self.group_dim, packed.layout)

    def _to_codes(self, values: Tensor) -> Tensor:
        magnitude, exponent = torch.frexp(values.abs())
        # frexp gives [0.5, 1) * 2**e. A minifloat is [1, 2) * 2**(e - 1), or subnormal below that.
        biased = (exponent - 1 + self.bias).clamp(min=1)
        unit = torch.ldexp(magnitude, exponent - biased + self.bias)
        mantissa = (unit * 2**self.mantissa_bits).to(torch.int32)
        implicit = 1 << self.mantissa_bits
        # A mantissa without the implicit bit belongs to exponent field 0.
        field = torch.where(mantissa >= implicit, biased, 0)
        code = (field << self.mantissa_bits) + (mantissa & (implicit - 1))
        return (code + (values.signbit().to(torch.int32) << (self.bit_width - 1))).to(torch.uint8)

    def _from_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes.to(torch.int32)
        mantissa = (codes & ((1 << self.mantissa_bits) - 1)).to(dtype)
        field = (codes >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = torch.where(field > 0, mantissa + 2**self.mantissa_bits, mantissa)
        values = torch.ldexp(mantissa, field.clamp(min=1) - self.bias - self.mantissa_bits)
        return torch.where(codes >> (self.bit_width - 1) > 0, -values, values)


class StatefulCodec(Codec):
    """Builds one quantizer per saved tensor, for quantizers that collect statistics.

    A shared quantizer would average the ranges of unrelated tensors. A tensor is identified by the
    operation and the module that save it, and by its order among their tensors. So layers may be
    skipped, and a new layer starts with new statistics. A checkpoint does not contain the statistics:
    they are collected anew. Copies and pickles of the codec (of the wrapper) contain them.
    """

    def __init__(self, build: Callable[[], Codec], name: str) -> None:
        self.build = build
        self.name = name
        self.slots: dict[Hashable, Codec] = {}

    @property
    def per_site(self) -> bool:
        return True

    def at_site(self, key: Hashable) -> Codec:
        """Returns the codec of the tensor that ``key`` identifies."""
        if key not in self.slots:
            self.slots[key] = self.build()
        return self.slots[key]

    def quantizers(self) -> Iterator[nn.Module]:
        """Yields the quantizers of all slots."""
        for slot in self.slots.values():
            yield from slot.quantizers()

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Encodes with the first slot."""
        return self.at_site(0).encode(x, seed=seed, where=where)

    def decode(self, packed: Packed) -> Tensor:
        """Decodes with the slot that encoded."""
        return packed.decode()


def _static_width(width: Any) -> int:
    bits = float(width)
    if bits != int(bits) or not 1 <= bits <= MAX_BIT_WIDTH:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: codes of 1..{MAX_BIT_WIDTH} bits can be stored, the quantizer has "
            f"{bits:g}; pass bit_width=8 or fewer")
    return int(bits)


def _group_dim(view: Any) -> int | None:
    return view.group_dim if kind_of(view) == "DynamicOverSubChannelBlockView" else None


def _fits(codes: Sequence[int], group_dim: int, shape: Sequence[int]) -> bool:
    """Whether codes [..., groups, size of a group, ...] belong to a tensor of this shape."""
    dim = group_dim % len(shape)
    groups, size = codes[dim:dim + 2]
    return (*codes[:dim], -(-shape[dim] // size), *codes[dim + 2:]) == (
        *shape[:dim], groups, *shape[dim + 1:])


def _finite_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``x`` with NaN and Inf set to 0, and a number that is NaN if ``x`` holds NaN or Inf.

    One bad value would stay in the statistics forever. A static scale would clip an Inf, and integer
    codes cannot hold a NaN. So bad values become 0 here, and the scale becomes NaN. This does not
    synchronise a device.
    """
    base = TensorLayout.base(x.detach()).to(compute_dtype(x.dtype)).contiguous()
    return torch.where(base.isfinite(), base, 0), (base * 0).sum()


def _pack_flat(codes: Tensor, bit_width: int) -> Tensor:
    return pack(to_buckets(codes.reshape(-1), None), bit_width).view(-1)


def _unpack_flat(payload: Tensor, bit_width: int, shape: tuple[int, ...]) -> Tensor:
    numel = torch.Size(shape).numel()
    size = -(-numel // 8) * 8
    return unpack(payload.view(1, -1), bit_width, size).view(-1)[:numel].view(shape)


def _restore(
        values: Tensor, scale: Tensor, group_dim: int | None, layout: TensorLayout) -> Tensor:
    """Undoes the quantizer's view of its input."""
    # A product with the scale may lie a rounding above the largest float.
    limit = torch.finfo(layout.dtype).max
    values = values.clamp(-limit, limit).to(layout.dtype)
    if group_dim is not None:
        values = groupwise_dequant_expand(
            values, scale, scale, group_dim, layout.base_shape, False)[0]
    if values.shape != layout.base_shape:
        # A stock quantizer with a flat-bucket view pads the last bucket.
        values = values.reshape(-1)[:layout.numel].view(layout.base_shape)
    return layout.restore(values)
