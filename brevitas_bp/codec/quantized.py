"""The codec of any Brevitas activation quantizer: values -> codes -> bytes."""

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, final

import torch
from brevitas.inject import ExtendedInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant.solver.act import ActQuantSolver
from torch import Tensor, nn

from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.buckets import BucketCodec, codec_name
from brevitas_bp.codec.general import ModuleCodec, float_dtype
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor, bucket_form
from brevitas_bp.codec.integrity import TensorType, refuse
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
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.packing import packed_nbytes
from brevitas_bp.format.random import seeded
from brevitas_bp.format.reference import bucket_shape, draw_layout, payload_nbytes
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NO_TRANSFORM
from brevitas_bp.format.widths import WidthLayout
from brevitas_bp.kernels.dispatch import CHOICE, launcher
from brevitas_bp.kernels.launchers import Launcher
from brevitas_bp.private import TorchDispatchMode
from brevitas_bp.probes import undisturbed
from brevitas_bp.proxy import check_override_names


def _types_of(
        spec: BucketQuantSpec, layout: WidthLayout, numel: int, dtype: torch.dtype) -> list[TensorType]:
    """Returns the types of the tensors stored for ``numel`` elements whose buckets have these widths."""
    n, size = bucket_shape(numel, spec.bucket_size, spec.row_size)
    metadata = stored_metadata_dtype(spec.metadata_dtype, compute_dtype(dtype))
    return [
        TensorType.flat(payload_nbytes(layout, spec, size)),
        TensorType.flat(n * (1 + spec.affine), metadata)]


