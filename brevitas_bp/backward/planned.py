"""Chooses widths tensor by tensor: names of saved tensors, and the policy that follows a plan."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from brevitas_bp.backward.policy import ExplainedPolicy, ObservingPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import ATTENTION_INPUT, Decision, SavedTensor
from brevitas_bp.codec import Codec
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.errors import UnknownNameError, nearest


class HasChoices(Protocol):
    """An object that holds choices, such as a plan."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """Name of a saved tensor, or a glob over names -> candidate."""
        ...


def site_of(saved: SavedTensor) -> str:
    """Returns the name of a saved tensor: module, operation, and the tensor's part in the operation.

    The name does not depend on how often or in which order modules run. Tensors with one name are
    treated alike.
    """
    what = saved.role
    if what is None:
        position = saved.made_of
        what = "output" if position is None else f"argument {position}"
    return f"{saved.path}:{saved.op or 'custom function'}:{what}"


class PlannedPolicy:
    """A policy that follows another policy, but gives quantized tensors the width of a plan.

    Args:
        policy: decides which tensors are quantized at all.
        choices: name of a saved tensor, or a glob over names -> candidate. The first match wins. Tensors
            without a match are stored as the policy says.
    """

    def __init__(self, policy: ExplainedPolicy, choices: Mapping[str, Any]) -> None:
        self.policy = policy
        self.choices = {pattern: Candidate.parse(given) for pattern, given in choices.items()}
        self._chosen: dict[str, Candidate | None] = {}
        self._compared = False
        if isinstance(policy, ObservingPolicy):
            # An attribute, not a method: without it, the pass makes no call for each operation.
            self.observe = policy.observe

    def decide(self, saved: SavedTensor) -> Decision:
        """Returns the policy's decision, with the planned width."""
        decision = self.policy.decide(saved)
        # A compiled graph recomputes functions of a "nonlinear" tensor. The policy rounds such a tensor
        # finely or not at all, because a coarse rounding would bias gradients.
        if not is_quantized(saved, decision) or saved.reach == "nonlinear":
            return decision
        name = site_of(saved)
        if name not in self._chosen:
            self._chosen[name] = first_match(self.choices, name) or (
                self._widest_in(saved.path) if saved.compiled else None)
        candidate = self._chosen[name]
        if candidate is None:
            return decision
        assert decision.codec is not None
        if candidate.average_size > 1 and decision.reach != "weight":
            # Averages are biased. The bias may reach the gradient of the tensor's own weight only.
            candidate = replace(candidate, average_size=1)
        # A plan has its own width for a product that could be computed from its factors.
        return decision._replace(codec=candidate.codec(base_of(saved, decision)), may_compute=False)

    def unused(self) -> list[str]:
        """Returns names and globs of the plan that no tensor had in the first pass; later, none."""
        if self._compared or not self._chosen:
            return []
        self._compared = True
        return [
            pattern for pattern in self.choices if pattern not in self._chosen
            and not any(fnmatch.fnmatchcase(name, pattern) for name in self._chosen)]

    def _widest_in(self, module: str) -> Candidate | None:
        """Returns the candidate with the most bits that the plan has for any tensor of a module.

        It serves tensors of a compiled graph, to which the graph gives other names.
        """
        return max(
            (candidate for name, candidate in self.choices.items()
             if fnmatch.fnmatchcase(module, name.partition(":")[0])),
            key=lambda candidate: candidate.nominal_bits, default=None)

    def rewrite(self, function: Any) -> Rewrite | None:
        """Returns the rewrite that the inner policy wants."""
        return self.policy.rewrite(function)


def is_quantized(saved: SavedTensor, decision: Decision) -> bool:
    """Whether a decision rounds the tensor at a width that a plan may choose.

    It does not for:

    * masks and indices,
    * query and key of attention, in which backward is not linear,
    * probabilities, which have codes of their own,
    * tensors for which the policy has a quantizer of its own, such as inputs of checkpointed parts,
    * quantizers without widths to choose from.
    """
    codec = decision.codec
    if codec is None or saved.role == ATTENTION_INPUT or decision.probabilities or not (
            saved.tensor.is_floating_point()):
        return False
    configured = configured_of(saved, codec)
    return bool(configured.bit_widths) and codec.is_variant_of(configured)


def base_of(saved: SavedTensor, decision: Decision) -> Codec:
    """Returns the codec that a plan varies: the configured one, or its kind for factors."""
    assert decision.codec is not None
    configured = configured_of(saved, decision.codec)
    return configured.for_factors if decision.reach == "all" else configured


def configured_of(saved: SavedTensor, codec: Codec) -> Codec:
    """Returns the module's codec; if it has none, the codec that a policy chose by itself."""
    return codec if saved.codec is None else saved.codec


def first_match(choices: Mapping[str, Candidate], name: str) -> Candidate | None:
    """Returns the choice for a saved tensor: by its exact name, else by the first glob that matches."""
    if name in choices:
        return choices[name]
    return next((c for p, c in choices.items() if fnmatch.fnmatchcase(name, p)), None)


def check_choices(where: str, choices: Iterable[str], modules: list[str]) -> None:
    """Refuses a plan that was made for another network.

    Raises:
        UnknownNameError: the module of a name or glob does not exist.
    """
    for name in choices:
        module = name.partition(":")[0]
        if not any(fnmatch.fnmatchcase(m, module) for m in modules):
            raise UnknownNameError(
                f"{where}: the plan names the module {module!r} (in {name!r}), which this network "
                f"does not have{nearest(module, modules)}; plan again, or edit the plan")
