"""The launcher interface: encodes and decodes tensors of one size, dtype and kind of device."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from brevitas_bp.format import reference
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.normalizing import Affine, denormalize, normalize
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NARROW, SIGN_MAGNITUDE, UNSIGNED

#: Code ranges of all backends, which take their ends as numbers.
CODE_RANGES = frozenset({UNSIGNED, NARROW, SIGN_MAGNITUDE})


class Launcher(Protocol):
    """Encodes and decodes tensors of one size, dtype and kind of device."""

    def encode(
            self, x: Tensor, seed: int, derivative: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Returns payload and metadata of a contiguous tensor, which must not be lazily negated.

        With ``derivative``, the derivative of this function at ``x`` is encoded, see
        :mod:`~brevitas_bp.activations.derivatives`. With ``affine``, ``x`` is normalized first.
        """
        ...

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """Returns the tensor; its strides leave no gaps in memory. ``affine`` undoes a normalization."""
        ...


class Kernels(Protocol):
    """``encode`` and ``decode`` of flat tensors without rows, as :mod:`brevitas_bp.format.reference`."""

    def encode(self, flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded: ...

    def decode(
        self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor: ...


class StepwiseLauncher:
    """Launches kernels that do not handle rows, derivatives or normalization; does these steps itself.

    Args:
        kernels: encode and decode flat tensors.
        spec: the quantizer.
        numel: elements of a tensor.
        dtype: dtype of the tensor.
        derivative: ``(flat tensor, name) -> derivative``.
    """

    def __init__(
            self, kernels: Kernels, spec: BucketQuantSpec, numel: int, dtype: torch.dtype,
            derivative: Callable[[Tensor, str], Tensor]) -> None:
        self._kernels, self._spec, self._numel, self._dtype = kernels, spec, numel, dtype
        self._derivative = derivative

    def encode(
            self, x: Tensor, seed: int, derivative: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Launcher.encode`."""
        flat = x.view(-1)
        if derivative is not None:
            flat = self._derivative(flat, derivative)
        elif affine is not None:
            flat = normalize(flat, affine)
        spec = self._spec
        if spec.works_in_units:
            # The mean of a bucket must not count padding. Of the kernels that need these steps, only the
            # reference has these stages, and it has rows.
            return reference.encode(flat, spec, seed).tensors
        return self._kernels.encode(*reference.padded_rows(flat, spec), seed).tensors

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """See :meth:`Launcher.decode`."""
        encoded = Encoded(payload, metadata, self._spec.affine)
        dtype = self._dtype if affine is None else compute_dtype(self._dtype)
        flat = self._decode_rows(encoded, seed, dtype)
        if affine is not None:
            flat = denormalize(flat, affine, self._dtype)
        return flat.as_strided(shape, stride)

    def _decode_rows(self, encoded: Encoded, seed: int, dtype: torch.dtype) -> Tensor:
        spec, numel = self._spec, self._numel
        if spec.row_size is None:
            return self._kernels.decode(encoded, spec, seed, numel, dtype)
        n, size = reference.bucket_shape(numel, spec.bucket_size, spec.row_size)
        padded = self._kernels.decode(
            encoded, reference.without_rows(spec), seed, n * size, dtype)
        return reference.cut_rows(padded, spec.row_size, size)
