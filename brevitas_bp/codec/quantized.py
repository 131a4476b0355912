"""Any Brevitas activation quantizer -> codes -> bytes."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.base import Codec, Keep, Packed
from brevitas_bp.codec.integrity import Form, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.lowering import lower
from brevitas_bp.codec.recipe import Recipe
from brevitas_bp.codec.stock import (
    StatefulCodec,
    is_stateful,
    keeps_statistics,
    kind_of,
    stock_codec,
)
from brevitas_bp.core.average import AverageQuant
from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.kernels.arithmetic import compute_dtype, stored_metadata_dtype, to_metadata
from brevitas_bp.kernels.dispatch import decode, encode
from brevitas_bp.kernels.packing import pack, packed_nbytes, unpack
from brevitas_bp.kernels.random import seeded
from brevitas_bp.kernels.reference import Encoded, bucket_shape, draw_layout, payload_nbytes
from brevitas_bp.kernels.spec import BucketQuantSpec
from brevitas_bp.kernels.widths import WidthLayout
from brevitas_bp.proxy import check_override_names


class LoweredCodec(Codec):
    """A bucket quantizer of known parts: one kernel from values to bytes.

    Args:
        quantizer: asked for the probability of its second width at each encode.
        spec: its lowered form.
    """

    def __init__(self, quantizer: BucketRescalingIntQuant, spec: BucketQuantSpec) -> None:
        self.quantizer = quantizer
        self.spec = spec
        self.name = codec_name(spec.bit_widths, spec.stochastic)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Quantizes and packs a float tensor."""
        layout = TensorLayout.of(x)
        spec = self._current_spec()
        encoded = encode(layout.flatten(x.detach()), spec, seed)
        return Packed(self, encoded.tensors, layout, (spec, seed), where)

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and dequantizes."""
        spec, seed = packed.facts
        tensors = packed.tensors
        encoded = Encoded(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)
        flat = decode(encoded, spec, seed, packed.layout.numel, packed.layout.dtype)
        return packed.layout.restore_flat(flat)

    def forms(self, packed: Packed) -> Sequence[Form]:
        (spec, seed), own = packed.facts, self.spec
        if spec is not own and replace(spec, mix_prob=own.mix_prob) != own:
            refuse(packed, own, spec)
        dtype = _float_dtype(packed)
        n, size = bucket_shape(packed.layout.numel, spec.bucket_size)
        metadata = Form.flat(n, stored_metadata_dtype(spec.metadata_dtype, compute_dtype(dtype)))
        codes = Form.flat(payload_nbytes(draw_layout(n, spec, seed), spec, size))
        return [codes, metadata, metadata] if spec.affine else [codes, metadata]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        spec = self.spec
        n, size = bucket_shape(layout.numel, spec.bucket_size)
        metadata = stored_metadata_dtype(spec.metadata_dtype, compute_dtype(layout.dtype)).itemsize
        return n * (packed_nbytes(size, min(spec.bit_widths)) + metadata * (1 + spec.affine))

    def _current_spec(self) -> BucketQuantSpec:
        selector = self.quantizer.msb_clamp_bit_width_impl
        if isinstance(selector, TwoBitWidthSelector) and (
                selector.probability != self.spec.mix_prob):
            self.spec = replace(self.spec, mix_prob=selector.probability)
        return self.spec


class ModuleCodec(Codec):
    """A bucket quantizer with parts of the user's own: modules -> codes -> bytes.

    Draws the same noise from the same seed as :class:`LoweredCodec`, and where both apply gives the
    same bytes.
    """

    def __init__(self, quantizer: BucketRescalingIntQuant) -> None:
        self.quantizer = quantizer
        self.widths = quantizer.bit_widths
        top = [int(quantizer.int_quant.max_int(torch.tensor(float(w)))) for w in self.widths]
        self.lowest = tuple(-t if quantizer.int_quant.signed else 0 for t in top)
        self.name = codec_name(self.widths, None)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Quantizes and packs a float tensor."""
        if x.numel() == 0:
            return Keep().encode(x, where=where)
        layout = TensorLayout.of(x)
        quantizer = self.quantizer
        with torch.no_grad(), seeded(seed):
            codes, scale, offset, _ = quantizer.quantize(layout.flatten(x))
        # A part of the user's own may hide a NaN: poison the bucket, so that backward sees it.
        scale = torch.where(codes.isfinite().all(-1, keepdim=True), scale.detach(), torch.nan)
        n, size = codes.shape
        width_layout = self._draw_layout(n, seed)
        packed = []
        for rows, width, lowest in self._rows(width_layout, "cpu"):
            part = torch.where(scale[rows].isnan(), 0, codes[rows] - lowest).to(torch.uint8)
            packed.append(pack(part, width).view(-1))
        stored = stored_metadata_dtype(quantizer.metadata_dtype, scale.dtype)
        tensors = [torch.cat(packed), to_metadata(scale, stored).view(-1)]
        if kind_of(quantizer.zero_point_impl) != "ZeroZeroPoint":
            tensors.append(to_metadata(offset.expand(n, 1), stored).reshape(-1))
        return Packed(self, tuple(tensors), layout, (n, size, width_layout), where)

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and dequantizes."""
        n, size, width_layout = packed.facts
        payload, scale = packed.tensors[:2]
        inner = compute_dtype(packed.layout.dtype)
        codes = torch.empty((n, size), dtype=inner, device=payload.device)
        position = 0
        for rows, width, lowest in self._rows(width_layout, payload.device):
            count = len(rows) if isinstance(rows, Tensor) else n
            nbytes = count * packed_nbytes(size, width)
            part = payload[position:position + nbytes].view(count, -1)
            codes[rows] = unpack(part, width, size).to(inner) + lowest
            position += nbytes
        scale = scale.to(inner).unsqueeze(-1)
        offset = packed.tensors[2].to(inner).unsqueeze(-1) if len(packed.tensors) > 2 else scale * 0
        like = torch.empty(packed.layout.numel, dtype=packed.layout.dtype, device="meta")
        with torch.no_grad():
            flat = self.quantizer.dequantize(codes, scale, offset, like)
        return packed.layout.restore_flat(flat)

    def forms(self, packed: Packed) -> Sequence[Form]:
        n, size, width_layout = packed.facts
        inner = compute_dtype(_float_dtype(packed))
        if width_layout.n != n or not n * size >= packed.layout.numel > (n - 1) * size:
            refuse(packed, f"{n} buckets of {size}, {width_layout.n} with a width", packed.layout)
        metadata = Form.flat(n, stored_metadata_dtype(self.quantizer.metadata_dtype, inner))
        nbytes = sum(
            (stop - start) * packed_nbytes(size, self.widths[which])
            for start, stop, which in width_layout.runs())
        affine = kind_of(self.quantizer.zero_point_impl) != "ZeroZeroPoint"
        return [Form.flat(nbytes), *[metadata] * (1 + affine)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        size = getattr(self.quantizer.input_view_impl, "bucket_size", None)
        n, size = bucket_shape(layout.numel, size)
        return n * packed_nbytes(size, min(self.widths))

    def _draw_layout(self, n: int, seed: int) -> WidthLayout:
        """The widths that the quantizer drew from ``seed``, drawn again."""
        selector = self.quantizer.msb_clamp_bit_width_impl
        if not isinstance(selector, TwoBitWidthSelector):
            return WidthLayout(n, 0)
        with seeded(seed):
            return selector.draw(n)

    def _rows(self, layout: WidthLayout, device: Any) -> list[Any]:
        """(buckets, width, lowest code) of each run of one width, in the order of the payload."""
        if len(self.widths) == 1:
            return [(slice(None), self.widths[0], self.lowest[0])]
        return [
            (layout.buckets(start, stop, device), self.widths[which], self.lowest[which])
            for start, stop, which in layout.runs()]


def _float_dtype(packed: Packed) -> torch.dtype:
    if not packed.layout.dtype.is_floating_point:
        refuse(packed, "a float tensor", packed.layout.dtype)
    return packed.layout.dtype


def codec_name(widths: tuple[int, ...], stochastic: bool | None) -> str:
    """Short name for reports.

    >>> codec_name((2, 4), True)
    '2/4-bit stochastic'
    """
    bits = "/".join(str(w) for w in widths) + "-bit"
    return bits if stochastic is None else f"{bits} {'stochastic' if stochastic else 'nearest'}"


def codec_from(quantizer: Any, **overrides: Any) -> Codec:
    """Builds the codec of a Brevitas activation quantizer.

    Args:
        quantizer: an injector class (a config), a proxy (for instance ``layer.act_quant``; shared, not
            copied) or a ``tensor_quant`` module.
        overrides: settings of the config, as keywords of a Brevitas layer.

    Raises:
        UnknownNameError: an override that the config does not know.
        UnsupportedQuantizerError: the quantizer has no codes that could be stored.
        TypeError: not a quantizer at all.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> codec_from(ShiftedUint2DynamicActPerBucketFloat, bit_width=4).name
    '4-bit nearest'
    """
    # A codec's constants are read on the host, wherever new tensors go by default.
    with torch.device("cpu"):
        return _codec_from(quantizer, overrides)


def _codec_from(quantizer: Any, overrides: dict[str, Any]) -> Codec:
    where = "brevitas_bp.codec.codec_from"
    if inspect.isclass(quantizer) and issubclass(quantizer, ExtendedInjector):
        return _from_injector(where, quantizer, overrides)
    if overrides:
        raise TypeError(
            f"{where}: keyword overrides {sorted(overrides)} need a config class, got an instance of "
            f"{type(quantizer).__name__}, which is built already; set them where it is built")
    if hasattr(quantizer, "fused_activation_quant_proxy"):
        return _codec_of(_tensor_quant_of(quantizer))
    if isinstance(quantizer, nn.Module):
        return _codec_of(quantizer)
    raise TypeError(
        f"{where}: expected a Brevitas config class, an activation proxy or a tensor_quant module, "
        f"got {quantizer!r}; ready-made configs are in brevitas_bp.quant")


def _from_injector(where: str, config: Any, overrides: dict[str, Any]) -> Codec:
    if not issubclass(config.proxy_class, ActQuantProxyFromInjectorBase):
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} quantizes weights or biases, and saved tensors are "
            "activations; use an activation quantizer, for instance one of brevitas_bp.quant")
    recipe = Recipe(config, overrides)
    try:
        check_override_names(where, config.let(**overrides), sorted(overrides))
        quantizer = _build(recipe)
    except RuntimeError as error:
        if "group_dim" in str(error):
            raise ValueError(
                f"{where}: {config.__name__} needs group_dim, the dimension that its groups run "
                "along; pass for instance group_dim=1") from error
        raise
    codec = _codec_of(quantizer)
    if _is_one_per_tensor(quantizer):
        if isinstance(codec, AverageCodec):
            raise UnsupportedQuantizerError(
                f"{where}: {config.__name__} averages groups and has a running range; what is not "
                "averaged would have to run on another range. Leave out one of the two")
        codec = StatefulCodec(partial(_codec_from_recipe, recipe), codec.name)
    codec.recipe = recipe
    return codec


def _codec_from_recipe(recipe: Recipe) -> Codec:
    # On the host, as codec_from does.
    with torch.device("cpu"):
        return _codec_of(_build(recipe))


def _is_one_per_tensor(quantizer: nn.Module) -> bool:
    """Whether tensors must not share it. Parameters of a bucket quantizer's own parts are shared."""
    if isinstance(quantizer, (AverageQuant, BucketRescalingIntQuant)):
        return keeps_statistics(quantizer)
    return is_stateful(quantizer)


