"""Codecs as operations of a compiled graph, into which ``torch.compile`` inlines the hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from brevitas_bp.core.bucket import memory_order
from brevitas_bp.format.masks import Interval, mask_nbytes, next_value
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels import dispatch

# NOTE [ Graphs call the kernels ]
# In a compiled graph, encoding and decoding are operators, so the graph calls the kernels. We also tried
# them as operations that Inductor fuses with their neighbours (CPU, torch 2.13), with the same bytes:
# 1. Encoding took as long as the compiled kernels on one thread, and compilation took twenty seconds for
#    each tensor. Each step of the hash reads its input twice, and Inductor expands intermediate values
#    that are not stored.
# 2. Decoding was faster than the kernels if a matrix product read the values. Fused with elementwise
#    operations on another memory layout, it was computed again for each of them, one element at a time.
#    A compiled step of EfficientNetV2-S took five times as long.
_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_library.define(
    "decode(Tensor payload, Tensor metadata, str spec, SymInt numel, ScalarType dtype, "
    "Tensor? seed=None) -> Tensor")
# Inductor may lay out a tensor in any memory order: we read the tensor in its own order, mostly without
# a copy.
FLEXIBLE = tuple(
    getattr(torch.Tag, name) for name in ("flexible_layout",) if hasattr(torch.Tag, name))
_library.define(
    "decode_rectified(Tensor payload, Tensor metadata, Tensor positive, str spec, SymInt numel, "
    "ScalarType dtype, Tensor? seed=None) -> Tensor")
_library.define(
    "decode_channels(Tensor payload, Tensor metadata, Tensor statistics, str spec, SymInt numel, "
    "SymInt inner, ScalarType dtype, Tensor? seed=None) -> Tensor")
_library.define("pack_bits(Tensor x) -> Tensor", tags=FLEXIBLE)
_library.define("pack_positive(Tensor x, bool nan=False) -> Tensor", tags=FLEXIBLE)
_library.define("unpack_bits(Tensor packed, SymInt numel) -> Tensor")


def _decode(
        payload: Tensor, metadata: Tensor, spec: str, numel: int, dtype: torch.dtype,
        seed: Tensor | None = None) -> Tensor:
    launcher = dispatch.launcher_from_text(spec, numel, dtype, payload.device)
    return launcher.decode(payload, metadata, _number(seed), torch.Size((numel,)), (1,))


def _number(seed: Tensor | None) -> int:
    """Returns the seed of a stored tensor. Without one, decoding draws nothing."""
    return 0 if seed is None else int(seed)


def _decode_rectified(
        payload: Tensor, metadata: Tensor, positive: Tensor, spec: str, numel: int,
        dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    """See :class:`RectifiedForm`. NaN stays NaN."""
    return dispatch.rectify_(_decode(payload, metadata, spec, numel, dtype, seed), positive)


def _decode_channels(
        payload: Tensor, metadata: Tensor, statistics: Tensor, spec: str, numel: int, inner: int,
        dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    """See :class:`ChannelForm`."""
    launcher = dispatch.launcher_from_text(spec, numel, dtype, payload.device)
    affine = Affine(statistics[1].contiguous(), statistics[0].contiguous(), inner)
    return launcher.decode(payload, metadata, _number(seed), torch.Size((numel,)), (1,), affine)


def _pack_bits(x: Tensor) -> Tensor:
    return dispatch.pack_bits(x.reshape(-1))


def _pack_positive(x: Tensor, nan: bool = False) -> Tensor:
    """Packs which elements are positive; ``nan``: whether NaN counts as positive."""
    return dispatch.pack_interval(x.reshape(-1), _positive(x.dtype, nan))[0]


@lru_cache(maxsize=16)
def _positive(dtype: torch.dtype, nan: bool) -> Interval:
    return Interval(next_value(0.0, dtype, 1), float("inf"), nan=nan)


def _unpack_bits(packed: Tensor, numel: int) -> Tensor:
    return dispatch.unpack_select(packed, numel, 0, 1, torch.bool)


for _name, _function in (
        ("decode", _decode), ("decode_channels", _decode_channels),
        ("decode_rectified", _decode_rectified), ("pack_bits", _pack_bits),
        ("pack_positive", _pack_positive), ("unpack_bits", _unpack_bits)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::decode", lib=_library)
def _decode_fake(
        payload: Tensor, metadata: Tensor, spec: str, numel: int, dtype: torch.dtype,
        seed: Tensor | None = None) -> Tensor:
    return payload.new_empty(numel, dtype=dtype)


@torch.library.register_fake("brevitas_bp::decode_rectified", lib=_library)
def _decode_rectified_fake(
        payload: Tensor, metadata: Tensor, positive: Tensor, spec: str, numel: int,
        dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    return payload.new_empty(numel, dtype=dtype)


@torch.library.register_fake("brevitas_bp::decode_channels", lib=_library)
def _decode_channels_fake(
        payload: Tensor, metadata: Tensor, statistics: Tensor, spec: str, numel: int, inner: int,
        dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    return payload.new_empty(numel, dtype=dtype)


@torch.library.register_fake("brevitas_bp::pack_positive", lib=_library)
@torch.library.register_fake("brevitas_bp::pack_bits", lib=_library)
def _pack_bits_fake(x: Tensor, nan: bool = False) -> Tensor:
    return x.new_empty(mask_nbytes(x.numel()), dtype=torch.uint8)


@torch.library.register_fake("brevitas_bp::unpack_bits", lib=_library)
def _unpack_bits_fake(packed: Tensor, numel: int) -> Tensor:
    return packed.new_empty(numel, dtype=torch.bool)


#: A tensor, a spec of one width, and perhaps the place of its channels or the elements of a row whose
#: zeros are filled -> stored tensors: the payload, one tensor of scales and offsets; with channels,
#: their means and deviations; and the seed, if decoding draws.
Quantize = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class GraphForm(ABC):
    """A codec for one tensor of a graph that is being built.

    Attributes:
        name: shown in reports.
        order: dimensions from the slowest to the fastest in memory; None: in their own order.
        dtype: dtype of the tensor.
        draws: whether it encodes with noise, so that the graph draws seeds.
    """

    draws: ClassVar[bool] = False

    name: str
    order: tuple[int, ...] | None
    dtype: torch.dtype

    @property
    def parts(self) -> int:
        """Number of stored tensors."""
        return 1

    @abstractmethod
    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        """Returns the stored tensors of ``x``, whose dimensions are in ``order``.

        ``quantize`` calls the kernels.
        """

    @abstractmethod
    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        """Returns the elements in memory order; ``sizes`` are in memory order too."""

    def pack(self, x: Tensor, quantize: Quantize) -> tuple[tuple[Tensor, ...], list[Any]]:
        """Returns the stored tensors, and the sizes in memory order that :meth:`unpack` needs."""
        x = x if self.order is None else x.permute(self.order)
        return self.encode(x, quantize), list(x.shape)

    def unpack(self, tensors: tuple[Tensor, ...], sizes: list[Any]) -> Tensor:
        """Returns the tensor in its own memory order, but without gaps between its elements."""
        numel = 1
        for size in sizes:
            numel = numel * size
        x = self.decode(tensors, numel, sizes).view(sizes)
        if self.order is None:
            return x
        return x.permute([self.order.index(d) for d in range(len(self.order))])


@dataclass(frozen=True)
class BucketForm(GraphForm):
    """A bucket quantizer of one width. If decoding draws, the seed is the last stored tensor.

    Attributes:
        spec: the lowered quantizer.
    """

    draws: ClassVar[bool] = True
    #: Stored tensors beside the seed.
    own_parts: ClassVar[int] = 2

    spec: BucketQuantSpec

    @property
    def parts(self) -> int:
        return self.own_parts + self.spec.decoding_draws

    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        return quantize(x, self.spec)

    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        own, seed = self._split(tensors)
        return torch.ops.brevitas_bp.decode(*own, self.spec.to_text(), numel, self.dtype, *seed)

    def _split(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns the stored tensors without the seed, and the seed if there is one."""
        return tensors[:self.own_parts], tensors[self.own_parts:]


