"""Float tensors of awkward shapes, dtypes, memory layouts and values, for all tests."""

from collections.abc import Callable
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    SIGN_MAGNITUDE,
    STOCHASTIC,
    UNSIGNED,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """Name for test ids."""
    return str(dtype).removeprefix("torch.")


def _limited(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit)


def _with(bad: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    def values(x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.clone()
        x.view(-1)[x.numel() // 2:x.numel() // 2 + 1] = bad
        return x

    return values


# name -> function of float64 normals and a dtype that returns values of that kind.
FINITE: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "normal": lambda x, dtype: x,
    "shifted": lambda x, dtype: x + 100,
    "rectified": lambda x, dtype: x.relu(),
    "constant": lambda x, dtype: torch.full_like(x, 3.7),
    "zeros": lambda x, dtype: torch.zeros_like(x),
    "signed zeros": lambda x, dtype: torch.zeros_like(x).copysign(x),
    "subnormal": lambda x, dtype: x * torch.finfo(dtype).tiny,
    "tiny": lambda x, dtype: x * torch.finfo(dtype).tiny * 1000,
    "huge": lambda x, dtype: _limited(x * torch.finfo(dtype).max, dtype),
    "outlier": lambda x, dtype: x.where(x < 2, x * 1000)}
# All kinds but "huge": values near the largest float have a limited range, so that nothing overflows.
MODERATE = tuple(name for name in FINITE if name != "huge")
NON_FINITE: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "nan": _with(float("nan")),
    "inf": _with(float("inf")),
    "-inf": _with(float("-inf"))}
VALUES = FINITE | NON_FINITE


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _gapped(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2] if x.dim() else x


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(3), x.reshape(-1)])[3:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x) if x.dim() else x


def _odd_unit_stride(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.as_strided((1, *x.shape), (12345, *x.stride()))


# The same shape (except for the last) and values (except for "expanded"), in other memory layouts.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": _transposed,
    "channels_last": _channels_last,
    "gapped": _gapped,
    "offset": _offset,
    "expanded": _expanded,
    "odd unit stride": _odd_unit_stride}


def normals(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Returns a standard normal float64 tensor from its own generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@cache
def awkward_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns one tensor per layout and kind of values, with sizes that no bucket divides; shared."""
    normal = normals((2, 5, 9, 11)).to(dtype)
    tensors = {name: layout(normal) for name, layout in LAYOUTS.items()}
    for name, values in VALUES.items():
        tensors[f"{name} values"] = values(normals((700,), 1), dtype).to(dtype)
    tensors["0-d"] = normals((), 2).to(dtype)
    tensors["one element"] = normals((1,), 3).to(dtype)
    tensors["whole buckets"] = normals((4, 512), 4).to(dtype)
    tensors["empty"] = torch.empty((0, 3), dtype=dtype)
    return tensors


@st.composite
def float_tensors(
        draw: st.DrawFn,
        dtypes: tuple[torch.dtype, ...] = DTYPES,
        values: tuple[str, ...] = tuple(FINITE)) -> Tensor:
    """Draws tensors of any rank up to 4, layout, dtype and kind of values."""
    shape = tuple(draw(st.lists(st.integers(1, 13), max_size=4)))
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(values))
    layout = draw(st.sampled_from(tuple(LAYOUTS)))
    normal = normals(shape, draw(st.integers(0, 2**16)))
    return LAYOUTS[layout](VALUES[kind](normal, dtype).to(dtype))


seeds = st.integers(0, 2**64 - 1)

RULES = ((MIN_MAX, UNSIGNED), (MAX, NARROW), (L2, NARROW), (MAX, SIGN_MAGNITUDE))
ROUNDINGS = (NEAREST, STOCHASTIC)


@st.composite
def specs(draw: st.DrawFn) -> BucketQuantSpec:
    """Draws any bucket quantizer, including two widths and whole tensors."""
    scale_rule, code_range = draw(st.sampled_from(RULES))
    widths = st.integers(code_range.least_width, 8)
    integer = scale_rule is MIN_MAX and draw(st.booleans())
    mix = draw(st.none() | widths)
    return BucketQuantSpec(
        bit_width=draw(widths),
        bucket_size=draw(st.sampled_from((None, 8, 24, 256))),
        scale_rule=scale_rule,
        code_range=code_range,
        rounding=draw(st.sampled_from(ROUNDINGS)),
        integer_zero_point=integer,
        metadata_dtype=torch.float32 if integer else draw(
            st.sampled_from((torch.float32, torch.bfloat16))),
        mix_bit_width=mix,
        mix_prob=0.0 if mix is None else draw(st.sampled_from((0.0, 0.3, 1.0))),
        mix_per=draw(st.sampled_from(("bucket", "tensor"))))
