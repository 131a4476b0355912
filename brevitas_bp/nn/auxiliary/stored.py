"""The ways to store the auxiliary tensor of a run: as it is, or by a codec.

A codec returns a ``Packed``. Its tensors are saved through autograd, and the rest of it is kept beside
them, see NOTE [ What an auxiliary layer saves ].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec import Codec
from brevitas_bp.codec.base import Packed


class Itself:
    """The auxiliary tensor is stored as it is."""

    factor = 1.0

    def restored(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return stored[0]


@dataclass(frozen=True)
class Encoded:
    """The auxiliary tensor is stored by a codec.

    Attributes:
        blank: the ``Packed`` without its tensors.
    """

    blank: Packed
    factor: float = 1.0

    def restored(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        own = [
            t if t.dtype is blank.dtype else t.view(blank.dtype).view(blank.shape)
            for t, blank in zip(stored, self.blank.tensors)]
        return self.blank.with_tensors(tuple(own)).decode()


#: How the auxiliary tensor of a run is stored, and the tensors that store it.
Stored = tuple[Itself | Encoded, tuple[Tensor, ...]]
#: The auxiliary tensor is stored as it is.
ITSELF = Itself()


def encoded(codec: Codec, a: Tensor, seed: int, where: str) -> Stored:
    """Encodes ``a``; if the result would not be smaller, it is stored as it is.

    Floats of the codec (scales) are handed out as bytes, in the same memory. Saved-tensor hooks may
    round floats that they do not know (``policy="all"`` does), but not bytes.
    """
    packed = codec.encode(a, seed=seed, where=where)
    if not packed.is_smaller:
        return ITSELF, (a,)
    tensors = [t.reshape(-1).view(torch.uint8) if t.is_floating_point() else t for t in packed.tensors]
    return Encoded(_without_tensors(packed)), tuple(tensors)


def _without_tensors(packed: Packed) -> Packed:
    """Returns a ``Packed`` that knows all about its tensors, but holds none."""
    blanks = tuple(torch.empty_like(t, device="meta") for t in packed.tensors)
    return replace(packed, tensors=blanks, facts=_stripped(packed.facts))


def _stripped(facts: Any) -> Any:
    """Returns facts of a codec, in which payloads of inner codecs hold no tensors either."""
    if isinstance(facts, Packed):
        return _without_tensors(facts)
    if isinstance(facts, tuple):
        parts = [_stripped(part) for part in facts]
        return type(facts)(*parts) if hasattr(facts, "_fields") else tuple(parts)
    return facts