@dataclass(frozen=True)
class ChannelForm(BucketForm):
    """A bucket quantizer of a tensor [N, C, ...], which is stored in units of its channels.

    It stores deviations from the mean of each channel. Channels of any size are rounded alike, wherever
    they lie in memory. A channel without deviation is exact.

    Attributes:
        dim: place of the channels in ``order``: 1, or the last.
    """

    own_parts: ClassVar[int] = 3

    dim: int

    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        return quantize(x, self.spec, self.dim)

    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        inner = 1
        for size in sizes[self.dim + 1:]:
            inner = inner * size
        own, seed = self._split(tensors)
        return torch.ops.brevitas_bp.decode_channels(
            *own, self.spec.to_text(), numel, inner, self.dtype, *seed)


@dataclass(frozen=True)
class RectifiedForm(BucketForm):
    """A bucket quantizer of the output of a ReLU, with 1 more bit that marks positive elements.

    The decoded tensor is zero exactly where the original is, so comparing it with 0 gives the same
    result. Every other element decodes to 2**-64 (2**-24 in float16) or more: smaller values are raised.

    Attributes:
        filled: whether zeros are filled before, see NOTE [ Given what is stored already ].
        row: elements of a row; None: all.
    """

    own_parts: ClassVar[int] = 3

    filled: bool
    row: int | None

    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        # No symbol: encoders move to where the size of ``x`` may not be computed yet.
        row = (self.row or 0) if self.filled else None
        payload, metadata, *seed = quantize(x, self.spec, filled_row=row)
        return payload, metadata, torch.ops.brevitas_bp.pack_positive(x), *seed

    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        own, seed = self._split(tensors)
        return torch.ops.brevitas_bp.decode_rectified(
            *own, self.spec.to_text(), numel, self.dtype, *seed)


