"""What rounds in a model: saved tensors and gradients, all together or one place at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from brevitas_bp.backward.policy import ExplainedPolicy, ObservingPolicy, Policy, keep_all
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.backward.seam import (
    all_wrappers,
    listening,
    policy_of,
    using_policy,
)
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec.base import Packed
from brevitas_bp.grad.wrapper import QuantGradientWrapper, control_of

#: What is rounded: tensors that autograd saves, or gradients on their way into a product.
Kind = Literal["activations", "gradients"]
KINDS: tuple[Kind, ...] = ("activations", "gradients")


@dataclass(frozen=True)
class Place:
    """Where something is rounded.

    Attributes:
        kind: "activations" or "gradients".
        module: name of the module within its wrapper; None: everywhere.
        wrapper: the wrapper that rounds; None: all wrappers.
        name: qualified name of the module in the model.
    """

    kind: Kind
    module: str | None = None
    wrapper: Any = field(default=None, compare=False)
    name: str = ""


class RoundsOnly:
    """A policy that rounds only what is selected, and keeps exact the rest of what ``policy`` rounds.

    Args:
        policy: the policy that decides about each tensor.
        selected: called for each tensor that ``policy`` rounds; whether it is rounded.
    """

    def __init__(
            self, policy: ExplainedPolicy, selected: Callable[[SavedTensor, Decision], bool]) -> None:
        self.policy, self.selected = policy, selected
        if isinstance(policy, ObservingPolicy):
            self.observe = policy.observe

    def decide(self, saved: SavedTensor) -> Decision:
        decision = self.policy.decide(saved)
        if decision.waits or not _rounds(saved, decision) or self.selected(saved, decision):
            return decision
        return decision._replace(codec=None)

    def rewrite(self, function: Any) -> Rewrite | None:
        return self.policy.rewrite(function)


def _rounds(saved: SavedTensor, decision: Decision) -> bool:
    """Whether a decision rounds the tensor. A codec that is lossless does not."""
    codec = decision.codec
    return codec is not None and codec.lossy and saved.tensor.is_floating_point()


class Roundings:
    """All that rounds in a model.

    Args:
        model: contains wrappers, or is one.

    Attributes:
        saved: wrappers of saved tensors.
        gradients: wrappers of gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        wrappers = [wrapper for _, wrapper in all_wrappers(model)]
        self.saved = [w for w in wrappers if isinstance(w, QuantBackwardWrapper)]
        self.gradients = [w for w in wrappers if isinstance(w, QuantGradientWrapper)]

    def kinds(self) -> list[Kind]:
        """Returns the kinds of things that the model rounds."""
        found: dict[Kind, Any] = {"activations": self.saved, "gradients": self.gradients}
        return [kind for kind in KINDS if found[kind]]

    @contextmanager
    def only(self, place: Place | None) -> Iterator[None]:
        """Within the block, nothing rounds but what is at a place; with None, nothing rounds."""
        with ExitStack() as stack:
            for wrapper in self.saved:
                stack.enter_context(using_policy(wrapper, _policy_at(wrapper, place)))
            for wrapper in self.gradients:
                stack.enter_context(layers_at(wrapper, place))
            yield

    def places(self, run: Callable[[], Any]) -> list[Place]:
        """Returns every place that rounds, in the order in which ``run`` passes them."""
        found: dict[tuple[int, str], Place] = {}

        def noting(prefix: str, wrapper: QuantBackwardWrapper) -> Any:
            def note(saved: SavedTensor, packed: Packed, decision: Decision, originals: Any) -> None:
                if packed.codec.lossy:
                    place = Place("activations", saved.module, wrapper, _joined(prefix, saved.path))
                    found.setdefault((id(wrapper), saved.module), place)

            return note

        names = {id(wrapper): name.removesuffix(".module").removesuffix("module")
                 for name, wrapper in all_wrappers(self.model)}
        with ExitStack() as stack:
            for wrapper in self.saved:
                stack.enter_context(listening(wrapper, noting(names[id(wrapper)], wrapper)))
            run()
        layers = [
            Place("gradients", name, wrapper, _joined(names[id(wrapper)], name))
            for wrapper in self.gradients for name in wrapper.rounded_layers()]
        return [*found.values(), *layers]


def _joined(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _policy_at(wrapper: QuantBackwardWrapper, place: Place | None) -> Policy:
    if place is None or place.kind != "activations" or place.wrapper not in (None, wrapper):
        return keep_all
    policy = policy_of(wrapper)
    if place.module is None:
        return policy
    return RoundsOnly(policy, lambda saved, decision: saved.module == place.module)


def seeded_gradients(wrapper: QuantGradientWrapper, seed: int) -> AbstractContextManager[None]:
    """Within the block, the wrapper draws from a stream of ``seed``; its own stream stands still."""
    return control_of(wrapper).noise.seeded(seed)


@contextmanager
def layers_at(wrapper: QuantGradientWrapper, place: Place | None) -> Iterator[None]:
    """Within the block, the wrapper rounds at a place only; with None, nowhere."""
    control, before = control_of(wrapper), control_of(wrapper).only
    if place is None or place.kind != "gradients" or place.wrapper not in (None, wrapper):
        control.only = frozenset()
    elif place.module is not None:
        control.only = frozenset([place.module])
    try:
        yield
    finally:
        control.only = before
