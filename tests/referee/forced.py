"""Encoding whatever could be encoded: the samples are tiny, and the break-even rule would keep them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from brevitas_bp import Codec, Packed, SavedTensor
from brevitas_bp.backward import hooks, rewrites
from brevitas_bp.backward.policy import ExplainedPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.signed import SignExact


@contextmanager
def encoding_forced() -> Iterator[None]:
    """Within the block, size is no reason to keep a tensor or not to rewrite an operation."""
    def encode(self: hooks.ForwardPass, saved: SavedTensor, codec: Codec) -> Packed:
        seed = self.next_seed() if codec.compresses else 0
        return codec.encode(saved.tensor, seed=seed, where=saved.op or "")

    with patch.object(hooks.ForwardPass, "_encode", encode), patch.object(
            rewrites, "_SMALLEST", 0):
        yield


@dataclass
class Recorder:
    """A policy that decides as another one, and notes what it said.

    Attributes:
        inner: decides.
        rounded: names of the operations whose saved tensor goes through a quantizer.
        reaches: what :attr:`Decision.reaches` said of those.
        replaced: whether an operation saved something that plain autograd does not.
    """

    inner: ExplainedPolicy
    rounded: list[str] = field(default_factory=list)
    reaches: set[str] = field(default_factory=set)
    replaced: bool = False

    def __call__(self, saved: SavedTensor) -> Codec | None:
        return self.decide(saved).codec

    def decide(self, saved: SavedTensor) -> Decision:
        decision = self.inner.decide(saved)
        self.replaced |= saved.role is not None
        if decision.codec is not None and not isinstance(decision.codec, _lossless_types()):
            self.rounded.append(saved.op or "custom function")
            self.reaches.add(decision.reaches)
        return decision

    def rewrite(self, function: Any) -> Rewrite | None:
        return self.inner.rewrite(function)


def _lossless_types() -> tuple[type[Codec], ...]:
    from brevitas_bp.codec import base, lossless, pooling, regions, shape_only

    return (
        base.Copy, lossless.BitMask, lossless.NarrowInt, pooling.WindowIndex, regions.Region,
        regions.Sign, regions.ScaledMask, shape_only.ShapeOnly)


class Nudge(Codec):
    """Keeps a copy, and moves one of the tensors that it is given.

    Args:
        which: number of the encoding that is moved; None moves none.
        step: how far, as a part of the tensor's largest value.
    """

    name = "nudge"

    def __init__(self, which: int | None = None, step: float = 0.0) -> None:
        self.which = which
        self.step = step
        self.encoded = 0

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        flat = layout.flatten(x.detach()).clone()
        if self.encoded == self.which:
            angle = torch.arange(flat.numel(), dtype=flat.dtype)
            # No constant: some backwards subtract the mean, which would hide it.
            flat += self.step * flat.abs().nan_to_num().max() * (1.7 * angle + 0.4).sin()
        self.encoded += 1
        return Packed(self, (flat,), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0])


def cuts_at_zero(codec: Codec | None) -> bool:
    """Whether a codec changes what the codec inside of it decodes."""
    return isinstance(codec, SignExact)
