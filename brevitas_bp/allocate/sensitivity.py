"""Estimates the error of the gradient when one group of saved tensors is rounded.

A group consists of the tensors that share one candidate. An estimator fills a table with the expected
``|g~ - g|^2`` for each group and each candidate. g holds the exact gradients of all parameters, and g~
the gradients with only this group rounded. Roundings of different groups are independent, so the errors
of unbiased roundings add up.

Measurements cost backward passes; the forward pass ran once
(:class:`~brevitas_bp.allocate.profile.Profile`). An error that was not measured is computed from the
distance by which the candidate's rounding moves the tensor. Error and squared distance are proportional:
without averages, both are proportional to ``1 / (2^b - 1)^2``.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from torch import Tensor

from brevitas_bp.allocate.moments import real
from brevitas_bp.allocate.probe import Probed
from brevitas_bp.allocate.profile import Profile
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.errors import UnknownNameError, nearest

_REFERENCE = Candidate(2)

Tick = Callable[[], None]


class Sensitivity(ABC):
    """Estimates the error of the gradient for each group and candidate."""

    #: The name that chooses the estimator.
    name: str

    @abstractmethod
    def passes(self, profile: Profile, candidates: Sequence[Candidate]) -> int:
        """Returns the number of backward passes that :meth:`errors` takes, including the exact one."""

    @abstractmethod
    def errors(
            self, profile: Profile, candidates: Sequence[Candidate],
            tick: Tick = lambda: None) -> list[list[float]]:
        """Returns the expected ``|g~ - g|^2`` [groups][candidates].

        ``tick`` is called after each backward pass.
        """


class ClosedForm(Sensitivity):
    """Multiplies ``|x~ - x|^2`` by the energy of the exact gradient that x multiplies in backward.

    This estimator takes one backward pass. Below, v is the mean squared distance per element.

    * For the input of a layer with weight W [out, ...]: ``v |d|^2 W.numel() / out``, with d the
      gradient of the layer's output. This is the variance of the weight's gradient, apart from the
      correlation of both over samples.
    * For any other tensor: ``v |d|^2``. This is the variance of the gradient that the tensor is
      multiplied with. It contains no error that travels further up from there.

    Source: Chen et al., "ActNN", 2021. Its ``R^2 G / 6 (2^b - 1)^2`` is the ``|x~ - x|^2`` of a bucket
    of evenly spread values.
    """

    name = "closed_form"

    def passes(self, profile: Profile, candidates: Sequence[Candidate]) -> int:
        return 1

    def errors(
            self, profile: Profile, candidates: Sequence[Candidate],
            tick: Tick = lambda: None) -> list[list[float]]:
        profile.exact  # noqa: B018  (its hooks note the energies)
        tick()
        return [
            [sum(_amplified(profile, t) * profile.distance(t, c) for t in group.tensors)
             for c in candidates] for group in profile.groups]


@dataclass(frozen=True)
class Empirical(Sensitivity):
    """Measures the gradient with groups rounded, against the exact gradient.

    * Groups whose error reaches only the gradient of their own weights are rounded all at once, once
      for each candidate. The difference in a weight's gradient is then the error of its group.
    * Each other group is rounded alone, with the reference candidate.

    Biased candidates (averages) are allowed only in groups of the first kind, where measuring them is
    cheap. All measurements include the error that travels further up.

    Args:
        draws: roundings averaged for each measurement.
        reference: the candidate for rounding groups whose error travels further up.

    Source: Liu et al., "GACT", 2022. They take the difference of two 1-bit draws and run forward each
    time.
    """

    draws: int = 2
    reference: Candidate = _REFERENCE
    name = "empirical"

    def passes(self, profile: Profile, candidates: Sequence[Candidate]) -> int:
        local, far = _local_and_far(profile)
        rounding = sum(c.bits is not None for c in candidates)
        return 1 + self.draws * ((rounding if local else 0) + len(far))

    def errors(
            self, profile: Profile, candidates: Sequence[Candidate],
            tick: Tick = lambda: None) -> list[list[float]]:
        profile.exact  # noqa: B018
        tick()
        local, far = _local_and_far(profile)
        found = [[0.0] * len(candidates) for _ in profile.groups]
        for j, candidate in enumerate(candidates):
            if candidate.bits is None or not local:
                continue
            for parts in self._measured(profile, dict.fromkeys(local, candidate), tick):
                for i in local:
                    own = profile.groups[i].parameters or set()
                    found[i][j] += sum(parts[p] for p in own) / self.draws
        for i in far:
            group = profile.groups[i]
            parts = self._measured(profile, {i: self.reference}, tick)
            error = sum(sum(part) for part in parts) / self.draws
            distance = sum(profile.distance(t, self.reference) for t in group.tensors)
            ratio = error / distance if distance > 0 else 0.0
            found[i] = [
                ratio * sum(profile.distance(t, c) for t in group.tensors)
                if c.average_size == 1 else inf for c in candidates]
        return found

    def _measured(
            self, profile: Profile, rounded: dict[int, Candidate],
            tick: Tick) -> list[list[float]]:
        """Returns the error of each parameter's gradient, for each draw."""
        found = []
        for draw in range(self.draws):
            gradients = profile.gradients(rounded, draw)
            found.append([
                self._error(a, b) for a, b in zip(gradients, profile.exact)])
            tick()
        return found

    def _error(self, rounded: Tensor | None, exact: Tensor | None) -> float:
        if rounded is None or exact is None:
            return 0.0
        return float((real(rounded).double() - real(exact).double()).square().sum())


