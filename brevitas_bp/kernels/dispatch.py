"""Chooses the form of the kernels by device. All forms give the same bytes.

Buckets: whoever handles many tensors of one size has a :func:`launcher`; :func:`encode` and :func:`decode`
are for single ones.
"""

import importlib.util
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from brevitas_bp.activations import derivatives
from brevitas_bp.format import averages, few_bit, masks, reference
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.masks import Interval, Windows
from brevitas_bp.format.normalizing import Affine, denormalize, normalize
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec


@lru_cache(maxsize=1)
def _cpu_kernels() -> ModuleType | None:
    """The compiled CPU kernels, imported at first use; None, with one hint, where numba fails."""
    try:
        if importlib.util.find_spec("numba") is None:
            raise ImportError("it is not installed: pip install brevitas-bp[cpu]")
        import numba

        if numba.config.DISABLE_JIT:  # pyright: ignore
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        from brevitas_bp.kernels.cpu import launch as cpu
    except Exception as error:
        warnings.warn(
            "brevitas_bp: CPU tensors go through the slower torch reference (same bytes), because numba "
            f"cannot be used. The reason: {error}", stacklevel=2)
        return None
    return cpu


@lru_cache(maxsize=1)
def _large_cpu_kernels() -> ModuleType:
    from brevitas_bp.kernels.cpu import large as cpu_whole

    return cpu_whole


@lru_cache(maxsize=1)
def _gpu_kernels() -> ModuleType | None:
    """The Triton kernels, imported at first use; None, with one hint, where they cannot run."""
    try:
        if torch.version.hip is not None:
            raise RuntimeError("they are written for NVIDIA devices")
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
            raise RuntimeError(f"they need Triton 3.6, and {triton.__version__} is installed")
        # Triton compiles a small C extension here, which needs a compiler and Python's headers.
        target: Any = triton.runtime.driver.active.get_current_target()
        if target.arch < 80:
            raise RuntimeError(f"they need compute capability 8.0, and this device has {target.arch}")
        from brevitas_bp.kernels.gpu import launch as gpu
    except Exception as error:
        warnings.warn(
            "brevitas_bp: the Triton kernels cannot run, so CUDA tensors go through the slower torch "
            "reference (same bytes); pip install brevitas-bp[gpu], on a machine with a C compiler. "
            f"The reason: {error!r}", stacklevel=2)
        return None
    return gpu


def backend(device: torch.device, dtype: torch.dtype, spec: BucketQuantSpec) -> ModuleType:
    """The module whose ``encode`` and ``decode`` serve such tensors."""
    if device.type == "cpu":
        kernels = _cpu_kernels()
        if kernels is not None:
            return kernels if kernels.supports(dtype, spec) else _large_cpu_kernels()
    elif device.type == "cuda":
        kernels = _gpu_kernels()
        if kernels is not None and kernels.supports(dtype, spec):
            return kernels
    return reference


