"""Forces every possible encoding: the break-even rule would keep the tiny samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from brevitas_bp import Codec, Packed, SavedTensor
from brevitas_bp.backward import rewrites
from brevitas_bp.backward.encoding import Encodings
from brevitas_bp.backward.policy import ExplainedPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec import Copy
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.lossless import BitMask, NarrowInt
from brevitas_bp.codec.pooling import WindowIndex
from brevitas_bp.codec.regions import Region, ScaledMask, Sign
from brevitas_bp.codec.shape_only import ShapeOnly
from brevitas_bp.codec.signed import SignExact
from brevitas_bp.codec.two_valued import TwoValuedCodec


@contextmanager
def encoding_forced() -> Iterator[None]:
    """Within the block, small tensors are encoded too, and operations on them rewritten."""
    def encode(
            self: Encodings, saved: SavedTensor, codec: Codec,
            in_units: Callable[[Codec], Codec] | None) -> Packed:
        codec = codec if in_units is None else in_units(codec)
        seed, where = self._next_seed() if codec.compresses else 0, saved.op or ""
        if saved.derivative is not None:
            return codec.encode_derivative(saved.tensor, saved.derivative, seed=seed, where=where)
        return codec.encode(saved.tensor, seed=seed, where=where)

    with patch.object(Encodings, "_encode", encode), patch.object(
            rewrites, "SMALLEST", 0):
        yield


@dataclass
class Recorder:
    """A policy that decides as another policy, and records the decisions.

    Attributes:
        inner: the policy that decides.
        unbiased_only: whether to keep tensors whose rounding has a documented bias: inputs of norms (the
            normalized input enters a gradient twice) and of prelu (cut at 0 when it is decoded).
        all_shared: whether operations share their roundings, whatever the policy says.
        rounded: names of the operations whose saved tensor goes through a quantizer.
        left_out: tensors kept because of ``unbiased_only``.
        replaced: whether an operation saved something that plain autograd does not save.
    """

    inner: ExplainedPolicy
    unbiased_only: bool = False
    all_shared: bool = False
    rounded: list[str] = field(default_factory=list)
    left_out: int = 0
    replaced: bool = False

    def __call__(self, saved: SavedTensor) -> Codec | None:
        return self.decide(saved).codec

    def decide(self, saved: SavedTensor) -> Decision:
        decision = self.inner.decide(saved)
        self.replaced |= saved.role is not None
        if decision.codec is None or isinstance(decision.codec, _LOSSLESS):
            return decision
        if self.unbiased_only and (
                "bias of order" in decision.reason or isinstance(decision.codec, SignExact)):
            self.left_out += 1
            return decision._replace(codec=None)
        self.rounded.append(saved.op or "custom function")
        # Only tensors in the same units can share a rounding.
        units = None if decision.units == "quotient" else decision.units
        return decision._replace(shared=True, units=units) if self.all_shared else decision

    def rewrite(self, function: Any) -> Rewrite | None:
        return self.inner.rewrite(function)


_LOSSLESS = (BitMask, Copy, NarrowInt, Region, ScaledMask, ShapeOnly, Sign, TwoValuedCodec, WindowIndex)


class Nudge(Codec):
    """Keeps copies, and moves one of the tensors that it encodes.

    Args:
        which: number of the encoding to move; None moves none.
        step: size of the move, as a fraction of the tensor's largest value.
    """

    name = "nudge"

    def __init__(self, which: int | None = None, step: float = 0.0) -> None:
        self.which = which
        self.step = step
        self.encoded = 0

    @property
    def for_magnitudes(self) -> Codec:
        return _NudgeMagnitudes(self)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        flat = layout.flatten(x.detach()).clone()
        move = self.next_move(flat)
        if move is not None:
            flat += move * flat.abs().nan_to_num().max()
        return Packed(self, (flat,), layout, None, where)

    def next_move(self, flat: Tensor) -> Tensor | None:
        """Returns the move of the next encoding, in units of its values; None: it is not moved."""
        self.encoded += 1
        if self.encoded - 1 != self.which:
            return None
        # Do not add a constant: some backwards subtract the mean, which would hide it.
        return self.step * (1.7 * torch.arange(flat.numel(), dtype=flat.dtype) + 0.4).sin()

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0])


class _NudgeMagnitudes(Codec):
    """Moves each element by a part of itself, so that no sign changes."""

    name = "nudge of magnitudes"
    keeps_sign = True

    def __init__(self, nudge: Nudge) -> None:
        self.nudge = nudge

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        flat = layout.flatten(x.detach()).clone()
        move = self.nudge.next_move(flat)
        return Packed(self, (flat if move is None else flat * (1 + move),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0])
