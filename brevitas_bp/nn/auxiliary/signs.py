"""Signs of tensors: packed to 1 bit each, and added to the input of a layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from brevitas_bp.codec import graph_forms  # noqa: F401  (defines the packing)
from brevitas_bp.kernels import dispatch

_library = torch.library.Library("brevitas_bp", "FRAGMENT")
# An operator, as packing is: transforms of torch and compiled graphs cannot call kernels themselves.
_library.define("unpack_signs(Tensor packed, SymInt numel, int other, ScalarType dtype) -> Tensor")


def _unpack_signs(packed: Tensor, numel: int, other: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [numel] with 1 where the bit is set and ``other`` elsewhere."""
    return dispatch.unpack_select(packed, numel, other, 1, dtype)


_library.impl("unpack_signs", _unpack_signs, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::unpack_signs", lib=_library)
def _unpack_signs_fake(packed: Tensor, numel: int, other: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


@dataclass(frozen=True)
class Signs:
    """Signs ``s`` of an input: ``epsilon * s`` is added to it, and 1 bit of each is stored.

    Attributes:
        epsilon: size of what is added.
        lr_expansion: factor of the gradient of the weight, beside ``epsilon``.
        relu: whether ``s`` is 0 instead of -1 where the input is not positive.
    """

    epsilon: float
    lr_expansion: float
    relu: bool

    @property
    def factor(self) -> float:
        """Factor of the weight's gradient, which is computed with ``s`` itself: that is exact."""
        return self.epsilon * self.lr_expansion

    def packed(self, x: Tensor) -> tuple["PackedSigns", Tensor]:
        """Returns what unpacks the signs of ``x``, and their mask, uint8 [ceil(numel / 8)].

        Raises:
            TypeError: ``x`` is not a tensor of floats.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"brevitas_bp.nn: a layer with auxiliary signs takes tensors of floats, got {x.dtype}")
        last = x.dim() == 4 and not x.is_contiguous() and (
            x.is_contiguous(memory_format=torch.channels_last))
        made = PackedSigns(self.epsilon, self.lr_expansion, self.relu, x.shape, last)
        x = x.detach().resolve_neg()
        x = x.permute(0, 2, 3, 1) if last else x
        if is_compiling():
            # A wrapper reads the graph, and keeps the signs of a tensor that it sees compared with 0.
            return made, torch.ops.brevitas_bp.pack_bits(x > 0)
        return made, torch.ops.brevitas_bp.pack_positive(x)

    @torch.no_grad()
    def of(self, x: Tensor) -> Tensor:
        """Returns ``epsilon * s``."""
        made, mask = self.packed(x)
        return made.restored((mask,), x.dtype) * self.epsilon

    @torch.no_grad()
    def added_to(self, x: Tensor) -> Tensor:
        """Returns ``x + epsilon * s``, without a path for gradients."""
        made, mask = self.packed(x)
        return made.added(x, mask)


@dataclass(frozen=True)
class PackedSigns(Signs):
    """Signs as a mask of bits.

    Attributes:
        shape: shape of the input.
        channels_last: whether the bits follow the channels first, as the memory of the input does.
    """

    shape: torch.Size
    channels_last: bool

    def restored(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns ``s`` from its mask."""
        s: Tensor = torch.ops.brevitas_bp.unpack_signs(
            stored[0], self.shape.numel(), 0 if self.relu else -1, dtype)
        if not self.channels_last:
            return s.view(self.shape)
        n, c, h, w = self.shape
        return s.view(n, h, w, c).permute(0, 3, 1, 2)

    def added(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns ``x + epsilon * s``."""
        x = x.detach()
        if is_compiling():
            # A graph in which forward unpacks the signs would save them unpacked for backward.
            return torch.where(x > 0, x + self.epsilon, x if self.relu else x - self.epsilon)
        return torch.add(x, self.restored((mask,), x.dtype), alpha=self.epsilon)


def signs_of(
        layer: str, epsilon: float, lr_expansion: float, relu: bool) -> Signs:
    """Returns checked settings.

    Raises:
        ValueError: a number is not positive and finite.
        TypeError: ``relu`` is no bool.
    """
    for name, value in (("epsilon", epsilon), ("lr_expansion", lr_expansion)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(
                f"brevitas_bp.nn.{layer}: {name} must be a finite number > 0, got {value!r}; the "
                "defaults are epsilon=0.01 and lr_expansion=100, whose product multiplies the gradient "
                "of the weight")
    if not isinstance(relu, bool):
        raise TypeError(
            f"brevitas_bp.nn.{layer}: relu must be a bool, got {relu!r}; True behind a ReLU, whose "
            "output has no negative values")
    return Signs(float(epsilon), float(lr_expansion), relu)