@lru_cache(maxsize=4096)
def _least_nbytes(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> int:
    n, size = bucket_shape(numel, spec.bucket_size, spec.row_size)
    metadata = stored_metadata_dtype(spec.metadata_dtype, compute_dtype(dtype)).itemsize
    return n * (packed_nbytes(size, min(spec.bit_widths)) + metadata * (1 + spec.affine))


def _name_of(spec: BucketQuantSpec) -> str:
    """Returns the name of a quantizer for reports, for instance "2-bit rotated"."""
    kinds = [] if spec.transform is NO_TRANSFORM else [spec.transform.name]
    if spec.code_range.nearest is None:
        kinds.append(spec.rounding.name)
    elif not kinds:
        kinds.append(spec.code_range.name)
    return codec_name(spec.bit_widths, ", ".join(kinds))


def _one_width(spec: BucketQuantSpec, bits: int) -> BucketQuantSpec:
    return replace(spec, bit_width=bits, mix_bit_width=None, mix_prob=0.0)


# Limit of the layouts that a codec remembers: more than a network has.
_MOST_READY = 4096


class _Ready(NamedTuple):
    """Facts that a codec finds out once for all tensors of one layout.

    Attributes:
        layout: layout of the tensors.
        spec: how they are quantized.
        launcher: encodes and decodes them.
        types: types of the stored tensors; None with two widths, because they then differ with the seed.
        preference: preference of kernels, with which the launcher was made.
    """

    layout: TensorLayout
    spec: BucketQuantSpec
    launcher: Launcher
    types: list[TensorType] | None
    preference: str

    @classmethod
    def of(cls, layout: TensorLayout, spec: BucketQuantSpec) -> "_Ready":
        numel, dtype = layout.numel, layout.dtype
        types = None
        if spec.mix_bit_width is None:
            n, _ = bucket_shape(numel, spec.bucket_size, spec.row_size)
            types = _types_of(spec, WidthLayout(n, 0), numel, dtype)
        preference = CHOICE.preference
        return cls(
            layout, spec, launcher(spec, numel, dtype, layout.device, preference), types, preference)


@final
class LoweredCodec(BucketCodec):
    """A bucket quantizer of known parts: one kernel from values to bytes.

    Args:
        quantizer: the quantizer; each encode reads the probability of its second width.
        spec: the lowered quantizer, perhaps with another width or other buckets.
    """

    decodes_anew = True

    def __init__(self, quantizer: BucketRescalingIntQuant, spec: BucketQuantSpec) -> None:
        self.quantizer = quantizer
        self.spec = spec
        self.bit_widths = spec.bit_widths
        # Operators that decode in a graph get no seed.
        self.in_graphs = not _one_width(spec, spec.bit_width).decoding_draws
        self.name = _name_of(spec)
        # Keyed by the identity of a layout: that is faster than finding an equal layout.
        self._ready: dict[int, _Ready] = {}

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Quantizes and packs a float tensor."""
        return self._encode(x, seed, where)

    def encode_derivative(self, x: Tensor, name: str, *, seed: int, where: str = "") -> Packed:
        """Stores the derivative at ``x``, in one pass over ``x``."""
        return self._encode(x, seed, where, derivative=name)

    def encode_normalized(self, x: Tensor, affine: Affine, *, seed: int, where: str = "") -> Packed:
        """Stores ``x`` normalized, in one pass over ``x``."""
        return self._encode(x, seed, where, affine=affine)

    def _encode(
            self, x: Tensor, seed: int, where: str, derivative: str | None = None,
            affine: Affine | None = None) -> Packed:
        layout = self.layout_of(x, where)
        spec = self._current_spec()
        as_it_is = layout.contiguous and not x.is_neg()
        tensors = self._ready_for(layout, spec).launcher.encode(
            x if as_it_is else layout.flatten(x), seed, derivative, affine)
        return Packed(self, tensors, layout, (spec, seed), where)

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and dequantizes."""
        return self._decode(packed, None)

    def decode_normalized(self, packed: Packed, affine: Affine) -> Tensor:
        """Decodes, and applies ``affine`` in the same pass."""
        return self._decode(packed, affine)

    def _decode(self, packed: Packed, affine: Affine | None) -> Tensor:
        (spec, seed), layout = packed.facts, packed.layout
        payload, metadata = packed.tensors
        return self._ready_for(layout, spec).launcher.decode(
            payload, metadata, seed, layout.shape, layout.stride, affine)

    def in_rows(self, length: int, last: int) -> Codec:
        spec = self.spec.in_rows(length)
        return self if spec == self.spec else LoweredCodec(self.quantizer, spec)

    def _with_width(self, bits: int, bucket_size: int | None) -> Codec:
        spec = _one_width(self.spec, bits)
        return LoweredCodec(
            self.quantizer, spec if bucket_size is None else replace(spec, bucket_size=bucket_size))

    def graph_key(self) -> Hashable:
        return replace(self.spec, mix_prob=0.0)

    def in_graph(self, x: GraphTensor) -> GraphForm | None:
        """Returns its form with one width, the larger of two: no seed may change sizes in a graph."""
        if not self.in_graphs:
            return None
        spec = _one_width(self.spec, max(self.bit_widths))
        return bucket_form(_name_of(spec), spec, x)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        (spec, seed), own = packed.facts, self.spec
        if spec is not own and replace(spec, mix_prob=own.mix_prob) != own:
            refuse(packed, own, spec)
        dtype = float_dtype(packed)
        types = self._ready_for(packed.layout, spec).types
        if types is None:
            numel = packed.layout.numel
            n, _ = bucket_shape(numel, spec.bucket_size, spec.row_size)
            types = _types_of(spec, draw_layout(n, spec, seed), numel, dtype)
        return types

    def _ready_for(self, layout: TensorLayout, spec: BucketQuantSpec) -> "_Ready":
        ready = self._ready.get(id(layout))
        if ready is None or ready.layout is not layout or ready.spec is not spec or (
                ready.preference is not CHOICE.preference):
            if len(self._ready) >= _MOST_READY:
                self._ready.clear()
            ready = self._ready[id(layout)] = _Ready.of(layout, spec)
        return ready

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return _least_nbytes(self.spec, layout.numel, layout.dtype)

    def _current_spec(self) -> BucketQuantSpec:
        if self.spec.mix_bit_width is not None:
            selector = self.quantizer.msb_clamp_bit_width_impl
            if isinstance(selector, TwoBitWidthSelector) and (
                    selector.probability != self.spec.mix_prob):
                self.spec = replace(self.spec, mix_prob=selector.probability)
        return self.spec


def codec_from(quantizer: Any, **overrides: Any) -> Codec:
    """Builds the codec of a Brevitas activation quantizer.

    Args:
        quantizer: an injector class (a config), a proxy (for instance ``layer.act_quant``; shared, not
            copied) or a ``tensor_quant`` module.
        overrides: settings of the config, as keywords of a Brevitas layer.

    Raises:
        UnknownNameError: the config does not know an override.
        UnsupportedQuantizerError: the quantizer has no codes that could be stored.
        TypeError: the argument is not a quantizer.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> codec_from(ShiftedUint2DynamicActPerBucketFloat, bit_width=4).name
    '4-bit nearest'
    """
    # Read a codec's constants on the host, whatever the default device is.
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
        _refuse_order(where, config, error)
        if "group_dim" in str(error):
            raise ValueError(
                f"{where}: {config.__name__} needs group_dim, the dimension that its groups run "
                "along; pass for instance group_dim=1") from error
        raise
    except TypeError as error:
        _refuse_order(where, config, error)
        if "quant_type" not in str(error):
            raise
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} does not say how values are scaled; derive it from a fragment "
            "with a scale as well, for instance PerBucketMinMax") from error
    codec = _codec_of(quantizer)
    if _is_one_per_tensor(quantizer):
        if isinstance(codec, AverageCodec):
            raise UnsupportedQuantizerError(
                f"{where}: {config.__name__} averages groups and has a running range; tensors that are "
                "not averaged would need another running range. Leave out one of the two")
        codec = StatefulCodec(partial(_codec_from_recipe, recipe), codec.name)
    codec.recipe = recipe
    return codec


