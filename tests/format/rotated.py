"""Buckets that are hard to quantize, and the statistics of what rotated codes make of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    NEAREST,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    Transform,
)
from brevitas_bp.kernels import dispatch
from tests.strategies import normals

SIZE = 256
#: Error over energy about the mean for large buckets, D / (1 - D): an upper bound for smaller buckets.
ENERGY = {1: 0.5707963, 2: 0.1331212, 3: 0.0357840, 4: 0.0095921}


def levels_spec(width: int, transform: Transform = ROTATED_TWICE, size: int = SIZE) -> BucketQuantSpec:
    """Returns the quantizer of the RotatedNormal configs."""
    return BucketQuantSpec(width, size, CENTRED, NORMAL, NEAREST, transform=transform)


def strict_spec(width: int, size: int = SIZE) -> BucketQuantSpec:
    """Returns the quantizer of the RotatedUint configs."""
    return BucketQuantSpec(width, size, rounding=DITHERED, transform=ROTATED)


def _sparse(second: float) -> Tensor:
    x = torch.zeros(SIZE)
    x[0], x[1] = 1, second
    return x


def _student(shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns Student-t variables of three degrees of freedom."""
    chi = sum(normals(shape, seed + k).square() for k in range(1, 4))
    assert isinstance(chi, Tensor)
    return (normals(shape, seed) * (3 / chi).sqrt()).float()


def _with_outlier(shape: tuple[int, ...], seed: int) -> Tensor:
    x = normals(shape, seed).float()
    x.view(-1, SIZE)[:, 17] = 30
    return x


def _derivative_of_silu(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


#: name -> values of a shape [n, SIZE], from a seed: the rows of the published tables.
DATA: dict[str, Callable[[tuple[int, ...], int], Tensor]] = {
    "normal": lambda shape, seed: normals(shape, seed).float(),
    "student": _student,
    "relu": lambda shape, seed: normals(shape, seed).float().relu(),
    "silu": lambda shape, seed: torch.nn.functional.silu(normals(shape, seed).float()),
    "outlier": _with_outlier,
    "shifted": lambda shape, seed: normals(shape, seed).float() + 3,
    "silu's derivative": lambda shape, seed: _derivative_of_silu(normals(shape, seed).float())}

#: name -> one bucket, on which a single rotation is biased, or might be.
HARD: dict[str, Tensor] = {
    "e1 + 0.3 e2": _sparse(0.3),
    "e1 + 0.9 e2": _sparse(0.9),
    "e1": _sparse(0.0),
    "outlier": _with_outlier((SIZE,), 3),
    "student": _student((SIZE,), 5),
    "ramp": torch.arange(SIZE).float() / SIZE,
    "step": (torch.arange(SIZE) >= 200).float(),
    "sine": torch.sin(torch.arange(SIZE) * 6.2831853 / SIZE)}


def round_trip(x: Tensor, spec: BucketQuantSpec, seed: int = 0) -> Tensor:
    """Encodes and decodes buckets [n, SIZE]."""
    flat = x.reshape(-1)
    encoded = dispatch.encode(flat, spec, seed)
    return dispatch.decode(encoded, spec, seed, flat.numel(), flat.dtype).view_as(x)


def relative_energy(x: Tensor, spec: BucketQuantSpec, about_mean: bool = True) -> Tensor:
    """Returns the energy of the errors over the energy of all buckets [n, SIZE], about their means."""
    centre = x.double().mean(-1, keepdim=True) if about_mean else 0
    error = round_trip(x, spec).double() - x
    return error.square().sum() / (x.double() - centre).square().sum()


def errors_of(bucket: Tensor, spec: BucketQuantSpec, draws: int, seed: int = 0) -> Tensor:
    """Returns errors of ``draws`` copies [draws, SIZE], over the norm of the bucket about its mean."""
    decoded = round_trip(bucket.expand(draws, -1).contiguous(), spec, seed).double()
    values = bucket.double()
    return (decoded - values) / (values - values.mean()).norm()


def squared_bias(errors: Tensor) -> float:
    """Returns an estimate of the squared norm of the mean error, itself without bias.

    ``|mean|**2`` is too large by the variance of the mean, so this is the mean product of two errors.
    """
    n = len(errors)
    total = errors.sum(0)
    return float((total.square().sum() - errors.square().sum()) / (n * (n - 1)))