class Launcher(Protocol):
    """Encodes and decodes tensors of one size, dtype and kind of device."""

    def encode(
            self, x: Tensor, seed: int, function: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Payload and metadata of a contiguous tensor, which is no lazy negation.

        With a function, see :func:`derivative`, its derivative at ``x`` is encoded; with an affine map
        ``x`` is normalized first.
        """
        ...

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """The tensor, whose strides leave no gaps in memory; ``affine`` undoes a normalization."""
        ...


class _Plan:
    """A plan made of the functions of a backend; rows and normalization in torch operations."""

    def __init__(
            self, form: ModuleType, spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> None:
        self._form, self._spec, self._numel, self._dtype = form, spec, numel, dtype

    def encode(
            self, x: Tensor, seed: int, function: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        flat = x.view(-1)
        if function is not None:
            flat = derivative(flat, function)
        elif affine is not None:
            flat = normalize(flat, affine)
        return _encode(self._form, flat, self._spec, seed).tensors

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        encoded = Encoded(payload, metadata, self._spec.affine)
        dtype = self._dtype if affine is None else compute_dtype(self._dtype)
        flat = _decode(self._form, encoded, self._spec, seed, self._numel, dtype)
        if affine is not None:
            flat = denormalize(flat, affine, self._dtype)
        return flat.as_strided(shape, stride)


def _encode(form: ModuleType, flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """By the functions of a backend, some of which know no rows."""
    return form.encode(*reference.padded_rows(flat, spec), seed)


def _decode(
        form: ModuleType, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`_encode`."""
    if spec.row_size is None:
        return form.decode(encoded, spec, seed, numel, dtype)
    n, size = reference.bucket_shape(numel, spec.bucket_size, spec.row_size)
    padded = form.decode(encoded, reference.without_rows(spec), seed, n * size, dtype)
    return reference.cut_rows(padded, spec.row_size, size)


def launcher(spec: BucketQuantSpec, numel: int, dtype: torch.dtype, device: torch.device) -> Launcher:
    """How tensors of this size, dtype and device are encoded and decoded."""
    form = backend(device, dtype, spec)
    if device.type == "cpu":
        kernels = _cpu_kernels()
        if kernels is not None and kernels.has_plan(spec, numel, dtype):
            return kernels.plan(spec, numel, dtype)
    elif form is not reference:
        return form.plan(spec, numel, dtype)
    return _Plan(form, spec, numel, dtype)


@lru_cache(maxsize=4096)
def launcher_from_text(spec: str, numel: int, dtype: torch.dtype, device: torch.device) -> Launcher:
    """As :func:`launcher`, of a quantizer as :meth:`BucketQuantSpec.to_text` writes it."""
    return launcher(BucketQuantSpec.from_text(spec), numel, dtype, device)


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    return _encode(backend(flat.device, flat.dtype, spec), flat, spec, seed)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.reference.decode`."""
    form = backend(encoded.payload.device, dtype, spec)
    return _decode(form, encoded, spec, seed, numel, dtype)


def derivative(flat: Tensor, name: str) -> Tensor:
    """See :func:`brevitas_bp.activations.derivatives.derivative`; for tensors that it supports."""
    if _cpu_kernels() is not None:
        from brevitas_bp.kernels.cpu import derivatives as derivatives_cpu

        return derivatives_cpu.derivative(flat, name)
    return derivatives.derivative(flat, name)


def mask_backend(device: torch.device) -> ModuleType:
    """The module whose functions, those of :mod:`brevitas_bp.format.masks`, serve a device."""
    if device.type == "cpu" and _cpu_kernels() is not None:
        from brevitas_bp.kernels.cpu import masks as masks_cpu

        return masks_cpu
    return masks


def pack_interval(
        flat: Tensor, interval: Interval, *, watch_nan: bool = False) -> tuple[Tensor, bool]:
    """See :func:`brevitas_bp.format.masks.pack_interval`."""
    return mask_backend(flat.device).pack_interval(flat, interval, watch_nan=watch_nan)


def pack_bits(flat: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.pack_bits`."""
    return mask_backend(flat.device).pack_bits(flat)


def unpack_select(
        packed: Tensor, numel: int, outside: float, inside: float, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.unpack_select`."""
    return mask_backend(packed.device).unpack_select(packed, numel, outside, inside, dtype)


def rectify_(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.rectify_`."""
    return mask_backend(x.device).rectify_(x, packed)


def window_codes(index: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_codes`."""
    return mask_backend(index.device).window_codes(index, windows, dtype)


def window_indices(codes: Tensor, windows: Windows) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_indices`."""
    return mask_backend(codes.device).window_indices(codes, windows)


def few_bit_backend(device: torch.device) -> ModuleType:
    """The module whose ``encode`` and ``decode`` serve few-bit tables there."""
    if device.type == "cpu" and _cpu_kernels() is not None:
        from brevitas_bp.kernels.cpu import few_bit as few_bit_cpu

        return few_bit_cpu
    return few_bit


def encode_few_bit(
        flat: Tensor, borders: tuple[float, ...], bit_width: int,
        folded: bool) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.few_bit.encode`."""
    return few_bit_backend(flat.device).encode(flat, borders, bit_width, folded)


def decode_few_bit(
        payload: Tensor, flags: Tensor, levels: tuple[float, ...], bit_width: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.few_bit.decode`."""
    form = few_bit_backend(payload.device)
    return form.decode(payload, flags, levels, bit_width, numel, dtype)


def averages_backend(device: torch.device) -> ModuleType:
    """The module whose ``group_means`` and ``spread`` serve tensors there."""
    if device.type == "cpu" and _cpu_kernels() is not None:
        from brevitas_bp.kernels.cpu import averages as averages_cpu

        return averages_cpu
    return averages


def group_means(x: Tensor, size: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.group_means`; ``x`` [A, L, I] is contiguous."""
    return averages_backend(x.device).group_means(x, size)


def spread(means: Tensor, size: int, length: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.spread`; ``means`` [A, n, I] is contiguous."""
    return averages_backend(means.device).spread(means, size, length)
