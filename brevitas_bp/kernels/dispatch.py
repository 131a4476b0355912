"""Chooses the kernels of a tensor: by its device, and by what each backend covers.

All backends give the same bytes, those of :mod:`brevitas_bp.format.reference`. A backend is a module
with ``covers(spec, numel, dtype)`` and ``launcher(spec, numel, dtype)``. The first backend of a device
that covers a quantizer serves it. The reference covers everything. :func:`use` forces the reference.

Code that handles many tensors of one size should keep a :func:`launcher`. :func:`encode` and
:func:`decode` are for single tensors.
"""

import importlib.util
import threading
import warnings
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from brevitas_bp.activations import derivatives
from brevitas_bp.activations.predictions import Prediction
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format import averages, differences, few_bit, masks, reference, relative
from brevitas_bp.format.masks import Interval, Windows
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels.launchers import Launcher, StepwiseLauncher

Preference = Literal["fastest", "reference"]


class _Choice(threading.local):
    """The kernels that the current thread prefers, see :class:`use`."""

    #: Preference of the process.
    process: ClassVar[list[Preference]] = ["fastest"]
    #: Preferences of the blocks that this thread is inside of, innermost last.
    blocks: tuple[Preference, ...] = ()

    @property
    def preference(self) -> Preference:
        return self.blocks[-1] if self.blocks else self.process[0]


#: The choice of this process. Launchers made with another preference are out of date.
CHOICE = _Choice()


class use:  # noqa: N801
    """Sets the kernels that this process uses from now on.

    As a context manager, it sets the kernels of this thread within the block, and nothing else.

    Both preferences give the same bytes and decoded values. "reference" is slower. It helps to find
    out whether a compiled kernel causes an error.

    Args:
        preference: "fastest", the default, or "reference": torch operations only.

    Raises:
        UnknownNameError: ``preference`` is neither of the two.

    >>> with use("reference"):
    ...     backend(torch.device("cpu"), BucketQuantSpec(), 256, torch.float32).__name__
    'brevitas_bp.format.reference'
    """

    def __init__(self, preference: Any) -> None:
        known: tuple[str, ...] = get_args(Preference)
        if preference not in known:
            raise UnknownNameError(
                f"brevitas_bp.kernels.use: preference must be 'fastest' or 'reference', got "
                f"{preference!r}{nearest(str(preference), known)}")
        self._preference: Preference = preference
        self._before: Preference | None = CHOICE.process[0]
        CHOICE.process[0] = preference

    def __enter__(self) -> None:
        if self._before is not None:
            CHOICE.process[0], self._before = self._before, None
        CHOICE.blocks = (*CHOICE.blocks, self._preference)

    def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None,
            traceback: TracebackType | None) -> None:
        CHOICE.blocks = CHOICE.blocks[:-1]


@lru_cache(maxsize=1)
def _numba_works() -> bool:
    """Returns whether numba is usable; imports it at first use. Warns once if it is not."""
    try:
        if importlib.util.find_spec("numba") is None:
            raise ImportError("it is not installed: pip install brevitas-bp[cpu]")
        import numba

        if numba.config.DISABLE_JIT:  # pyright: ignore
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        import brevitas_bp.kernels.cpu.launch  # noqa: F401
    except Exception as error:
        warnings.warn(
            "brevitas_bp: CPU tensors use the slower torch reference (same bytes), because numba does "
            f"not work. The reason: {error}", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=1)
def _triton_works() -> bool:
    """Returns whether the Triton kernels can run; imports them at first use. Warns once if not."""
    try:
        if torch.version.hip is not None:
            raise RuntimeError("the kernels need an NVIDIA device")
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
            raise RuntimeError(f"the kernels need Triton 3.6, but {triton.__version__} is installed")
        # Triton compiles a small C extension here, which needs a C compiler and Python's headers.
        target: Any = triton.runtime.driver.active.get_current_target()
        if target.arch < 80:
            raise RuntimeError(
                f"the kernels need compute capability 8.0, but this device has {target.arch}")
        import brevitas_bp.kernels.gpu.launch  # noqa: F401
    except Exception as error:
        warnings.warn(
            "brevitas_bp: the Triton kernels cannot run, so CUDA tensors use the slower torch "
            "reference (same bytes); pip install brevitas-bp[gpu], on a machine with a C compiler. "
            f"The reason: {error!r}", stacklevel=2)
        return False
    return True


def _is_compiled_for(device: torch.device, preference: Preference | None = None) -> bool:
    """Returns whether compiled CPU kernels serve tensors of a device."""
    return device.type == "cpu" and (preference or CHOICE.preference) == "fastest" and _numba_works()


def _has_triton_for(device: torch.device, preference: Preference | None = None) -> bool:
    """Returns whether Triton kernels serve tensors of a device."""
    return device.type == "cuda" and (preference or CHOICE.preference) == "fastest" and _triton_works()


def _backends(device: torch.device, preference: Preference) -> list[ModuleType]:
    """Returns the compiled backends of a device, in the order of preference."""
    if _is_compiled_for(device, preference):
        from brevitas_bp.kernels.cpu import large, launch

        return [launch, large]
    if _has_triton_for(device, preference):
        from brevitas_bp.kernels.gpu import launch as gpu

        return [gpu]
    return []


