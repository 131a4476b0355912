"""One exact step of a network, of which any saved tensor can be rounded afterwards."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.unchanged import point
from brevitas_bp.backward.parameters import shown_leaf
from brevitas_bp.backward.planned import Candidate, is_quantized, site_of
from brevitas_bp.backward.policy import ExplainedPolicy, explained
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Call, Decision, SavedTensor, storage_id, tensors_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.kernels.random import derive
from brevitas_bp.memory import track_saved_memory

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(eq=False)
class Probed:
    """A tensor that the policy quantizes, kept exact, and what saved it.

    Attributes:
        packed: the exact copy.
        configured: the module's own codec, of which candidates are variants.
        sites: names of what saves it.
        calls: numbers of the calls that save it.
        reaches: as the policy says; see :class:`~brevitas_bp.backward.saved.Decision`.
        parameters: indices of the parameters whose gradients its rounding is in, and in no others; None
            where it goes further or that is not known.
    """

    packed: Packed
    configured: Codec
    sites: set[str] = field(default_factory=set)
    calls: set[int] = field(default_factory=set)
    reaches: set[str] = field(default_factory=set)
    parameters: set[int] | None = field(default_factory=set)

    @property
    def numel(self) -> int:
        """Elements that are stored."""
        return self.packed.layout.numel

    @property
    def exact(self) -> Tensor:
        """The tensor."""
        return self.packed.layout.restore_flat(self.packed.tensors[0])


@dataclass(eq=False)
class Group:
    """Tensors that get one width: of one name, or one tensor under several names."""

    tensors: list[Probed]

    @property
    def sites(self) -> list[str]:
        """Names of all that saves them."""
        return sorted(set().union(*(t.sites for t in self.tensors)))

    @property
    def numel(self) -> int:
        """Elements that are stored."""
        return sum(t.numel for t in self.tensors)

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tensors as they are."""
        return sum(t.packed.layout.nbytes for t in self.tensors)

    @property
    def reaches(self) -> str:
        """The farthest that any of them reaches."""
        far = set().union(*(t.reaches for t in self.tensors))
        return next(reach for reach in ("all", "sum", "norm", "weight") if reach in far)

    @property
    def parameters(self) -> set[int] | None:
        """Parameters whose gradients alone the rounding is in; None where it goes further."""
        found: set[int] = set()
        for tensor in self.tensors:
            if tensor.parameters is None or "weight" not in tensor.reaches or len(tensor.reaches) > 1:
                return None
            found |= tensor.parameters
        return found or None