@dataclass(frozen=True)
class GradientNorms(Empirical):
    """Like :class:`Empirical`, but compares only the norm of each parameter's gradient.

    An error orthogonal to the gradient hardly changes the gradient's norm, so values are smaller and
    noisier. If memory does not suffice for a second set of gradients, the norms do: they take one number
    for each parameter.

    Source: "Average Quantization" (the light sensitivity of ALAM), 2024.
    """

    name = "gradient_norms"

    def _error(self, rounded: Tensor | None, exact: Tensor | None) -> float:
        if rounded is None or exact is None:
            return 0.0
        return float(real(rounded).double().norm() - real(exact).double().norm()) ** 2


ESTIMATORS: dict[str, Sensitivity] = {
    e.name: e for e in (ClosedForm(), Empirical(), GradientNorms())}


def estimator(given: str | Sensitivity) -> Sensitivity:
    """Returns an estimator by its name.

    Raises:
        UnknownNameError: no estimator has that name.
    """
    if isinstance(given, Sensitivity):
        return given
    if given not in ESTIMATORS:
        raise UnknownNameError(
            f"brevitas_bp.plan_bit_widths: sensitivity must be one of {sorted(ESTIMATORS)} or a "
            f"Sensitivity, got {given!r}{nearest(str(given), ESTIMATORS)}")
    return ESTIMATORS[given]


def _local_and_far(profile: Profile) -> tuple[list[int], list[int]]:
    """Returns the groups whose errors can be told apart by the weights they reach, and the others."""
    owners = Counter(p for g in profile.groups for p in g.parameters or ())
    local = [
        i for i, g in enumerate(profile.groups)
        if g.parameters and all(owners[p] == 1 for p in g.parameters)]
    return local, sorted(set(range(len(profile.groups))) - set(local))


def _amplified(profile: Profile, tensor: Probed) -> float:
    """Returns the gradient's expected squared error per unit of squared distance of the tensor."""
    energy = profile.probing.energy
    for call in tensor.calls:
        if call not in energy:
            raise ValueError(
                f"brevitas_bp.allocate.ClosedForm: {sorted(tensor.sites)[0]!r} is saved outside "
                "of torch's functions, where no gradient is seen; use sensitivity='empirical'")
    return sum(
        energy[call] * _fan_in(profile, tensor, own)
        for call, own in tensor.calls.items()) / tensor.numel


def _fan_in(profile: Profile, tensor: Probed, own: set[int] | None) -> float:
    """Returns the elements of a layer's weight per output channel; 1 if the operation is no layer."""
    weights = [w for w in (profile.parameters[p] for p in own or ()) if w.dim() > 1]
    if not weights or tensor.reach != {"weight"}:
        return 1.0
    weight = max(weights, key=lambda w: w.numel())
    transposed = any("transpose" in site for site in tensor.sites)
    return weight.numel() / weight.shape[1 if transposed else 0]