def _build(recipe: Recipe) -> nn.Module:
    injector = recipe.config.let(**recipe.settings)
    return _tensor_quant_of(injector.proxy_class(nn.Identity(), injector))


def _tensor_quant_of(proxy: Any) -> nn.Module:
    fused = getattr(proxy, "fused_activation_quant_proxy", None)
    if fused is None:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {type(proxy).__name__} quantizes nothing; pass act_quant=None to keep "
            "tensors exact")
    activation = fused.activation_impl
    if kind_of(activation) != "Identity":
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: the proxy applies {kind_of(activation)} before it quantizes, "
            "which would change what backward sees; pass the quantizer's config class instead")
    return fused.tensor_quant


def _codec_of(quantizer: nn.Module) -> Codec:
    if type(quantizer) is AverageQuant:
        return AverageCodec(_codec_of(quantizer.bucket_quant), quantizer.average_size)
    if not isinstance(quantizer, BucketRescalingIntQuant):
        return stock_codec(quantizer)
    if any(True for _ in quantizer.msb_clamp_bit_width_impl.parameters()):
        raise UnsupportedQuantizerError(
            "brevitas_bp.codec: a learned bit width would have to be read from the device for "
            "every saved tensor; use a constant bit_width, or two with the fragment TwoBitWidth")
    spec = lower(quantizer)
    return ModuleCodec(quantizer) if spec is None else LoweredCodec(quantizer, spec)
