"""Takes the tensors out of a ``Packed``, so that autograd can save them, and puts them back."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec.base import Packed


def tensors_of(packed: Packed) -> tuple[Tensor, ...]:
    """Returns the stored tensors as bytes, in the same memory.

    Saved-tensor hooks may round floats that they do not know (``policy="all"`` does), but not bytes.
    """
    return tuple(
        t.reshape(-1).view(torch.uint8) if t.is_floating_point() else t for t in packed.tensors)


def without_tensors(packed: Packed) -> Packed:
    """Returns a ``Packed`` that knows all about its tensors, but holds none."""
    blank: Any = replace(packed, tensors=_blanks(packed.tensors), facts=_stripped(packed.facts))
    return blank


def restored(blank: Packed, tensors: tuple[Tensor, ...]) -> Packed:
    """Returns the ``Packed`` that :func:`without_tensors` was made of, with its tensors.

    Args:
        blank: the ``Packed`` without tensors.
        tensors: those of :func:`tensors_of`, or copies of them.
    """
    own = [
        t if t.dtype is b.dtype else t.view(b.dtype).view(b.shape)
        for t, b in zip(tensors, blank.tensors)]
    return blank.with_tensors(tuple(own))


def _blanks(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, device="meta") for t in tensors)


def _stripped(facts: Any) -> Any:
    """Returns facts of a codec, in which payloads of inner codecs hold no tensors either."""
    if isinstance(facts, Packed):
        return without_tensors(facts)
    if isinstance(facts, tuple):
        parts = [_stripped(part) for part in facts]
        return type(facts)(*parts) if hasattr(facts, "_fields") else tuple(parts)
    return facts
