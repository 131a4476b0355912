"""One payload of every kind of codec, and ways to corrupt its structure."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import Codec, Packed, codec_from, quant
from brevitas_bp.activations.few_bit import few_bit_table
from brevitas_bp.codec import (
    BitMask,
    Copy,
    FewBitCodec,
    NarrowInt,
    PerSampleCodec,
    PooledCodec,
    ProjectedCodec,
    RandomKCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.codec.lossless import narrow_to
from brevitas_bp.codec.pooling import max_pool_index
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.codec.regions import (
    dropout_mask,
    hardtanh_region,
    relu_region,
    sign,
)
from brevitas_bp.codec.shape_only import shape_only
from brevitas_bp.codec.signed import sign_exact
from tests.codec.test_stock import ALL, config_of
from tests.strategies import normals


def activation() -> Tensor:
    """Returns float32 [2, 6, 5, 5], a size that no bucket divides."""
    return normals((2, 6, 5, 5)).float()


def _stock(name: str) -> Packed:
    codec = codec_from(config_of(name), **ALL[name])
    codec = codec.at_site(0)
    return codec.encode(activation(), seed=1, where="conv2d in stem")


def _general() -> Codec:
    lowered = codec_from(quant.ShiftedUint2Mix4DynamicActPerBucketFloatStochastic, bucket_size=64)
    assert isinstance(lowered, LoweredCodec)
    return ModuleCodec(lowered.quantizer)


def _per_sample(ratio: float) -> tuple[Codec, Tensor]:
    codec = PerSampleCodec(quant.ShiftedUint2DynamicActPerBucketFloat, bucket_size=64)
    return codec, torch.cat([activation()[:1], activation()[:1] * ratio])


def _with_nan() -> Tensor:
    x = activation()
    x[1, 2, 3] = torch.nan
    return x


def _pooled() -> tuple[Codec, Tensor]:
    x = normals((2, 3, 9, 8)).float()
    return max_pool_index(x.shape, 2, 3, 2, 1), F.max_pool2d(x, 3, 2, 1, return_indices=True)[1]


def _wide_pooled() -> tuple[Codec, Tensor]:
    x = normals((2, 2, 40, 40)).float()
    return max_pool_index(x.shape, 2, 20), F.max_pool2d(x, 20, return_indices=True)[1]


_INDICES = torch.arange(300).remainder(97)
_UNIFORM_MASK = (activation() > 0) / torch.ones(()).mul_(0.7)

#: name -> codec and tensor.
LOSSLESS: dict[str, Callable[[], tuple[Codec, Tensor]]] = {
    "bool mask": lambda: (BitMask(), activation() > 0),
    "indices": lambda: (NarrowInt(), _INDICES),
    "indices of 97": lambda: (narrow_to(97), _INDICES),
    "indices of 70000": lambda: (narrow_to(70000), _INDICES),
    "indices as they are": lambda: (narrow_to(2**40), _INDICES),
    "relu": lambda: (relu_region(), activation()),
    "hardtanh": lambda: (hardtanh_region(), activation()),
    "hardtanh with nan": lambda: (hardtanh_region(), _with_nan()),
    "sign": lambda: (sign(), activation()),
    "dropout": lambda: (dropout_mask(0.3), _UNIFORM_MASK),
    "3x3 windows": _pooled,
    "20x20 windows": _wide_pooled,
    "shape only": lambda: (shape_only(), activation()),
    "copy": lambda: (Copy(), activation()),
    "few-bit gelu": lambda: (FewBitCodec(few_bit_table("gelu", 3)), activation()),
    "few-bit relu": lambda: (FewBitCodec(few_bit_table("relu", 1)), activation()),
    "prelu": lambda: (
        sign_exact(codec_from(quant.ShiftedUint2DynamicActPerBucketFloat)), activation()),
    "prelu, stock": lambda: (sign_exact(codec_from(config_of("Fp8e4m3Act"))), activation()),
    "modules": lambda: (_general(), activation()),
    "per sample, of one width": lambda: _per_sample(1),
    "per sample": lambda: _per_sample(100),
    "two frequencies": lambda: (TwoFrequencyCodec(block=2), activation()),
    "pooled": lambda: (PooledCodec(2), activation()),
    "pooled, 2 bits": lambda: (PooledCodec(2, inner=_general()), activation()),
    "windows": lambda: (WindowedCodec(3), activation()),
    "projected": lambda: (ProjectedCodec(1 / 4), normals((9, 64)).float()),
    "largest": lambda: (TopKCodec(1 / 4, bucket_size=40), activation()),
    "random": lambda: (RandomKCodec(1 / 4, bucket_size=40), activation())}

#: name -> payload: all ready-made configs, Brevitas' own, and all lossless codecs.
PAYLOADS: dict[str, Callable[[], Packed]] = {
    **{name: lambda name=name: codec_from(getattr(quant, name)).encode(
        activation(), seed=1, where="conv2d in stem")
       for name in quant.act.__all__ if name not in ("ThesisInt2DynamicActPerTensorFloat",)},
    **{name: lambda name=name: _stock(name) for name in ALL},
    **{name: lambda made=made: _encoded(*made()) for name, made in LOSSLESS.items()}}


def _encoded(codec: Codec, x: Tensor) -> Packed:
    return codec.encode(x, seed=1, where="conv2d in stem")


@cache
def payload(name: str) -> Packed:
    """Returns a payload of :data:`PAYLOADS`. It is shared, so do not write to it."""
    return PAYLOADS[name]()


def with_tensor(packed: Packed, i: int, tensor: Tensor) -> Packed:
    """Returns ``packed`` with stored tensor ``i`` replaced."""
    return replace(packed, tensors=(*packed.tensors[:i], tensor, *packed.tensors[i + 1:]))


def _other_dtype(x: Tensor) -> Tensor:
    """Reads the bytes as another dtype, of the same width if there is one."""
    pairs = {torch.uint8: torch.int8, torch.int8: torch.uint8,
             torch.float32: torch.int32, torch.float64: torch.int64,
             torch.int16: torch.float16, torch.int32: torch.float32, torch.int64: torch.float64,
             torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
    return x.view(pairs[x.dtype])


def _gapped(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _resized(x: Tensor) -> Tensor:
    """Frees the memory, and keeps the shape."""
    x = x.clone()
    x.untyped_storage().resize_(max(0, x.untyped_storage().nbytes() - 1))
    return x


#: Corruptions of one stored tensor; the number sets the amount.
OF_TENSOR: dict[str, Callable[[Tensor, int], Tensor]] = {
    "truncated": lambda x, k: x.reshape(-1)[:max(0, x.numel() - k)],
    "extended": lambda x, k: torch.cat([x.reshape(-1), x.reshape(-1)[:1].expand(k)]),
    "another dtype": lambda x, k: _other_dtype(x),
    "wider": lambda x, k: x.to(torch.complex128),
    "another shape": lambda x, k: x.unsqueeze(0),
    "on no device": lambda x, k: x.to("meta").reshape(-1),
    "with gaps": lambda x, k: _gapped(x) if x.numel() > 1 else x.new_empty(2),
    "sparse": lambda x, k: x.reshape(-1).to_sparse(),
    "without memory": lambda x, k: _resized(x)}


def _dropped(packed: Packed, k: int) -> Packed:
    i = k % len(packed.tensors)
    return replace(packed, tensors=packed.tensors[:i] + packed.tensors[i + 1:])


def _added(packed: Packed, k: int) -> Packed:
    extra = packed.tensors[k % len(packed.tensors)] if packed.tensors else torch.zeros(k)
    return replace(packed, tensors=(*packed.tensors, extra))


def _swapped(packed: Packed, k: int) -> Packed:
    return replace(packed, tensors=(packed.tensors[-1], *packed.tensors[1:-1], packed.tensors[0]))


def _relaid(packed: Packed, **changes: object) -> Packed:
    return replace(packed, layout=replace(packed.layout, **changes))


def _larger(packed: Packed, k: int) -> Packed:
    shape = torch.Size([*packed.layout.shape[:-1], packed.layout.shape[-1] + 8 * k])
    stride = torch.empty(shape, device="meta").stride()
    return _relaid(packed, shape=shape, base_shape=shape, stride=stride)


def _longer_strides(packed: Packed, k: int) -> Packed:
    return _relaid(packed, stride=tuple(s + k for s in packed.layout.stride))


def _other_kind(packed: Packed, k: int) -> Packed:
    real = packed.layout.dtype.is_floating_point
    return _relaid(packed, dtype=torch.bool if real else torch.complex64)


#: Corruptions of a whole payload.
OF_PAYLOAD: dict[str, Callable[[Packed, int], Packed]] = {
    "dropped": _dropped,
    "added": _added,
    "swapped": _swapped,
    "larger": _larger,
    "longer strides": _longer_strides,
    "base of another shape": lambda packed, k: _relaid(
        packed, base_shape=torch.Size([packed.layout.numel + k])),
    "of another kind": _other_kind}
