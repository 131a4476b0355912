"""What backward can compute from stored tensors, so that nothing of it has to be stored.

See NOTE [ Computed from what is stored already ] in :mod:`brevitas_bp.codec.computed`.
"""

import math
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brevitas_bp.backward.identity import Place, dense_layout
from brevitas_bp.backward.origins import leads_to
from brevitas_bp.backward.parameters import is_function_of_parameter
from brevitas_bp.backward.saved import Decision, SavedTensor, memory_key, tensors_in, without_class
from brevitas_bp.codec.base import Codec, Packed, is_plain
from brevitas_bp.codec.computed import ComputedCodec
from brevitas_bp.codec.given import DifferenceCodec
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import innermost_of
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.private import node_number


class Computed(NamedTuple):
    """A way to compute a tensor from stored tensors.

    Attributes:
        values: computes it.
        width: least bits of the codes of these tensors.
        name: says in reports from what it is computed.
    """

    values: Callable[[], Tensor]
    width: float
    name: str


#: Returns the way as long as the stored tensors live, else None. It must not keep them alive.
FindComputed = Callable[[], Computed | None]


class _Noted(NamedTuple):
    place: Place
    version: int | None
    node: int
    find: FindComputed


class Computable:
    """The outputs of one forward pass that backward can compute. Keeps no tensor alive."""

    def __init__(self) -> None:
        self._noted: dict[Hashable, _Noted] = {}
        # Number of the running product; position of each factor -> what autograd gets in its place.
        self._product: tuple[int, dict[int | None, Any]] | None = None

    def note(self, output: Any, find: FindComputed) -> None:
        """Notes that backward can compute the output of an operation."""
        if isinstance(output, Tensor) and output.grad_fn is not None and (
                is_plain(x := without_class(output))):
            place = Place.of(x)
            self._noted[place.key] = _Noted(
                place, version_of(x), node_number(output.grad_fn), find)

    def note_factor(
            self, saved: SavedTensor, stored: Any, endings: list[Callable[[Any], None]]) -> None:
        """Notes a stored factor of a running product, and the product if both factors are stored.

        Args:
            saved: the factor.
            stored: what autograd gets in its place.
            endings: called with the output of the product.
        """
        call = saved.call
        if self._product is None or self._product[0] != call.number:
            self._product = call.number, {}
            if sum(1 for _ in tensors_in(call.arguments)) == 2:
                endings.append(partial(self._note_product, self._product[1]))
        self._product[1][saved.position] = stored

    def _note_product(self, factors: dict[int | None, Any], output: Any) -> None:
        self._product = None
        if set(factors) == {0, 1}:
            self.note(output, partial(_of_factors, *(weakref.ref(f) for f in factors.values())))

    def codec_for(self, saved: SavedTensor, decision: Decision, codec: Codec) -> Codec | None:
        """Returns a codec that computes a layer's input; None if the input must be stored.

        Args:
            saved: the input.
            decision: how it is to be stored.
            codec: stores it otherwise.
        """
        x = saved.tensor
        if not decision.may_compute or decision.codec is None or decision.units is not None or (
                type(x) is not Tensor):
            return None
        noted = self._noted.get(memory_key(x))
        if noted is None or noted.version != version_of(x) or not _keeps_apart(saved, noted.node):
            return None
        computed, made, seen = noted.find(), noted.place.layout, dense_layout(x)
        asked = innermost_of(codec).bit_widths
        # Computed from tensors with fewer bits, it would have a larger error than is asked for.
        if computed is None or made is None or seen is None or not asked or (
                computed.width < max(asked)):
            return None
        return ComputedCodec(computed.name, partial(_seen_as, computed.values, made, seen))


def width_of(stored: Any) -> float:
    """Returns the bits of a stored tensor's codes, and one more if it is stored given a derivative."""
    if not isinstance(stored, Packed) or not stored.codec.lossy:
        return math.inf
    codec = stored.codec.postponed
    return min(innermost_of(codec).bit_widths, default=0) + isinstance(codec, DifferenceCodec)


def _keeps_apart(saved: SavedTensor, node: int) -> bool:
    """Whether a layer's input has its history, and the layer's weight is a parameter or function of one.

    Without its history, the input may outlive what it would be computed from. Another weight's gradient
    may meet the same rounding again.
    """
    own = saved.position
    if own is None or not any(leads_to(t, node) for t in tensors_in((saved.arguments[own],))):
        return False
    others = tensors_in(a for i, a in enumerate(saved.arguments) if i != own)
    return all(not t.requires_grad or is_function_of_parameter(t) for t in others)


def _of_factors(first: "weakref.ref[Any]", second: "weakref.ref[Any]") -> Computed | None:
    a, b = first(), second()
    return None if a is None or b is None else Computed(
        partial(_product, a, b), min(width_of(a), width_of(b)), "computed from its factors")


def _product(first: Any, second: Any) -> Tensor:
    """Returns the product of two stored factors."""
    a, b = first.decode(), second.decode()
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype) * b.to(dtype)


def _seen_as(values: Callable[[], Tensor], made: TensorLayout, seen: TensorLayout) -> Tensor:
    """Computes a tensor of one layout, and returns the same memory in another layout."""
    return seen.restore_flat(made.flatten(made.restore(values().to(made.dtype))))
