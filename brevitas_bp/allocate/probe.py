"""Records every tensor that a policy quantizes, and the operations that save it."""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from brevitas_bp.backward.parameters import leaf_behind
from brevitas_bp.backward.planned import base_of, is_quantized, site_of
from brevitas_bp.backward.policy import ExplainedPolicy, ObservingPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import NO_CALL, Call, Decision, SavedTensor, tensors_in
from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.given import DifferenceCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.normalized import spared_nbytes
from brevitas_bp.codec.rows import Rows, in_rows


@dataclass(eq=False)
class Probed:
    """A tensor that the policy quantizes, kept exact, and the operations that save it.

    Attributes:
        flat: an exact copy, in memory order.
        layout: of the tensor.
        configured: the module's own codec, or its kind for factors; candidates are variants of it.
        sites: names of the sites that save the tensor.
        calls: number of each call that saves the tensor -> indices of the other parameters in the call.
            None if the call has another trained tensor, or if no call is visible.
        reach: as the policy reports it; see :class:`~brevitas_bp.backward.saved.Decision`.
        rows: elements of a row and of the last dimension, if buckets are to end with rows.
        counted: which elements of ``flat`` get the rounding error; None: all.
        difference: ``flat`` is the difference from what this derivative predicts; None: no difference.
        spared: further bytes that are kept if the tensor is exact: the mean of a norm.
    """

    flat: Tensor
    layout: TensorLayout
    configured: Codec
    rows: Rows | None = None
    counted: Tensor | None = None
    difference: "Difference | None" = None
    spared: int = 0
    sites: set[str] = field(default_factory=set)
    calls: dict[int, set[int] | None] = field(default_factory=dict)
    reach: set[str] = field(default_factory=set)

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        return self.layout.numel

    @property
    def exact(self) -> Tensor:
        """The exact tensor."""
        return self.layout.restore_flat(self.flat)


@dataclass(eq=False)
class Difference:
    """What a tensor is stored given.

    Attributes:
        codec: the codec that subtracts the prediction, and holds the derivative that the policy stores.
        packed: the stored difference, as long as the graph holds it.
        derivative: the exact derivative.
    """

    codec: DifferenceCodec
    packed: "weakref.ref[Packed]"
    derivative: Probed


