"""The codec under test, the tensors it is tried with, and how its results are compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.testing.tensors import VALUES, dtype_name, normals

#: Dtypes that a codec is tried with if it does not say which dtypes it restores.
EXACT_DTYPES = (*FLOATS, torch.bool, torch.uint8, torch.int64)
#: Kinds of values of which the error of a lossy codec is bounded. A lossless one is tried with all.
KINDS = ("normal", "shifted", "rectified", "constant", "zeros", "outlier")
_SHAPE, _LENGTH = (4, 6, 9, 11), 700


@dataclass(frozen=True)
class Subject:
    """A codec, and what is known about it.

    Attributes:
        codec: the codec.
        given: tensors that the user gave; empty: tensors of this module.
        decodes_to: what a tensor decodes to, but for rounding; None: to itself.
        largest_error: bound on the error of a lossy codec, relative to the largest magnitude.
        stochastic: whether another seed must give other bytes; None: not known.
        device: device of the tensors of this module.
    """

    codec: Codec
    given: tuple[Tensor, ...] = ()
    decodes_to: Callable[[Tensor], Tensor] | None = None
    largest_error: float = 2.0
    stochastic: bool | None = None
    device: str | torch.device = "cpu"

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that the codec restores, or those of the given tensors."""
        if self.given:
            return tuple(dict.fromkeys(x.dtype for x in self.given))
        if self.codec.restores is not None:
            return tuple(self.codec.restores)
        return FLOATS if self.codec.lossy else EXACT_DTYPES

    def bases(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (case, tensor): for each dtype a tensor of rank 4 and a vector, or the given ones."""
        for i, x in enumerate(self.given):
            yield f"values[{i}] ({named(x)})", x
        if not self.given:
            for dtype in self.dtypes:
                for shape in (_SHAPE, (_LENGTH,)):
                    x = drawn(shape, dtype).to(self.device)
                    yield named(x), x

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of :meth:`bases` that hold floats, and are not empty."""
        yield from ((case, x) for case, x in self.bases() if x.is_floating_point() and x.numel())

    def first(self) -> tuple[str, Tensor]:
        """Returns the first tensor of :meth:`bases`."""
        return next(iter(self.bases()))

    def kinds(self) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors of all kinds of values, for each dtype; or the given tensors."""
        if self.given:
            yield from self.bases()
            return
        for dtype in self.dtypes:
            kinds = KINDS if self.codec.lossy else tuple(VALUES)
            for kind in kinds if dtype.is_floating_point else ("normal",):
                x = drawn((_LENGTH,), dtype, kind).to(self.device)
                yield f"{kind} values ({named(x)})", x

    def fresh(self) -> Codec:
        """Returns a codec without memory of earlier tensors."""
        return self.codec.at_site(object())

    def encode(self, x: Tensor, seed: int = 1, codec: Codec | None = None) -> Packed:
        """Encodes with a codec without memory of earlier tensors, or with ``codec``."""
        return (codec or self.fresh()).encode(x, seed=seed, where="check_codec")

    def decoded(self, x: Tensor, seed: int = 1) -> Tensor:
        """Encodes and decodes."""
        return self.encode(x, seed).decode()

    def expected(self, x: Tensor) -> Tensor:
        """Returns what ``x`` decodes to, but for rounding."""
        return x if self.decodes_to is None else self.decodes_to(x)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal", seed: int = 0) -> Tensor:
    """Returns values for a dtype: floats of the kind, or integers below 97 and bools at random."""
    x = normals(shape, seed)
    if dtype.is_floating_point:
        return VALUES[kind](x, dtype).to(dtype)
    if dtype == torch.bool:
        return x > 0
    return (x.abs() * 1e4).remainder(97).to(dtype)


def named(x: Tensor) -> str:
    """Returns dtype and shape, for messages."""
    return f"{dtype_name(x.dtype)} {list(x.shape)}"


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and bit pattern; all NaNs count as equal.

    >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    plain = [torch.where(x.isnan(), 0, x).reshape(-1).view(torch.uint8) for x in (first, second)]
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(*plain)


def same_payload(first: Packed, second: Packed) -> bool:
    """Whether two payloads hold the same bytes."""
    return len(first.tensors) == len(second.tensors) and all(
        map(same_bits, first.tensors, second.tensors))


def largest(x: Tensor) -> float:
    """Returns the largest magnitude; 0 of an empty tensor."""
    return float(x.double().abs().max()) if x.numel() else 0.0


def differing(got: Tensor, expected: Tensor) -> str:
    """Describes the first element that differs in bits."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return named(got)
    both = zip(got.reshape(-1), expected.reshape(-1))
    for i, (a, b) in enumerate(both):
        if not same_bits(a, b):
            return f"{a.item()!r} in place of {b.item()!r} at flat index {i}"
    return "the same"

