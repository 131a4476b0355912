"""Widths chosen tensor by tensor: names of saved tensors, and the policy that obeys a plan."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from brevitas_bp.backward.policy import ExplainedPolicy, ObservingPolicy
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.backward.wider import has_bits, is_variant, with_bits
from brevitas_bp.codec import Codec
from brevitas_bp.codec.average import unaveraged
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.backward.Candidate"


_NOTATION = re.compile(r"(\d+)(?:avg(\d+))?(?:@(\d+))?")
# Averages are stored in 2 bits each, as in the paper.
_AVERAGES = {0.5: "2avg4", 0.25: "2avg8"}


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor.

    Written "exact", "2", "2@64" with a bucket size, "2avg4" for 2-bit means of 4 elements. The
    numbers 0.5 and 0.25 are "2avg4" and "2avg8"; 1 is one bit for each element, and "2avg2" the
    average of one bit.

    Attributes:
        bits: of each code, 1..8; None keeps the tensor exact.
        bucket_size: codes per bucket; None as configured.
        average_size: neighbours of which only the mean is stored.

    Raises:
        ValueError: another width or size.

    >>> Candidate.parse("2@64")
    Candidate(bits=2, bucket_size=64, average_size=1)
    >>> str(Candidate.parse(4)), str(Candidate.parse(0.25)), str(Candidate.parse("exact"))
    ('4', '2avg8', 'exact')
    """

    bits: int | None
    bucket_size: int | None = None
    average_size: int = 1

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bit_width(_WHERE, self.bits)
        if self.average_size < 1 or (
                self.bucket_size is not None and (self.bucket_size < 8 or self.bucket_size % 8)):
            raise ValueError(
                f"{_WHERE}: expected an average_size of 1 or more and a bucket_size that is a "
                f"multiple of 8, got {self.average_size} and {self.bucket_size}")

    @classmethod
    def parse(cls, given: "Candidate | float | str") -> "Candidate":
        """A candidate from its text, or from a number of bits."""
        if isinstance(given, Candidate):
            return given
        text = str(given)
        if text == "exact":
            return cls(None)
        with suppress(ValueError):
            text = _AVERAGES.get(float(text), text.removesuffix(".0"))
        match = _NOTATION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{_WHERE}: expected 'exact', a number of bits such as 2 or 0.5, bits and bucket size "
                f"such as '2@64', or means such as '2avg4', got {given!r}")
        bits, average, bucket = (None if part is None else int(part) for part in match.groups())
        return cls(bits, bucket, average or 1)

    def __str__(self) -> str:
        if self.bits is None:
            return "exact"
        average = "" if self.average_size == 1 else f"avg{self.average_size}"
        return f"{self.bits}{average}" + ("" if self.bucket_size is None else f"@{self.bucket_size}")

    @property
    def nominal_bits(self) -> float:
        """Bits of codes for each element; infinite for exact."""
        return float("inf") if self.bits is None else self.bits / self.average_size

    def codec(self, configured: Codec) -> Codec | None:
        """The codec, with rounding and metadata as configured; None keeps exact."""
        if self.bits is None:
            return None
        plain = unaveraged(configured)
        if not has_bits(plain):
            raise ValueError(
                f"{_WHERE}: {configured.name!r} is no bucket quantizer, so there is none of "
                f"{self.bits} bits; configure one of brevitas_bp.quant")
        if self.bucket_size is None and self.average_size == 1 and (
                plain.quantizer.bit_widths == (self.bits,)):
            return plain
        return with_bits(plain, self.bits, self.bucket_size, self.average_size)


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
        position = saved.made_of
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
        self._compared = False
        if isinstance(policy, ObservingPolicy):
            # Not a method: who has none is spared a call for each operation.
            self.observe = policy.observe

    def decide(self, saved: SavedTensor) -> Decision:
        """The policy's decision, with the planned width."""
        decision = self.policy.decide(saved)
        # What a compiled graph recomputes from is rounded finely or not at all, lest it bias gradients.
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
        if candidate.average_size > 1 and decision.reaches != "weight":
            # The bias of averages must not reach other gradients than that of the tensor's own weight.
            candidate = replace(candidate, average_size=1)
        return decision._replace(
            codec=candidate.codec(configured_of(saved, decision.codec)))

    def unused(self) -> list[str]:
        """Names and globs of the plan that no tensor had in the first pass; nothing in later ones."""
        if self._compared or not self._chosen:
            return []
        self._compared = True
        return [
            pattern for pattern in self.choices if pattern not in self._chosen
            and not any(fnmatch.fnmatchcase(name, pattern) for name in self._chosen)]

    def _widest_in(self, module: str) -> Candidate | None:
        """The most bits planned for a tensor of a module: a compiled graph has other names for them."""
        return max(
            (candidate for name, candidate in self.choices.items()
             if fnmatch.fnmatchcase(module, name.partition(":")[0])),
            key=lambda candidate: candidate.nominal_bits, default=None)

    def rewrite(self, function: Any) -> Rewrite | None:
        """As the policy does."""
        return self.policy.rewrite(function)


def is_quantized(saved: SavedTensor, decision: Decision) -> bool:
    """Whether a decision rounds the tensor at a width that may be chosen.

    That is no mask and no index; not what the policy was given a quantizer for (query and key, inputs of
    checkpointed parts); and no quantizer without widths to choose from.
    """
    codec = decision.codec
    if codec is None or not saved.tensor.is_floating_point():
        return False
    configured = configured_of(saved, codec)
    return has_bits(unaveraged(configured)) and is_variant(codec, configured)


def configured_of(saved: SavedTensor, codec: Codec) -> Codec:
    """The module's codec; where it has none, the one that a policy chose by itself."""
    return codec if saved.codec is None else saved.codec


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