class Profile:
    """A forward pass whose backward may run again and again, each time with other tensors rounded.

    Forward runs once: so random numbers are drawn once, and dropout masks are the same in every
    backward. Buffers, generators and ``.grad`` are afterwards as they were before.

    Args:
        model: the wrapped network, with the configuration to plan for.
        batch: handed to ``loss_fn``.
        loss_fn: ``(model, batch) -> scalar``; calls the model once or several times.
        seed: of all roundings.

    Raises:
        ValueError: the loss is no scalar that requires a gradient, or nothing that is saved is
            quantized.
    """

    def __init__(
            self, model: QuantBackwardWrapper, batch: Any, loss_fn: LossFn, seed: int = 0) -> None:
        self.seed = seed
        self.module = model.module
        self.rounded: Mapping[int, Candidate] = {}
        self.draw = 0
        self.named_parameters = [
            (name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        self.output_energy: defaultdict[int, float] = defaultdict(float)
        self.outputs: dict[int, tuple[int, ...]] = {}
        self._observing = True
        probing = _Probing(explained(model._policy), self)
        with _back(model.module), _policy(model, probing), torch.enable_grad():
            with track_saved_memory(model) as report:
                self.loss = loss_fn(model, batch)
            _check_loss(self.loss)
        self.tensors = probing.tensors
        if not self.tensors:
            raise ValueError(
                "brevitas_bp.plan_bit_widths: the policy quantizes nothing that this network saves, so "
                "there is no width to choose; print(model.explain()) says why")
        self.groups = _grouped(self.tensors)
        self._group_of = {id(t): i for i, g in enumerate(self.groups) for t in g.tensors}
        self.exact_bytes = report.exact_bytes
        # What is saved beside the tensors whose width can be chosen.
        self.fixed_bytes = report.stored_bytes - sum(t.packed.nbytes for t in self.tensors)
        self.report = report

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters."""
        return [p for _, p in self.named_parameters]

    @cached_property
    def exact(self) -> list[Tensor | None]:
        """The exact gradients."""
        gradients = self.gradients({})
        self._observing = False
        return gradients

    def gradients(
            self, rounded: Mapping[int, Candidate], draw: int = 0) -> list[Tensor | None]:
        """Gradients of the parameters with groups rounded; None for parameters without any.

        Args:
            rounded: index of a group -> how its tensors are stored.
            draw: another one draws other noise.
        """
        self.rounded, self.draw = rounded, draw
        try:
            # Checkpointed parts run again, and their norms would count the batch again.
            with _back(self.module):
                return list(torch.autograd.grad(
                    self.loss, self.parameters, retain_graph=True, allow_unused=True))
        finally:
            self.rounded = {}

    def release(self) -> None:
        """Frees the graph: it and the profile hold each other."""
        self.loss = torch.zeros(())
        self.tensors.clear()
        self.groups.clear()

    def stored(self, tensor: Probed, candidate: Candidate, draw: int = 0) -> Packed:
        """A tensor as a candidate stores it."""
        codec = candidate.codec(tensor.configured)
        if codec is None:
            return tensor.packed
        seed = derive(self.seed, self.tensors.index(tensor), draw)
        packed = codec.encode(tensor.exact, seed=seed)
        # The break-even rule of the hooks.
        return packed if packed.nbytes < packed.layout.nbytes else tensor.packed

    def stored_bytes(self, group: Group, candidate: Candidate) -> int:
        """Bytes of a group as a candidate stores it."""
        return sum(self.stored(t, candidate).nbytes for t in group.tensors)

    def distortion(self, group: Group, candidate: Candidate, draw: int = 0) -> float:
        """Sum of squared differences between a group and what is decoded."""
        return sum(
            float((self.stored(t, candidate, draw).decode() - t.exact).double().square().sum())
            for t in group.tensors)

    def decode(self, tensor: Probed) -> Tensor:
        """What backward gets to see."""
        candidate = self.rounded.get(self._group_of[id(tensor)])
        return tensor.exact if candidate is None else (
            self.stored(tensor, candidate, self.draw).decode())

    def observe(self, call: Call, output: Any) -> None:
        """Notes the energy of the gradient of what an operation returned."""
        for tensor in tensors_in((output,)):
            if tensor.requires_grad:
                self.outputs[call.number] = tuple(tensor.shape)
                tensor.register_hook(partial(self._note_energy, call.number))

    def _note_energy(self, call: int, gradient: Tensor) -> None:
        if self._observing:
            self.output_energy[call] += float(gradient.double().square().sum())


class _ProbeCodec(Codec):
    """Keeps an exact copy, and lets the profile say what is decoded."""

    name = "probe"
    compresses = False

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.made: list[Packed] = []

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        return Packed(self, (layout.flatten(x.detach()).clone(),), layout, [], where)

    def decode(self, packed: Packed) -> Tensor:
        return self.profile.decode(packed.facts[0])


class _Probing:
    """Stores what a policy quantizes exactly, and notes what saves it."""

    def __init__(self, policy: ExplainedPolicy, profile: Profile) -> None:
        self.policy = policy
        self.profile = profile
        self.tensors: list[Probed] = []
        # Tensors share an encoding by the identity of its codec: so do their probes.
        self._probes: dict[int, _ProbeCodec] = {}
        self._parameters = {
            storage_id(p): i for i, (_, p) in enumerate(profile.named_parameters)}
        self._codecs: list[Codec] = []
        self._saving: set[int] = set()

    def decide(self, saved: SavedTensor) -> Decision:
        decision = self.policy.decide(saved)
        if not is_quantized(saved, decision):
            return decision
        codec = decision.codec
        assert codec is not None
        if id(codec) not in self._probes:
            self._codecs.append(codec)
            self._probes[id(codec)] = _ProbeCodec(self.profile)
        self._saving.add(saved.call.number)
        return decision._replace(codec=self._probes[id(codec)])

    def rewrite(self, function: Any) -> Rewrite | None:
        return self.policy.rewrite(function)

    def observe(self, call: Call, output: Any) -> None:
        if call.number in self._saving:
            self.profile.observe(call, output)

    def note(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Listener: one more name for a tensor."""
        if not isinstance(packed.codec, _ProbeCodec):
            return
        if not packed.facts:
            assert saved.codec is not None
            packed.facts.append(Probed(packed, saved.codec))
            self.tensors.append(packed.facts[0])
        tensor = packed.facts[0]
        tensor.sites.add(site_of(saved))
        tensor.calls.add(saved.call.number)
        tensor.reaches.add(decision.reaches)
        own = self._own_parameters(saved)
        tensor.parameters = (
            None if own is None or tensor.parameters is None else tensor.parameters | own)

    def _own_parameters(self, saved: SavedTensor) -> set[int] | None:
        """The parameters beside the tensor in the call; None if there is another trained tensor."""
        found = set()
        for other in tensors_in(saved.arguments):
            if saved.shows(other) or not other.requires_grad:
                continue
            leaf = shown_leaf(other)
            index = None if leaf is None else self._parameters.get(storage_id(leaf))
            if index is None:
                return None
            found.add(index)
        return found


def _grouped(tensors: list[Probed]) -> list[Group]:
    """Tensors that have a name in common, directly or through others."""
    groups: list[Group] = []
    for tensor in tensors:
        joined = [g for g in groups if any(t.sites & tensor.sites for t in g.tensors)]
        merged = Group([*itertools.chain.from_iterable(g.tensors for g in joined), tensor])
        position = groups.index(joined[0]) if joined else len(groups)
        groups = [g for g in groups if g not in joined]
        groups.insert(position, merged)
    return groups


@contextmanager
def _policy(model: QuantBackwardWrapper, probing: _Probing) -> Iterator[None]:
    """Within the block the wrapper probes."""
    before = model._policy
    model._policy = probing
    model._listeners.append(probing.note)
    try:
        yield
    finally:
        model._policy = before
        model._listeners.remove(probing.note)


def _check_loss(loss: Any) -> None:
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        got = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "brevitas_bp.plan_bit_widths: loss_fn(model, batch) must return a scalar tensor that "
            f"requires a gradient, got {got}; return for instance cross_entropy(model(batch[0]), "
            "batch[1])")


@contextmanager
def _back(module: nn.Module) -> Iterator[None]:
    """Generators, modes and buffers are afterwards as before."""
    restore = point(module)
    try:
        yield
    finally:
        restore()
