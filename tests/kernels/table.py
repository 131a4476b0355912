"""The cases with which every fast form of the kernels is compared with the reference."""

from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from brevitas_bp.format import reference
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    COMPANDED,
    DITHERED,
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    NO_TRANSFORM,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    SIGN_MAGNITUDE,
    STOCHASTIC,
    UNBIASED,
    UNSIGNED,
    ZERO_IN_RANGE,
)
from tests.strategies import ROUNDINGS, RULES
from tests.support import same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    BucketQuantSpec(width, size, rule, code_range, rounding, metadata_dtype=metadata)
    for width, (rule, code_range), size, rounding, metadata in product(
        range(1, 9), RULES, (24, 256), ROUNDINGS, (torch.float32, torch.bfloat16))
    if width >= code_range.least_width]
SPECS += [BucketQuantSpec(2, 256, integer_zero_point=True)]
SPECS += [
    BucketQuantSpec(width, size, ZERO_IN_RANGE, rounding=rounding)
    for width, size, rounding in product((2, 3, 8), (24, 256), ROUNDINGS)]
SPECS += [
    BucketQuantSpec(base, 24, mix_bit_width=mix, mix_prob=p, mix_per=per)
    for base, mix in ((2, 4), (4, 2), (3, 6), (4, 8)) for p in (0.0, 0.3, 1.0)
    for per in ("bucket", "tensor")]
# Buckets that kernels process in pieces: whole tensors, or buckets larger than the cache.
LARGE_SPECS = [
    BucketQuantSpec(width, size, rule, code_range, rounding, metadata_dtype=metadata)
    for width, (rule, code_range), size, (rounding, metadata) in product(
        range(1, 9), RULES, (None, 1 << 17), ((NEAREST, torch.bfloat16), (STOCHASTIC, torch.float32)))
    if width >= code_range.least_width]
LARGE_SPECS += [BucketQuantSpec(2, None, integer_zero_point=True)]
LARGE_SPECS += [BucketQuantSpec(width, None, ZERO_IN_RANGE) for width in (2, 5)]
LARGE_SPECS += [
    BucketQuantSpec(2, size, mix_bit_width=5, mix_prob=0.5, mix_per=per)
    for size in (None, 4096) for per in ("bucket", "tensor")]
# Codes of levels, codes of rotated buckets, and dithered codes.
_FLOAT32, _BFLOAT16 = torch.float32, torch.bfloat16
UNIT_SPECS = [
    BucketQuantSpec(width, size, *stages, metadata_dtype=metadata, transform=transform)
    for width, stages, (size, transform, metadata) in product(
        range(1, 9),
        ((CENTRED, NORMAL, NEAREST), (UNBIASED, NORMAL, NEAREST), (MIN_MAX, UNSIGNED, DITHERED),
         (MIN_MAX, UNSIGNED, STOCHASTIC), (MAX, NARROW, DITHERED), (L2, SIGN_MAGNITUDE, NEAREST)),
        ((16, ROTATED, _BFLOAT16), (64, ROTATED_TWICE, _FLOAT32), (256, ROTATED_TWICE, _BFLOAT16),
         (256, ROTATED, _FLOAT32), (2048, ROTATED_TWICE, _FLOAT32)))
    if width >= stages[1].least_width]
UNIT_SPECS += [
    BucketQuantSpec(width, size, rule, NORMAL, NEAREST, metadata_dtype=metadata)
    for width, (size, rule, metadata) in product(
        range(1, 9), ((24, CENTRED, _BFLOAT16), (256, CENTRED, _FLOAT32), (256, UNBIASED, _BFLOAT16)))]
UNIT_SPECS += [
    BucketQuantSpec(width, size, rule, code_range, DITHERED, metadata_dtype=metadata)
    for width, (rule, code_range), (size, metadata) in product(
        range(1, 9), RULES, ((24, _BFLOAT16), (256, _FLOAT32)))
    if width >= code_range.least_width]