def backend(
        device: torch.device, spec: BucketQuantSpec, numel: int, dtype: torch.dtype,
        preference: Preference | None = None) -> ModuleType:
    """Returns the module that serves such tensors: the first that covers them, else the reference.

    Args:
        device: of the tensors.
        spec: the quantizer.
        numel: elements of a tensor.
        dtype: of the tensors.
        preference: see :class:`use`; None takes that of this thread.
    """
    found = _backends(device, preference or CHOICE.preference)
    return next((b for b in found if b.covers(spec, numel, dtype)), reference)


def launcher(
        spec: BucketQuantSpec, numel: int, dtype: torch.dtype, device: torch.device,
        preference: Preference | None = None) -> Launcher:
    """Returns the launcher that encodes and decodes tensors of this size, dtype and device."""
    chosen = backend(device, spec, numel, dtype, preference)
    if chosen is reference:
        return StepwiseLauncher(reference, spec, numel, dtype, derivative)
    return chosen.launcher(spec, numel, dtype)


def launcher_from_text(spec: str, numel: int, dtype: torch.dtype, device: torch.device) -> Launcher:
    """Returns a :func:`launcher` for a quantizer that :meth:`BucketQuantSpec.to_text` wrote."""
    return _from_text(spec, numel, dtype, device, CHOICE.preference)


@lru_cache(maxsize=4096)
def _from_text(
        spec: str, numel: int, dtype: torch.dtype, device: torch.device,
        preference: Preference) -> Launcher:
    return launcher(BucketQuantSpec.from_text(spec), numel, dtype, device, preference)


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    # A flat tensor may have gaps. A lazily negated tensor is not yet negated in memory.
    flat = flat.contiguous().resolve_neg()
    made = launcher(spec, flat.numel(), flat.dtype, flat.device)
    return Encoded(*made.encode(flat, seed), spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.reference.decode`."""
    made = launcher(spec, numel, dtype, encoded.payload.device)
    return made.decode(*encoded.tensors, seed, torch.Size((numel,)), (1,))


def derivative(flat: Tensor, name: str) -> Tensor:
    """See :func:`brevitas_bp.activations.derivatives.derivative`; takes the same tensors."""
    if _is_compiled_for(flat.device):
        from brevitas_bp.kernels.cpu import derivatives as compiled

        return compiled.derivative(flat, name)
    return derivatives.derivative(flat, name)


def mask_backend(device: torch.device) -> ModuleType:
    """Returns the module whose mask functions (:mod:`brevitas_bp.format.masks`) serve a device."""
    if _is_compiled_for(device):
        from brevitas_bp.kernels.cpu import masks as compiled

        return compiled
    if _has_triton_for(device):
        from brevitas_bp.kernels.gpu import masks as gpu

        return gpu
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


def mask_(x: Tensor, packed: Tensor, strays: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.mask_`."""
    return mask_backend(x.device).mask_(x, packed, strays)


def find_strays(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.find_strays`."""
    return mask_backend(x.device).find_strays(x, packed)


def window_codes(index: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_codes`."""
    return mask_backend(index.device).window_codes(index, windows, dtype)


def window_indices(codes: Tensor, windows: Windows) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_indices`."""
    return mask_backend(codes.device).window_indices(codes, windows)


def few_bit_backend(device: torch.device) -> ModuleType:
    """Returns the module whose ``encode`` and ``decode`` serve few-bit tables on a device."""
    if _is_compiled_for(device):
        from brevitas_bp.kernels.cpu import few_bit as compiled

        return compiled
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


def relative_backend(device: torch.device) -> ModuleType:
    """Returns the module whose ``encode`` and ``decode`` serve relative codes on a device."""
    if _is_compiled_for(device):
        from brevitas_bp.kernels.cpu import relative as compiled

        return compiled
    return relative


def encode_relative(flat: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.relative.encode`."""
    return relative_backend(flat.device).encode(flat, seed)


def decode_relative(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.relative.decode`."""
    return relative_backend(codes.device).decode(codes, ranges, dtype)


def averages_backend(device: torch.device) -> ModuleType:
    """Returns the module whose ``group_means`` and ``spread`` serve tensors on a device."""
    if _is_compiled_for(device):
        from brevitas_bp.kernels.cpu import averages as compiled

        return compiled
    return averages


def group_means(x: Tensor, size: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.group_means`; ``x`` [A, L, I] is contiguous."""
    return averages_backend(x.device).group_means(x, size)


def spread(means: Tensor, size: int, length: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.spread`; ``means`` [A, n, I] is contiguous."""
    return averages_backend(means.device).spread(means, size, length)


def differences_backend(device: torch.device) -> ModuleType:
    """Returns the module whose functions (:mod:`brevitas_bp.format.differences`) serve a device."""
    if _is_compiled_for(device):
        from brevitas_bp.kernels.cpu import differences as compiled

        return compiled
    if _has_triton_for(device):
        from brevitas_bp.kernels.gpu import differences as gpu

        return gpu
    return differences


def fill_zeros(x: Tensor, row: int, strays: Tensor | None = None) -> Tensor:
    """See :func:`brevitas_bp.format.differences.fill_zeros`."""
    return differences_backend(x.device).fill_zeros(x, row, strays)


def subtract_prediction(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int,
        factors: Tensor | None = None, chunk: int = differences.CHUNK) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.differences.subtract_prediction`."""
    return differences_backend(x.device).subtract_prediction(
        x, derivative, prediction, row, factors, chunk)


def add_prediction_(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int, used: Tensor,
        chunk: int = differences.CHUNK) -> Tensor:
    """See :func:`brevitas_bp.format.differences.add_prediction_`."""
    return differences_backend(x.device).add_prediction_(x, derivative, prediction, row, used, chunk)
