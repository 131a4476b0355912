"""Codecs of probabilities and log-probabilities, in the units in which backward uses them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from brevitas_bp.activations import derivatives
from brevitas_bp.activations.arithmetic import exponential
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import WrappingCodec
from brevitas_bp.format.arithmetic import compute_dtype


@final
class SimplexCodec(WrappingCodec):
    """Stores probabilities, and decodes to numbers whose sum is one.

    Backward of softmax is ``p * (g - sum(g * p))``. A number that is added to all of ``g`` has no
    effect, because the sum of ``p`` is one. With another sum, it would multiply the rounding errors.

    Args:
        inner: stores the probabilities.
        dim: the dimension whose sum is one.
    """

    def __init__(self, inner: Codec, dim: int) -> None:
        super().__init__(inner)
        self.dim = dim

    def around(self, inner: Codec) -> Codec:
        return SimplexCodec(inner, self.dim)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores probabilities."""
        stored = self.inner.encode(x, seed=seed, where=where)
        return Packed(self, stored.tensors, stored.layout, stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns probabilities, divided by their sum."""
        with torch.no_grad():
            p = self.stored_in(packed).decode()
            total = p.sum(self.dim, keepdim=True, dtype=compute_dtype(p.dtype))
            total = torch.where(total == 0, 1, total)
            return p.div_(total) if self.inner.decodes_anew else (p / total).to(p.dtype)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        return packed.facts.codec.tensor_types(packed.facts)


class _LogProbabilities(WrappingCodec):
    """Stores numbers from which the probabilities ``exp(x)`` follow, and decodes to their logarithms.

    The gradient of ``log_softmax`` is linear in the probabilities, and torch computes them as ``exp`` of
    what this codec decodes. A probability that decodes to zero has the logarithm ``-inf``.

    Args:
        inner: must decode no negative number (:attr:`~brevitas_bp.codec.Codec.keeps_sign`).
    """

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores log-probabilities."""
        with torch.no_grad():
            stored = self._stored(x.detach(), seed, where)
        return Packed(self, (*stored.tensors, *self.others), TensorLayout.of(x), stored, where)

    def _stored(self, x: Tensor, seed: int, where: str) -> Packed:
        p = derivative_at(x, "exponential") if derivatives.supports(x) else (
            exponential(x.to(compute_dtype(x.dtype))))
        return self.inner.encode(self.from_probabilities(p), seed=seed, where=where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the logarithms of the stored probabilities."""
        layout = packed.layout
        with torch.no_grad():
            p = self.to_probabilities(self.stored_in(packed).decode())
            return layout.restore(p.log_().to(layout.dtype).expand(layout.base_shape))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        inner, others = packed.facts.codec.tensor_types(packed.facts), self.types_of_others()
        return None if inner is None or others is None else [*inner, *others]

    @property
    def others(self) -> tuple[Tensor, ...]:
        """What is kept beside the tensors of the inner codec."""
        return ()

    def types_of_others(self) -> Sequence[TensorType] | None:
        """Returns the types of :attr:`others`; None if they are not known."""
        return ()

    @abstractmethod
    def from_probabilities(self, p: Tensor) -> Tensor:
        """Returns the numbers to store; may overwrite ``p``."""

    @abstractmethod
    def to_probabilities(self, stored: Tensor) -> Tensor:
        """Inverts :meth:`from_probabilities`; may overwrite ``stored``."""


@final
class LogCodec(_LogProbabilities):
    """Stores log-probabilities as probabilities.

    >>> from brevitas_bp.codec import Copy
    >>> LogCodec(Copy()).encode(torch.tensor([0.5, 0.25]).log(), seed=0).decode().exp()
    tensor([0.5000, 0.2500])
    """

    def around(self, inner: Codec) -> Codec:
        return LogCodec(inner)

    def _stored(self, x: Tensor, seed: int, where: str) -> Packed:
        if derivatives.supports(x):
            # In one pass, without a tensor of probabilities.
            return self.inner.encode_derivative(x, "exponential", seed=seed, where=where)
        return super()._stored(x, seed, where)

    def from_probabilities(self, p: Tensor) -> Tensor:
        return p

    def to_probabilities(self, stored: Tensor) -> Tensor:
        return stored


@final
class ClassErrorCodec(_LogProbabilities):
    """Stores log-probabilities as ``|p - t|``, where ``t`` is 1 for the target class and 0 elsewhere.

    The gradient of a cross entropy is ``p - t``. So a rounding error is relative to the gradient of its
    row. It would not be with ``p`` itself, whose largest value hides how small ``1 - p`` is for a
    confident prediction.

    Args:
        inner: stores numbers in [0, 1]. It must not decode to more than the largest of them.
        targets: the classes, stored or kept, in the shape of ``x`` without ``dim``. A class outside of
            ``[0, C)`` counts as no class.
        dim: the dimension of the classes.
    """

    def __init__(self, inner: Codec, targets: Packed, dim: int) -> None:
        super().__init__(inner)
        self.targets = targets
        self.dim = dim
        self.name = f"{inner.name}, of the error"

    def around(self, inner: Codec) -> Codec:
        return ClassErrorCodec(inner, self.targets, self.dim)

    @property
    def others(self) -> tuple[Tensor, ...]:
        return self.targets.tensors if self.targets.codec.owns else ()

    def types_of_others(self) -> Sequence[TensorType] | None:
        return self.targets.codec.tensor_types(self.targets) if self.targets.codec.owns else ()

    def from_probabilities(self, p: Tensor) -> Tensor:
        return self._other_way_round(p)

    def to_probabilities(self, stored: Tensor) -> Tensor:
        return self._other_way_round(stored)

    def _other_way_round(self, p: Tensor) -> Tensor:
        """Replaces the target's ``p`` by ``1 - p``."""
        targets = self.targets.decode().to(torch.int64).unsqueeze(self.dim)
        known = (targets >= 0) & (targets < p.shape[self.dim])
        index = torch.where(known, targets, 0)
        at = p.gather(self.dim, index)
        # A stored 1 may decode to the next float.
        return p.scatter_(self.dim, index, torch.where(known, (1 - at).clamp_(min=0), at))
