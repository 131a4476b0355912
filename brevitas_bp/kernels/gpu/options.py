"""The constants with which Triton kernels are compiled: they follow from quantizer, dtype and sizes."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels.gpu.constants import BF16, F16, F32

# Elements of each slice that a thread holds: 16 bytes of float32.
_PER_THREAD = 4
#: The dtypes that kernels load and store.
FORMATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
#: Options of every launch. The hash of the noise wraps around. This is no error, even when kernels are
#: debugged.
LAUNCH = {"enable_fp_fusion": False, "sanitize_overflow": False}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current, as Triton launches on the current device; the interpreter has none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def widths_of(spec: BucketQuantSpec, any_mixed: bool) -> tuple[int, int]:
    """Returns the widths that a kernel writes: (base buckets, mixed buckets or 0 for one width)."""
    if spec.mix_bit_width is None:
        return spec.bit_width, 0
    if spec.mix_per == "tensor":
        return spec.mix_bit_width if any_mixed else spec.bit_width, 0
    return spec.bit_width, spec.mix_bit_width


@lru_cache(maxsize=256)
def shape_of(size: int) -> dict[str, int]:
    """Returns the constants that follow from the bucket size: the tile of a program, and its warps.

    A thread holds ``_PER_THREAD`` elements of each slice. So loads and stores of all dtypes agree on
    which thread holds which element, and nothing travels through shared memory.
    """
    lanes = 1 << (size // 8 - 1).bit_length()
    num_warps = min(max(4, lanes // (32 * _PER_THREAD)), 32)
    return {
        "size": size, "buckets": max(1, num_warps * 32 * _PER_THREAD // lanes), "lanes": lanes,
        "num_warps": num_warps}


@lru_cache(maxsize=256)
def encode_options(
        spec: BucketQuantSpec, widths: tuple[int, int], dtype: torch.dtype,
        size: int) -> dict[str, Any]:
    """Returns the constants of the kernel that encodes; ``widths`` are those of :func:`widths_of`."""
    (width, mix_width), codes = widths, spec.code_range
    options = {
        **shape_of(size), "levels": _levels(size), "width": width, "mix_width": mix_width,
        "top": codes.top(width), "mix_top": codes.top(mix_width or width), "signed": codes.signed,
        "affine": spec.affine, "pads_with_zero": spec.pads_with_zero, "rule": spec.range_rule,
        "form": spec.offset_form, "rounding": spec.rounding.number,
        "float_format": FORMATS[dtype], "metadata_format": FORMATS[spec.metadata_dtype], **LAUNCH}
    if spec.works_in_units:
        options |= {**_unit_options(spec), "centres": spec.scale_rule.centres}
    return options


@lru_cache(maxsize=256)
def decode_options(
        spec: BucketQuantSpec, widths: tuple[int, int], dtype: torch.dtype,
        size: int) -> dict[str, Any]:
    """Returns the constants of the kernel that decodes; arguments as of :func:`encode_options`."""
    (width, mix_width), codes = widths, spec.code_range
    options = {
        **shape_of(size), "width": width, "mix_width": mix_width, "lowest": codes.lowest(width),
        "mix_lowest": codes.lowest(mix_width or width), "affine": spec.affine,
        "rounding": spec.rounding.number, "largest": torch.finfo(dtype).max,
        "float_format": FORMATS[dtype], "metadata_format": FORMATS[spec.metadata_dtype], **LAUNCH}
    if spec.works_in_units:
        options |= {**_unit_options(spec), "levels": _levels(size)}
    return options


def _levels(size: int) -> int:
    """Returns how often the lanes of a program can be halved."""
    return shape_of(size)["lanes"].bit_length() - 1


def _unit_options(spec: BucketQuantSpec) -> dict[str, Any]:
    """Returns the constants of kernels of buckets in units."""
    # The number of a transform is its number of rotations.
    return {"rotations": spec.transform.number, "by_levels": spec.code_range.level is not None}