def _refuse_order(where: str, config: Any, error: Exception) -> None:
    """Raises if fragments are listed after the solver: its settings would then replace theirs."""
    bases = list(config.__mro__)
    if ActQuantSolver not in bases:
        return
    solver = bases.index(ActQuantSolver)
    late = [c.__name__ for c in config.__bases__ if bases.index(c) > solver]
    if late:
        raise UnsupportedQuantizerError(
            f"{where}: {config.__name__} has {', '.join(late)} right of ActQuantSolver, which overrides "
            f"their settings; write class {config.__name__}({', '.join(late)}, ActQuantSolver)"
            ) from error


def _codec_from_recipe(recipe: Recipe) -> Codec:
    # Build on the host, as codec_from does.
    with torch.device("cpu"):
        return _codec_of(_build(recipe))


def _is_one_per_tensor(quantizer: nn.Module) -> bool:
    """Whether each tensor needs its own quantizer. Parameters of a bucket quantizer may be shared."""
    if isinstance(quantizer, (AverageQuant, BucketRescalingIntQuant, BucketLevelQuant)):
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


class _Draws(TorchDispatchMode):
    """Raises when an operation is about to draw from torch's generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A call with a generator of its own touches no other generator.
        if torch.Tag.nondeterministic_seeded in func.tags and func.namespace != "brevitas_bp" and (
                kwargs.get("generator") is None):
            raise _DrawsError
        return func(*args, **kwargs)


class _DrawsError(Exception):
    """A part draws from torch's generator."""


def _check_rounding(quantizer: nn.Module) -> None:
    """Tries a custom rounding part once: it must give integers, and not draw from torch's generator.

    Raises:
        UnsupportedQuantizerError: the part draws from torch's generator, or gives no integers.
    """
    part: Any = getattr(getattr(quantizer, "int_quant", None), "float_to_int_impl", None)
    if not isinstance(part, nn.Module) or type(part).__module__.partition(".")[0] in _KNOWN:
        return
    size: int = getattr(getattr(quantizer, "input_view_impl", None), "bucket_size", None) or 32

    def tried() -> tuple[bool, list[float]]:
        values = torch.linspace(-3, 3, 2 * size).view(2, size)
        with torch.no_grad(), seeded(0), _Draws():
            codes: Tensor = part(values)
        sound = codes.shape == values.shape and torch.equal(codes, codes.round())
        return sound, codes.reshape(-1)[:4].tolist()

    kind = type(part).__name__
    try:
        sound, codes = undisturbed(tried)
    except _DrawsError as error:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {kind} draws from torch's generator, so that dropout of the forward "
            "pass would change; take noise from torch.ops.brevitas_bp.noise_like(x), uniform in [0, 1)"
            ) from error
    except Exception:  # It may need other values or another device. This check does not judge that.
        return
    if not sound:
        raise UnsupportedQuantizerError(
            f"brevitas_bp.codec: {kind} must give integers in the shape of its input, and gave {codes}; "
            "it fills float_to_int_impl, which rounds values that are scaled already")


# Packages whose rounding parts are known.
_KNOWN = ("brevitas", "brevitas_bp", "torch")


def _codec_of(quantizer: nn.Module) -> Codec:
    _check_rounding(quantizer)
    if type(quantizer) is AverageQuant:
        return AverageCodec(_codec_of(quantizer.bucket_quant), quantizer.average_size)
    if not isinstance(quantizer, (BucketRescalingIntQuant, BucketLevelQuant)):
        return stock_codec(quantizer)
    if any(True for _ in quantizer.msb_clamp_bit_width_impl.parameters()):
        raise UnsupportedQuantizerError(
            "brevitas_bp.codec: a learned bit width would have to be read from the device for "
            "every saved tensor; use a constant bit_width, or two with the fragment TwoBitWidth")
    spec = lower(quantizer)
    if spec is not None:
        return LoweredCodec(quantizer, spec)
    if isinstance(quantizer, BucketLevelQuant) or quantizer.decoding_draws:
        raise UnsupportedQuantizerError(
            "brevitas_bp.codec: codes of levels, and codes that need their draws again, are stored by "
            f"kernels that know all parts of the quantizer, and a part of {type(quantizer).__name__} is "
            "unknown to them; use the parts of brevitas_bp.core, or give yours a method bucket_stage")
    return ModuleCodec(quantizer)