@dataclass(eq=False)
class Group:
    """Tensors that get one width: tensors with one name, or one tensor with several names."""

    tensors: list[Probed]

    @property
    def sites(self) -> list[str]:
        """Names of all sites that save the tensors."""
        return sorted(set().union(*(t.sites for t in self.tensors)))

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        return sum(t.numel for t in self.tensors)

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tensors uncompressed."""
        return sum(t.layout.nbytes for t in self.tensors)

    @property
    def reach(self) -> str:
        """The farthest reach of any of the tensors."""
        far = set().union(*(t.reach for t in self.tensors))
        return next(reach for reach in ("all", "sum", "norm", "weight") if reach in far)

    @property
    def parameters(self) -> set[int] | None:
        """Parameters whose gradients alone have the error; None if the error travels further."""
        found: set[int] = set()
        for tensor in self.tensors:
            for own in tensor.calls.values():
                if not own or tensor.reach != {"weight"}:
                    return None
                found |= own
        return found


def grouped(tensors: list[Probed]) -> list[Group]:
    """Groups tensors that share a name, directly or through others, in the order of the forward."""
    groups: list[Group] = []
    for tensor in tensors:
        joined = [g for g in groups if any(t.sites & tensor.sites for t in g.tensors)]
        merged = Group([*itertools.chain.from_iterable(g.tensors for g in joined), tensor])
        position = groups.index(joined[0]) if joined else len(groups)
        groups = [g for g in groups if g not in joined]
        groups.insert(position, merged)
    return groups


Decode = Callable[[Probed], Tensor]


@dataclass(eq=False)
class _Place:
    """The facts of a probe's payload.

    Attributes:
        codec: the codec that the probe replaces.
        rows: of the tensor.
        probed: the tensor, once the operation that saves it is known.
        told: the tensor as the policy would store it, which other tensors are stored given.
    """

    codec: Codec
    rows: Rows | None
    probed: Probed | None = None
    told: Packed | None = None


class ProbeCodec(Codec):
    """Keeps an exact copy, and lets ``decode`` choose the decoded values.

    Args:
        decode: returns the decoded tensor. Held weakly, because the graph holds this codec.
        probed: the codec that this codec replaces.
        rows: of the tensors.
    """

    name = "probe"
    compresses = False

    def __init__(
            self, decode: "weakref.WeakMethod[Decode]", probed: Codec,
            rows: Rows | None = None) -> None:
        self._decode = decode
        self.probed = probed
        self.rows = rows
        self.stores_differences = probed.stores_differences
        self.bucket_elements = self._in_its_rows.bucket_elements

    @property
    def _in_its_rows(self) -> Codec:
        """The codec that this codec replaces, with the rows of the tensors."""
        return self.probed if self.rows is None else in_rows(self.probed, self.rows)

    def as_given(self, packed: Packed) -> Packed:
        """Returns the tensor as the policy would store it, because no plan is known yet."""
        place: _Place = packed.facts
        place.told = self._in_its_rows.encode(
            packed.layout.restore_flat(packed.tensors[0]), seed=0, where=packed.where)
        return place.told

    def in_rows(self, length: int, last: int) -> Codec:
        return ProbeCodec(self._decode, self.probed, Rows(length, last))

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        place = _Place(self.probed, self.rows)
        return Packed(self, (layout.flatten(x.detach()).clone(),), layout, place, where)

    def decode(self, packed: Packed) -> Tensor:
        decode = self._decode()
        return packed.layout.restore_flat(packed.tensors[0]) if decode is None else (
            decode(packed.facts.probed))


class Probing:
    """A policy that stores exactly the tensors that another policy quantizes, and notes their sites.

    Args:
        policy: the other policy.
        decode: returns the tensor that backward gets.
        parameters: the trained parameters.
    """

    def __init__(
            self, policy: ExplainedPolicy, decode: Decode, parameters: Sequence[Tensor]) -> None:
        self.policy = policy
        #: Number of a call -> squared norm of the gradient of the call's output.
        self.energy: defaultdict[int, float] = defaultdict(float)
        self.observing = True
        # Held weakly: the graph holds the pass, and the pass holds this object.
        self._decode = weakref.WeakMethod(decode)
        # Tensors share an encoding if they have the same codec object, so they share a probe too. A
        # probe holds its codec, so that no other codec gets its address.
        self._probes: dict[int, ProbeCodec] = {}
        self._parameters = {id(p): i for i, p in enumerate(parameters)}
        self._saving: set[int] = set()
        self._packed: list[weakref.ref[Packed]] = []

    @property
    def tensors(self) -> list[Probed]:
        """The probed tensors that the graph still holds."""
        return [packed.facts.probed for ref in self._packed if (packed := ref()) is not None]

    def decide(self, saved: SavedTensor) -> Decision:
        """Returns the other policy's decision, with a probe for its codec."""
        decision = self.policy.decide(saved)
        codec = decision.codec
        if codec is None or not is_quantized(saved, decision):
            return decision
        if id(codec) not in self._probes:
            self._probes[id(codec)] = ProbeCodec(self._decode, codec)
        self._saving.add(saved.call.number)
        # A product gets a width, although it could be computed from its factors.
        return decision._replace(codec=self._probes[id(codec)], may_compute=False)

    def rewrite(self, function: Any) -> Rewrite | None:
        """Returns the other policy's rewrite."""
        return self.policy.rewrite(function)

    def observe(self, call: Call, output: Any) -> None:
        """Records the gradient of the output of an operation that saved something."""
        if isinstance(self.policy, ObservingPolicy):
            self.policy.observe(call, output)
        if call.number in self._saving:
            for tensor in tensors_in((output,)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(_note_energy, weakref.ref(self), call.number))

    def note(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Adds a site to a tensor. Registered as a listener."""
        # The innermost payload has the order and the units in which the tensor is stored.
        outer, packed = packed, packed.innermost
        place = packed.facts
        if not isinstance(place, _Place):
            return
        if place.probed is None:
            place.probed = Probed(
                packed.tensors[0], packed.layout,
                base_of(saved, decision._replace(codec=place.codec)), place.rows,
                outer.codec.counted(outer), self._difference_of(outer), spared_nbytes(outer))
            self._packed.append(weakref.ref(packed))
        tensor = place.probed
        tensor.sites.add(site_of(saved))
        tensor.calls[saved.call.number] = self._own_parameters(saved)
        tensor.reach.add(decision.reach)

    def _difference_of(self, packed: Packed) -> Difference | None:
        """Returns what a tensor is stored given, if it is stored given a probed derivative."""
        codec = packed.codec
        if not isinstance(codec, DifferenceCodec):
            return None
        found = (p.facts.probed for ref in self._packed
                 if (p := ref()) is not None and p.facts.told is codec.derivative)
        derivative = next(found, None)
        return None if derivative is None else Difference(codec, weakref.ref(packed), derivative)

    def _own_parameters(self, saved: SavedTensor) -> set[int] | None:
        """Returns the other parameters in the call; None if the call has another trained tensor."""
        if saved.call is NO_CALL:
            return None
        found, position = set(), saved.made_of
        for i, argument in enumerate(saved.arguments):
            for other in tensors_in((argument,)):
                if i == position or saved.aliases(other) or not other.requires_grad:
                    continue
                leaf = leaf_behind(other)
                if leaf is None or id(leaf) not in self._parameters:
                    return None
                found.add(self._parameters[id(leaf)])
        return found


def _note_energy(probing: "weakref.ref[Probing]", call: int, gradient: Tensor) -> None:
    noted = probing()
    if noted is not None and noted.observing:
        noted.energy[call] += float(gradient.double().square().sum())
