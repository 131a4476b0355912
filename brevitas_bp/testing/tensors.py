"""Float tensors of awkward shapes, dtypes, memory layouts and values.

:data:`VALUES` and :data:`LAYOUTS` are tables of functions; a test may take all of their rows, or name
some. :mod:`~brevitas_bp.testing.strategies` draws from them with hypothesis.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from brevitas_bp.codec.base import FLOATS
from brevitas_bp.errors import UnknownNameError, nearest

#: Dtypes of real floating-point numbers, of 16 to 64 bits.
DTYPES = FLOATS


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name without ``torch.``, for test ids and messages."""
    return str(dtype).removeprefix("torch.")


def checked_names(where: str, names: Iterable[str], table: Mapping[str, object]) -> tuple[str, ...]:
    """Returns ``names`` as a tuple.

    Raises:
        UnknownNameError: a name is not in the table.
        ValueError: there is no name.
    """
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if name not in table:
            raise UnknownNameError(
                f"brevitas_bp.testing.{where}: there is no {name!r}{nearest(name, table)}; the names "
                f"are {', '.join(map(repr, table))}")
    if not found:
        raise ValueError(f"brevitas_bp.testing.{where}: expected one name or more, got none")
    return found


def _limited(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit)


def _with(bad: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    def values(x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.clone()
        x.view(-1)[x.numel() // 2:x.numel() // 2 + 1] = bad
        return x

    return values


#: name -> function of float64 normals and a dtype that returns values of that kind.
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
#: All kinds but "huge": values near the largest float have a limited range, so that nothing overflows.
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


#: The same shape (except for the last) and values (except for "expanded"), in other memory layouts.
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
