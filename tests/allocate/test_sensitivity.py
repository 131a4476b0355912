"""Estimators agree with their definitions, with theory and with each other."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.allocate import Candidate, ClosedForm, Empirical, GradientNorms, Sensitivity
from brevitas_bp.allocate.profile import Profile
from brevitas_bp.allocate.sensitivity import ESTIMATORS, estimator
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic
from tests.allocate.networks import Residual, images, loss
from tests.backward.support import Square

CANDIDATES = [Candidate.parse(c) for c in ("1", "2", "4", "2avg2", "exact")]


def profile_of(module: nn.Module | None = None) -> Profile:
    torch.manual_seed(2)
    return Profile(
        QuantBackwardWrapper(
            module or Residual(), ShiftedUint2DynamicActPerBucketFloatStochastic, bucket_size=64),
        images(), loss)


def distance(ours: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    return sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(ours, exact) if a is not None and b is not None)


def test_empirical_is_its_definition() -> None:
    profile, draws = profile_of(), 3
    found = Empirical(draws=draws).errors(profile, CANDIDATES)
    for i, group in enumerate(profile.groups):
        for j, candidate in enumerate(CANDIDATES):
            if group.parameters is not None:
                # Measured together with all others; the result equals a separate measurement.
                alone = [distance(profile.gradients({i: candidate}, d), profile.exact)
                         for d in range(draws)]
                assert found[i][j] == pytest.approx(sum(alone) / draws, rel=1e-9)
            elif candidate.average_size > 1:
                assert found[i][j] == float("inf")  # the bias of averages would reach other gradients
        assert found[i][CANDIDATES.index(Candidate(None))] == 0


def test_far_groups_follow_from_the_reference() -> None:
    profile, reference = profile_of(), Candidate(2)
    found = Empirical(draws=1, reference=reference).errors(profile, CANDIDATES)
    for i, group in enumerate(profile.groups):
        if group.parameters is None:
            measured = distance(profile.gradients({i: reference}, 0), profile.exact)
            assert found[i][1] == pytest.approx(measured, rel=1e-9)
            # From 2 to 4 bits the step shrinks 5 times, and the distance 25 times, up to the draw of the
            # last bit. Groups have thousands of elements, so half or double is far beyond chance.
            assert 12 < found[i][1] / found[i][2] < 50


class Wide(nn.Module):
    """A linear layer, whose rounding error has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.linear = nn.Flatten(), nn.Linear(768, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(x))


@pytest.mark.parametrize("module", [Wide, Residual])
def test_closed_form_predicts_layers(module: type[nn.Module]) -> None:
    profile = profile_of(module())
    predicted = ClosedForm().errors(profile, CANDIDATES)
    measured = Empirical(draws=16).errors(profile, CANDIDATES)
    plain = [j for j, c in enumerate(CANDIDATES) if c.average_size == 1 and c.bits is not None]
    compared = 0
    for i, group in enumerate(profile.groups):
        if group.parameters is None:
            continue
        for j in plain:
            # They differ by chance, and because the closed form ignores that gradients and ranges
            # correlate over samples. These samples are alike. A wrong fan-in is off by 10 or more.
            assert 0.6 < predicted[i][j] / measured[i][j] < 1.7
            compared += 1
    assert compared >= len(plain)


def test_norms_differ_by_no_more_than_gradients() -> None:
    profile = profile_of()
    local = [j for j, c in enumerate(CANDIDATES) if c.average_size == 1]
    norms = GradientNorms(draws=2).errors(profile, CANDIDATES)
    whole = Empirical(draws=2).errors(profile, CANDIDATES)
    for a, b in zip(norms, whole):
        # (|a| - |b|)^2 <= |a - b|^2 for each parameter.
        assert all(a[j] <= b[j] * (1 + 1e-9) for j in local)
    assert any(a[0] < 0.5 * b[0] for a, b in zip(norms, whole))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_passes_are_counted(name: str) -> None:
    profile, ticks = profile_of(), []
    estimate = estimator(name)
    estimate.errors(profile, CANDIDATES, lambda: ticks.append(1))
    assert len(ticks) == estimate.passes(profile, CANDIDATES)


def test_tied_weights_are_measured_one_by_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(768, 768, bias=False), nn.Linear(768, 768, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(1)).relu())[:, :10]

    profile = profile_of(Tied())
    found = Empirical(draws=1).errors(profile, CANDIDATES)
    for i in range(len(profile.groups)):
        assert found[i][1] == pytest.approx(
            distance(profile.gradients({i: Candidate(2)}, 0), profile.exact), rel=1e-9)


def test_unknown_estimators_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'empirical'"):
        estimator("empiric")


def test_own_estimator() -> None:
    class Mine(ClosedForm):
        name = "mine"

    assert isinstance(estimator(Mine()), Sensitivity)


def test_closed_form_of_several_calls_is_their_sum() -> None:
    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, batch) + loss(model, batch)

    torch.manual_seed(2)
    wrapped = QuantBackwardWrapper(Wide(), bucket_size=64)
    once = ClosedForm().errors(Profile(wrapped, images(), loss), CANDIDATES)
    both = ClosedForm().errors(Profile(wrapped, images(), twice), CANDIDATES)
    # Two independent roundings of one tensor, up to the chance of a thousand elements.
    assert both[0][1] == pytest.approx(2 * once[0][1], rel=0.1)


def test_closed_form_says_what_it_cannot_see() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(768))

        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x.flatten(1) * self.weight)[:, :10]

    torch.manual_seed(2)
    profile = Profile(QuantBackwardWrapper(Custom(), policy="all"), images(), loss)
    with pytest.raises(ValueError, match=r"outside of torch's functions.*use sensitivity='empirical'"):
        ClosedForm().errors(profile, CANDIDATES)
    assert all(row[1] > 0 for row in Empirical().errors(profile, CANDIDATES))
