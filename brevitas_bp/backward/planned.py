"""Widths chosen tensor by tensor: names of saved tensors, and the policy that obeys a plan."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from brevitas_bp.backward.policy import ExplainedPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.backward.wider import has_bits, with_bits
from brevitas_bp.codec import Codec
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.backward.Candidate"


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor. Written "exact", "2", or "2@64" with a bucket size.

    Attributes:
        bits: width in 1..8; None keeps the tensor exact.
        bucket_size: elements per bucket; None as configured.

    Raises:
        ValueError: another width.

    >>> Candidate.parse("2@64")
    Candidate(bits=2, bucket_size=64)
    >>> str(Candidate.parse(4)), str(Candidate.parse("exact"))
    ('4', 'exact')
    """

    bits: int | None
    bucket_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in range(1, 9):
            raise ValueError(
                f"{_WHERE}: bits must be in 1..8, or None for exact, got {self.bits!r}")

    @classmethod
    def parse(cls, given: "Candidate | float | str") -> "Candidate":
        """A candidate from its text, or from a number of bits."""
        if isinstance(given, Candidate):
            return given
        text = str(given)
        if text == "exact":
            return cls(None)
        bits, _, size = text.partition("@")
        try:
            return cls(int(float(bits)), int(size) if size else None)
        except ValueError as error:
            raise ValueError(
                f"{_WHERE}: expected 'exact', a number of bits such as 2, or bits and bucket "
                f"size such as '2@64', got {given!r}") from error

    def __str__(self) -> str:
        if self.bits is None:
            return "exact"
        return f"{self.bits}" if self.bucket_size is None else f"{self.bits}@{self.bucket_size}"

    def codec(self, configured: Codec) -> Codec | None:
        """The codec, with rounding and metadata as configured; None keeps exact."""
        if self.bits is None:
            return None
        if not has_bits(configured):
            raise ValueError(
                f"{_WHERE}: {configured.name!r} is no bucket quantizer, so there is none of "
                f"{self.bits} bits; configure one of brevitas_bp.quant")
        if self.bucket_size is None and configured.quantizer.bit_widths == (self.bits,):
            return configured
        return with_bits(configured, self.bits, self.bucket_size)


class HasChoices(Protocol):
    """Something that holds choices, such as a plan."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """Name of a saved tensor, or a glob over names -> candidate."""
        ...


def site_of(saved: SavedTensor) -> str:
    """The name of a saved tensor: module, operation, and what it is to the operation.

    It holds however often and in whatever order modules run; tensors of one name are treated alike.
    """
    what = saved.role
    if what is None:
        position = saved.position
        what = "output" if position is None else f"argument {position}"
    return f"{saved.path}:{saved.op or 'custom function'}:{what}"


class PlannedPolicy:
    """A policy whose quantized tensors get the width that a plan says; all else is as it decides.

    Args:
        policy: decides what is quantized at all.
        choices: name of a saved tensor, or a glob over names -> candidate. The first that matches wins;
            tensors that none matches are stored as the policy says.
    """

    def __init__(self, policy: ExplainedPolicy, choices: Mapping[str, Any]) -> None:
        self.policy = policy
        self.choices = {pattern: Candidate.parse(given) for pattern, given in choices.items()}
        self._chosen: dict[str, Candidate | None] = {}

    def decide(self, saved: SavedTensor) -> Decision:
        """The policy's decision, with the planned width."""
        decision = self.policy.decide(saved)
        if not is_quantized(saved, decision):
            return decision
        name = site_of(saved)
        if name not in self._chosen:
            self._chosen[name] = first_match(self.choices, name)
        candidate = self._chosen[name]
        if candidate is None:
            return decision
        assert saved.codec is not None
        return decision._replace(codec=candidate.codec(saved.codec))

    def rewrite(self, function: Any) -> Rewrite | None:
        """As the policy does."""
        return self.policy.rewrite(function)


def is_quantized(saved: SavedTensor, decision: Decision) -> bool:
    """Whether a decision rounds the tensor at a width that may be chosen: no mask, no index."""
    codec = decision.codec
    return codec is not None and (codec is saved.codec or has_bits(codec)) and (
        saved.tensor.is_floating_point())


def first_match(choices: Mapping[str, Candidate], name: str) -> Candidate | None:
    """What is chosen for a saved tensor: by its very name, else by the first glob."""
    if name in choices:
        return choices[name]
    return next((c for p, c in choices.items() if fnmatch.fnmatchcase(name, p)), None)


def check_choices(where: str, choices: Iterable[str], modules: list[str]) -> None:
    """Refuses a plan for another network.

    Raises:
        UnknownNameError: a name or glob whose module does not exist.
    """
    for name in choices:
        module = name.partition(":")[0]
        if not any(fnmatch.fnmatchcase(m, module) for m in modules):
            raise UnknownNameError(
                f"{where}: the plan names the module {module!r} (in {name!r}), which this network "
                f"does not have{nearest(module, modules)}; plan again, or edit the plan")