@dataclass(frozen=True)
class SignForm(GraphForm):
    """Stores which outputs of a ReLU are positive, 1 bit each, if backward asks for nothing else.

    They decode to 1, the others to 0. NaN counts as positive, as in autograd's backward.
    """

    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        return (torch.ops.brevitas_bp.pack_positive(x, nan=True),)

    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        return torch.ops.brevitas_bp.unpack_bits(tensors[0], numel).to(self.dtype)


@dataclass(frozen=True)
class MaskForm(GraphForm):
    """Stores bools, 1 bit each."""

    def encode(self, x: Tensor, quantize: Quantize) -> tuple[Tensor, ...]:
        return (torch.ops.brevitas_bp.pack_bits(x),)

    def decode(
            self, tensors: tuple[Tensor, ...], numel: Any, sizes: list[Any]) -> Tensor:
        return torch.ops.brevitas_bp.unpack_bits(tensors[0], numel)


Rectified = Literal["values", "signs"] | None


@dataclass(frozen=True)
class GraphTensor:
    """The facts about a tensor that a codec needs in a graph.

    Attributes:
        order: dimensions from the slowest to the fastest in memory; None: in their own order.
        dtype: dtype of the tensor.
        row: elements of a row, see :mod:`brevitas_bp.codec.rows`; None: no rows.
        rectified: what backward asks for if it is the output of a ReLU, whose sign must be exact: its
            values too, or signs alone.
        filled: whether the codes of its zeros may be any.
        channels: place of the channels in ``order``, if values are stored in units of their channel.
    """

    order: tuple[int, ...] | None
    dtype: torch.dtype
    row: int | None = None
    rectified: Rectified = None
    filled: bool = False
    channels: int | None = None

    @classmethod
    def of(
            cls, x: Tensor, *, channels_last: bool = False, rectified: Rectified = None,
            filled: bool = False, row: int | None = None, in_memory: bool = False,
            channels: bool = False, strict: bool = False) -> "GraphTensor | None":
        """Returns the facts about ``x``; None if its elements share memory, so that the graph keeps it.

        Args:
            x: a fake tensor.
            channels_last: whether images [N, C, H, W] will be channels_last when the graph runs,
                although they were contiguous when it was traced.
            rectified: what backward asks for if it is the output of a ReLU.
            filled: whether the codes of its zeros may be any.
            row: elements of a row.
            in_memory: whether rows are whole samples, in any order of their dimensions.
            channels: whether values are stored in units of their channel, dimension 1.
            strict: whether the graph needs the memory order with which it was traced.
        """
        if not _is_apart(x):
            return None
        order = memory_order(x)
        if rectified == "signs" or (strict and order is not None and not in_memory):
            row = None
        if order is None and channels_last and x.dim() == 4:
            order = [0, 2, 3, 1]
        if row is not None and not in_memory:
            # Rows follow the dimensions in their own order.
            order = None if x.is_contiguous() else list(range(x.dim()))
        place = None
        if channels and x.dim() > 1:
            found = 1 if order is None else order.index(1)
            place = found if found in (1, x.dim() - 1) else None
        return cls(None if order is None else tuple(order), x.dtype, row, rectified, filled, place)


def bucket_form(name: str, spec: BucketQuantSpec, x: GraphTensor) -> GraphForm:
    """Returns the form of a bucket quantizer of one width, for a tensor of a graph."""
    spec = spec if x.row is None else spec.in_rows(x.row)
    if x.rectified == "signs":
        return SignForm("sign, 1 bit", x.order, x.dtype)
    if x.rectified == "values":
        filled = x.filled and (spec.affine or spec.code_range.signed)
        return RectifiedForm(
            f"{name}, sign exact", x.order, x.dtype, spec, filled, x.row)
    if x.channels is not None:
        return ChannelForm(name, x.order, x.dtype, spec, x.channels)
    return BucketForm(name, x.order, x.dtype, spec)


def _is_apart(x: Tensor) -> bool:
    """Whether each element of ``x`` has its own memory: nothing is expanded, and no windows overlap."""
    end = 1
    for stride, size in sorted(
            (stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride < end:
            return False
        end = stride * (size - 1) + end
    return True
