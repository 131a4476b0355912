"""The codec of a bucket quantizer whose parts are known: one kernel from values to bytes."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.buckets import BucketCodec, BucketQuantizer, codec_name
from brevitas_bp.codec.derived import variants
from brevitas_bp.codec.general import float_dtype
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor, bucket_form
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.relative import relative
from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.packing import packed_nbytes
from brevitas_bp.format.reference import bucket_shape, check_rows, draw_layout, payload_nbytes
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    COMPANDED,
    DITHERED,
    MIN_MAX,
    NEAREST,
    NO_TRANSFORM,
    NORMAL,
    ROTATED_TWICE,
    STOCHASTIC,
    UNSIGNED,
)
from brevitas_bp.format.widths import WidthLayout
from brevitas_bp.kernels.dispatch import CHOICE, launcher
from brevitas_bp.kernels.launchers import Launcher

#: Kinds of codes, and the stages in which they differ.
KINDS: dict[str, dict[str, Any]] = {
    "rotated": {
        "scale_rule": CENTRED, "code_range": NORMAL, "rounding": NEAREST, "transform": ROTATED_TWICE},
    "dithered": {
        "scale_rule": MIN_MAX, "code_range": UNSIGNED, "rounding": DITHERED,
        "transform": NO_TRANSFORM},
    "stochastic": {
        "scale_rule": MIN_MAX, "code_range": UNSIGNED, "rounding": STOCHASTIC,
        "transform": NO_TRANSFORM},
    "companded": {
        "scale_rule": MIN_MAX, "code_range": UNSIGNED, "rounding": COMPANDED,
        "transform": NO_TRANSFORM}}


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
        check_rows(numel, spec.row_size)
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
        spec: the lowered quantizer, perhaps with another width, other buckets or another kind of code.
        family: an object that all codecs share that are made from one configured codec; None: a new one.
    """

    decodes_anew = True

    def __init__(
            self, quantizer: BucketQuantizer, spec: BucketQuantSpec, family: Any = None) -> None:
        self._family = object() if family is None else family
        self.quantizer = quantizer
        self.spec = spec
        self.bit_widths = spec.bit_widths
        self.in_graphs = True
        self.bucket_elements = spec.bucket_size
        self.stores_differences = spec.affine or spec.code_range.signed
        self.keeps_sign = spec.rounding is COMPANDED and spec.transform is NO_TRANSFORM
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
        spec = self._spec_for(layout)
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

    def is_finer_than(self, other: Codec) -> bool:
        if not isinstance(other, LoweredCodec) or self._family is not other._family:
            return False
        mine, its = self.spec, other.spec
        return (mine.bucket_size, mine.row_size) == (its.bucket_size, its.row_size) and (
            min(self.bit_widths) >= max(other.bit_widths))

    def in_rows(self, length: int, last: int) -> Codec:
        spec = self.spec.in_rows(length)
        return self if spec == self.spec else self._with_spec(spec)

    def _with_width(self, bits: int, bucket_size: int | None) -> Codec:
        spec = _one_width(self.spec, bits)
        return self._with_spec(
            spec if bucket_size is None else replace(spec, bucket_size=bucket_size))

    def graph_key(self) -> Hashable:
        return replace(self.spec, mix_prob=0.0)

    def in_graph(self, x: GraphTensor) -> GraphForm | None:
        """Returns its form with one width, the larger of two: no seed may change sizes in a graph."""
        spec = _one_width(self.spec, max(self.bit_widths))
        return bucket_form(_name_of(spec), spec, x)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        (spec, seed), own = packed.facts, self.spec.for_numel(packed.layout.numel)
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
        return _least_nbytes(self.spec.for_numel(layout.numel), layout.numel, layout.dtype)

    @property
    def for_factors(self) -> Codec:
        """Without rotation: bounded factors gain nothing from it, and dither halves their variance."""
        return self if self.spec.code_range.nearest is None else self.of_kind("dithered")

    def for_rest(self, spared: int) -> Codec:
        """With rotation: differences are not bounded as factors are. Chosen codes are kept."""
        if not (self._changed and self.spec.rounding is DITHERED):
            return self
        bits = max(min(self.bit_widths) - spared, 1)
        rest = self.of_kind("rotated")
        return rest.variant(bits) or self

    @property
    def for_values(self) -> Codec:
        """With stochastic rounding in the range of each bucket: the least value decodes exactly."""
        return self if self.spec.code_range.nearest is None else self.of_kind("stochastic")

    @property
    def for_probabilities(self) -> Codec | None:
        """With levels close together near zero; None if rounding to nearest was asked for."""
        return self.of_kind("companded") if self._unbiased else None

    @property
    def for_magnitudes(self) -> Codec | None:
        """Always with 8 bits; None if rounding to nearest was asked for."""
        return relative() if self._unbiased else None

    @property
    def _unbiased(self) -> bool:
        return self.spec.code_range.nearest is not None or self.spec.rounding.encoding_draws

    @property
    def precise(self) -> Codec:
        if self.spec.metadata_dtype is torch.float32:
            return self
        return variants.get(self, "precise", lambda: self._with_spec(
            replace(self.spec, metadata_dtype=torch.float32)))

    def of_kind(self, kind: str) -> Codec:
        stages = KINDS[kind]
        if all(getattr(self.spec, field) is row for field, row in stages.items()):
            return self
        return variants.get(self, kind, lambda: self._with_spec(
            replace(self.spec, integer_zero_point=False, **stages)))

    @property
    def _changed(self) -> bool:
        """Whether this codec is of another kind than the quantizer: its spec alone describes it."""
        return self.spec.code_range.nearest is None and isinstance(self.quantizer, BucketLevelQuant)

    @property
    def _by_energy(self) -> bool:
        return not self._changed and super()._by_energy

    @property
    def _pads_with_zero(self) -> bool:
        return self.spec.scale_rule.pads_with_zero

    def _squared_range(self, buckets: Tensor, counts: Tensor) -> Tensor:
        if not self._changed:
            return super()._squared_range(buckets, counts)
        reach, _ = self.spec.scale_rule.measure(buckets, 1, torch.float32, None)
        return reach.view(-1).double().square()

    def relative_error(self, bits: int) -> float:
        return self.spec.code_range.top(bits) ** -2 if self._changed else super().relative_error(bits)

    def is_variant_of(self, configured: Codec) -> bool:
        return self._family is getattr(configured.per_element, "_family", None)

    def _with_spec(self, spec: BucketQuantSpec) -> "LoweredCodec":
        return LoweredCodec(self.quantizer, spec, self._family)

    def _spec_for(self, layout: TensorLayout) -> BucketQuantSpec:
        """Returns how a tensor of this layout is quantized now."""
        spec = self._current_spec()
        # Most tensors have more than a bucket of elements.
        return spec if layout.numel >= (spec.bucket_size or 0) else spec.for_numel(layout.numel)

    def _current_spec(self) -> BucketQuantSpec:
        if self.spec.mix_bit_width is not None:
            selector = self.quantizer.msb_clamp_bit_width_impl
            if isinstance(selector, TwoBitWidthSelector) and (
                    selector.probability != self.spec.mix_prob):
                self.spec = replace(self.spec, mix_prob=selector.probability)
        return self.spec