UNIT_SPECS += [
    BucketQuantSpec(width, size, rounding=COMPANDED, metadata_dtype=metadata, transform=transform)
    for width, (size, metadata, transform) in product(
        range(1, 9), ((24, _BFLOAT16, NO_TRANSFORM), (256, _FLOAT32, NO_TRANSFORM),
                      (64, _BFLOAT16, ROTATED)))]
UNIT_SPECS += [
    BucketQuantSpec(
        base, 64, *stages, mix_bit_width=mix, mix_prob=p, mix_per=per, transform=transform)
    for base, mix in ((1, 2), (4, 1), (3, 8)) for p in (0.3, 1.0) for per in ("bucket", "tensor")
    for transform, *stages in (
        (ROTATED_TWICE, CENTRED, NORMAL, NEAREST), (ROTATED, MIN_MAX, UNSIGNED, DITHERED),
        (NO_TRANSFORM, MIN_MAX, UNSIGNED, DITHERED), (NO_TRANSFORM, MIN_MAX, UNSIGNED, COMPANDED))]
UNIT_SPECS += [BucketQuantSpec(2, 256, rounding=DITHERED, integer_zero_point=True)]
UNIT_SPECS += [BucketQuantSpec(3, 256, ZERO_IN_RANGE, rounding=DITHERED)]
# Dithered buckets that no compiled kernel handles, because they are larger than the cache.
LARGE_DITHERED_SPECS = [
    BucketQuantSpec(width, size, rule, code_range, DITHERED)
    for width, (rule, code_range), size in product(range(2, 9, 2), RULES, (None, 1 << 17))]


class Form(Protocol):
    """A module of kernels, or a replacement for one."""

    def encode(self, flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded: ...

    def decode(
        self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor: ...


def samples(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns flat tensors with all kinds of values."""
    generator = torch.Generator().manual_seed(0)
    largest, computed = torch.finfo(dtype).max, compute_dtype(dtype)
    normal = torch.randn(1000, generator=generator, dtype=computed)
    broken = torch.randn(2000, generator=generator, dtype=computed)
    broken[[5, 700, 1500]] = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(computed)
    data = {
        "one": normal[:1], "seven": normal[:7], "normal": normal, "whole": normal.repeat(5)[:4608],
        "shifted": normal + 100, "constant": torch.full((700,), 3.7), "zero": torch.zeros(300),
        "signed zeros": torch.tensor([-0.0, 0.0] * 100),
        "subnormal": normal * torch.finfo(computed).tiny, "one hot": torch.eye(4, 256).view(-1) * 3.7,
        "broken": broken}
    out = {name: x.to(dtype) for name, x in data.items()}
    out["huge"] = (normal.double() * largest).clamp(-largest, largest).to(dtype)
    return out


def joined(dtype: torch.dtype, numel: int) -> Tensor:
    """Returns one tensor with all kinds of values, in equal parts."""
    parts = [x for x in samples(dtype).values() if x.numel() >= 200]
    broken = samples(dtype)["broken"][[4, 5, 6, 700, 701, 1500]]
    size = -(-numel // (len(parts) + 1))
    # Broken values come last. At most sizes, each kind of them has its own bucket.
    filled = [part.repeat(-(-size // part.numel()))[:size] for part in [*parts, parts[0].clone()]]
    filled[-1][torch.linspace(0, size - 1, 6).long()] = broken
    return torch.cat(filled)[:numel]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors are equal, including the bits of a NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(
        a.view(torch.uint8), b.view(torch.uint8))


def check(form: Form, x: Tensor, spec: BucketQuantSpec, seed: int = 3) -> None:
    """Asserts that ``form`` stores the reference's bytes, and decodes them to equal values."""
    expected, got = reference.encode(x, spec, seed), form.encode(x, spec, seed)
    for name, a, b in zip(("payload", "metadata"), expected.tensors, got.tensors):
        assert same_bytes(a, b), (name, spec)
    values = [
        one.decode(expected, spec, seed, x.numel(), x.dtype) for one in (reference, form)]
    assert same_bits(*values), ("values", spec)
