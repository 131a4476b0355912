"""One exact step of a network; afterwards any of its saved tensors can be rounded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.loss import checked_loss
from brevitas_bp.allocate.moments import real
from brevitas_bp.allocate.probe import Group, Probed, Probing, grouped
from brevitas_bp.allocate.unchanged import point, unchanged
from brevitas_bp.backward.seam import (
    listening,
    policy_of,
    storage_of,
    using_policy,
    wrappers_in,
)
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.codec.given import DifferenceCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.rows import in_rows
from brevitas_bp.codec.shard import is_dtensor
from brevitas_bp.format.random import derive
from brevitas_bp.memory import track_saved_memory

LossFn = Callable[[nn.Module, Any], Tensor]

_WHERE = "brevitas_bp.plan_bit_widths"


class Profile:
    """A forward pass whose backward may run repeatedly, each time with other tensors rounded.

    The forward pass runs once. So random numbers are drawn once, and every backward pass has the same
    dropout masks. Afterwards buffers, generators, ``.grad`` and the wrapper are as before. The wrapper's
    current plan is ignored.

    Args:
        model: the wrapped network, with the configuration to plan for.
        batch: passed to ``loss_fn``.
        loss_fn: ``(model, batch) -> scalar``; calls the model once or several times.
        seed: of all roundings.

    Raises:
        ValueError: the loss is no scalar that requires a gradient, no gradient reaches a parameter, a
            gradient is not finite, or no saved tensor is quantized.
        TypeError: the network cannot be planned for as it is; the message says what to do.
    """

    def __init__(
            self, model: QuantBackwardWrapper, batch: Any, loss_fn: LossFn, seed: int = 0) -> None:
        _check_model(model)
        self.seed = seed
        self.module = model.module
        self.rounded: Mapping[int, Candidate] = {}
        self.draw = 0
        self.parameters = [p for p in model.module.parameters() if p.requires_grad]
        with unchanged(model, [model], seed), torch.enable_grad():
            self.probing = Probing(
                policy_of(model, planned=False), self.decode, self.parameters)
            with (using_policy(model, self.probing), listening(model, self.probing.note),
                  track_saved_memory(model) as report):
                self.loss = checked_loss(f"{_WHERE}: loss_fn", loss_fn(model, batch))
            # Read the tensors only now: a tensor that the graph no longer holds needs no width.
            self.tensors = self.probing.tensors
        if not self.tensors:
            raise ValueError(
                f"{_WHERE}: the policy quantizes nothing that this network saves at a width that could "
                "be chosen; after a forward pass, print(model.explain()) says why")
        self.groups = grouped(self.tensors)
        self._group_of = {id(t): i for i, g in enumerate(self.groups) for t in g.tensors}
        self.exact_bytes = report.exact_bytes
        # Bytes saved besides the tensors whose width can be chosen.
        self.fixed_bytes = report.stored_bytes - sum(t.layout.nbytes for t in self.tensors)

    @cached_property
    def exact(self) -> list[Tensor | None]:
        """The exact gradients of the trained parameters."""
        gradients = self.gradients({})
        self.probing.observing = False
        _check_gradients(gradients)
        return gradients

    @property
    def energy(self) -> float:
        """``|g|^2`` of the exact gradient."""
        return sum(float(real(g).double().square().sum()) for g in self.exact if g is not None)

    def gradients(
            self, rounded: Mapping[int, Candidate], draw: int = 0) -> list[Tensor | None]:
        """Returns the parameters' gradients with groups rounded; None for parameters without a gradient.

        Args:
            rounded: index of a group -> how its tensors are stored.
            draw: number of the draw; each draws its own noise.
        """
        self.rounded, self.draw = rounded, draw
        try:
            # Checkpointed parts run again, so their norms would update their statistics again.
            with _back(self.module):
                return list(torch.autograd.grad(
                    self.loss, self.parameters, retain_graph=True, allow_unused=True))
        finally:
            self.rounded = {}

    def group_of(self, tensor: Probed) -> Group | None:
        """Returns the group of a tensor; None if the graph no longer holds the tensor."""
        index = self._group_of.get(id(tensor))
        return None if index is None else self.groups[index]

    def stored(self, tensor: Probed, candidate: Candidate, draw: int = 0) -> Packed | None:
        """Returns a tensor as a candidate stores it; None if the candidate keeps it exact."""
        codec = _codec_of(tensor, candidate)
        if codec is None:
            return None
        seed = derive(self.seed, self.tensors.index(tensor), draw)
        packed = codec.encode(tensor.exact, seed=seed)
        return packed if packed.is_smaller else None

    def stored_bytes(self, group: Group, candidate: Candidate) -> int:
        """Returns the bytes of a group as a candidate stores it."""
        packed = [(t, self.stored(t, candidate)) for t in group.tensors]
        return sum(t.layout.nbytes + t.spared if p is None else p.nbytes for t, p in packed)

    def distance(self, tensor: Probed, candidate: Candidate, draw: int = 0) -> float:
        """Returns the sum of squared differences between a tensor and its decoded values."""
        if candidate.bits is None:
            return 0.0
        decoded = self._decoded(tensor, candidate, draw)
        error = tensor.layout.flatten(decoded).double() - tensor.flat.double()
        if tensor.counted is not None:
            error = error[tensor.counted]
        return float(error.square().sum())

    def distance_given(
            self, tensor: Probed, own: Candidate, derivative: Candidate | None) -> float:
        """Returns the squared distance by which rounding moves a tensor that is stored given another.

        Args:
            tensor: the tensor. If it is no :class:`~brevitas_bp.allocate.probe.Difference`, the
                derivative does not matter.
            own: how the tensor is stored.
            derivative: how its derivative is stored; None: as the policy stores it.
        """
        given = tensor.difference
        packed = None if given is None else given.packed()
        if given is None or packed is None:
            return self.distance(tensor, own)
        x, inner = packed.decode(), _codec_of(tensor, own)
        assert inner is not None
        codec = given.codec.around_innermost(inner)
        assert isinstance(codec, DifferenceCodec)
        if derivative is not None:
            stored = self.stored(given.derivative, derivative)
            # An exact derivative tells nothing, because no codes are stored.
            codec = codec.inner if stored is None else codec.beside(stored)
        decoded, layout = codec.encode(x, seed=self.seed).decode(), TensorLayout.of(x)
        error, row = layout.flatten(decoded).double() - layout.flatten(x).double(), given.codec.row
        # Backward multiplies what is stored in the units of the codec.
        factors = given.codec.inner.factors(row)
        return float((error.view(-1, row) * (1.0 if factors is None else factors)).square().sum())

    def decode(self, tensor: Probed) -> Tensor:
        """Returns the tensor that backward gets."""
        candidate = self.rounded.get(self._group_of.get(id(tensor), -1))
        return tensor.exact if candidate is None else self._decoded(tensor, candidate, self.draw)

    def _decoded(self, tensor: Probed, candidate: Candidate, draw: int) -> Tensor:
        packed = self.stored(tensor, candidate, draw)
        return tensor.exact if packed is None else packed.decode()


def _codec_of(tensor: Probed, candidate: Candidate) -> Codec | None:
    """Returns the codec of a candidate, with the rows of a tensor; None: exact."""
    codec = candidate.codec(tensor.configured)
    if codec is not None and tensor.difference is not None and "all" in tensor.reach:
        codec = codec.for_rest(tensor.difference.codec.prediction.spared)
    return codec if codec is None or tensor.rows is None else in_rows(codec, tensor.rows)


@contextmanager
def _back(module: nn.Module) -> Iterator[None]:
    """Restores generators, modes and buffers when the block ends."""
    restore = point(module)
    try:
        yield
    finally:
        restore()


def _check_model(model: QuantBackwardWrapper) -> None:
    if any(wrapper is not model for _, wrapper in wrappers_in(model)):
        raise TypeError(
            f"{_WHERE}: the model contains further wrappers, which round by themselves; plan for "
            "each of them, or wrap the whole once")
    if storage_of(model) != "save_quantized":
        raise TypeError(
            f"{_WHERE}: storage={storage_of(model)!r} saves nothing, so there are no bytes to plan; "
            "plan with 'save_quantized'")
    if any(is_dtensor(p) for p in model.module.parameters()):
        raise TypeError(
            f"{_WHERE}: parameters are DTensors, so this process has only a part of their gradients; "
            "plan in one process before the network is parallelized; the names of tensors stay the same")
    if not any(p.requires_grad for p in model.module.parameters()):
        raise ValueError(
            f"{_WHERE}: no parameter requires a gradient, so there is no gradient to preserve")


def _check_gradients(gradients: list[Tensor | None]) -> None:
    found = [real(g) for g in gradients if g is not None]
    if not all(bool(g.isfinite().all()) for g in found):
        raise ValueError(
            f"{_WHERE}: the exact gradient must be finite to compare with, got NaN or Inf; plan with "
            "another batch, or scale the loss")
    if not any(bool(g.any()) for g in found):
        raise ValueError(
            f"{_WHERE}: the gradients of all parameters are zero or missing, so nothing tells which "
            "tensors matter; let the loss depend on the parameters (sharded ones, as of FSDP, "
            "are not seen: plan in one process before)")
