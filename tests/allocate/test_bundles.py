"""A derivative and the outputs that are stored given it get their widths together."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, plan_bit_widths, track_saved_memory
from brevitas_bp.allocate import BitPlan, Empirical, measure_gradient_error
from brevitas_bp.allocate.bundles import PlannedTensor, bundled

NAMES = ("1", "2", "4", "exact")
Batch = tuple[Tensor, Tensor]


def tensor(name: str, draw: random.Random, given: str | None = None) -> PlannedTensor:
    """Returns a tensor whose larger candidates have smaller errors, mostly."""
    size = draw.randint(1, 9)
    options = {
        n: (float(size * bits), draw.random() / bits**2 * (n != "exact"))
        for n, bits in zip(NAMES, (1, 2, 4, 32))}
    growth = {own: {n: 10 ** draw.uniform(-1, 1) for n in NAMES} for own in ("", "2")} if given else {}
    return PlannedTensor((name,), size, 4 * size, "weight", options, "1", given, growth)


def plan_of(tensors: list[PlannedTensor]) -> BitPlan:
    return BitPlan(tuple(tensors), 0, 1000, 1.0, "empirical", "edited", 1, 0.0)


def made(seed: int) -> list[PlannedTensor]:
    draw = random.Random(seed)
    return [
        tensor("in", draw), tensor("out", draw, "derivative"), tensor("derivative", draw),
        tensor("again", draw, "derivative"), tensor("lost", draw, "not planned")]


def best(tensors: list[PlannedTensor], budget: float) -> float:
    """Returns the least error within a budget, by trying everything."""
    found = []
    for names in itertools.product(NAMES, repeat=len(tensors)):
        choices = {t.sites[0]: n for t, n in zip(tensors, names)}
        size = sum(t.options[n][0] for t, n in zip(tensors, names))
        if size <= budget:
            found.append(sum(
                t.options[n][1] * (t.growth.get(n, t.growth.get("", {})).get(
                    choices.get(t.given or "", ""), 1.0))
                for t, n in zip(tensors, names)))
    return min(found)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_is_better(seed: int) -> None:
    tensors = made(seed)
    plan = plan_of(tensors)
    assert len(bundled(tensors)) == 3
    least, most = (
        sum(end(size for size, _ in t.options.values()) for t in tensors) for end in (min, max))
    for share in (0, 0.05, 0.1, 0.3, 1):
        budget = int(least + share * (most - least))
        chosen = plan.within(budget=budget)
        assert chosen.stored_bytes <= budget
        assert chosen.error == pytest.approx(best(tensors, budget), rel=1e-9, abs=1e-12)
        greedy = plan.within(budget=budget, method="greedy")
        assert greedy.stored_bytes <= budget
        assert chosen.error <= greedy.error + 1e-12
        assert chosen.error * (1 - chosen.gap()) <= chosen.error


def test_the_error_follows_an_edited_derivative() -> None:
    tensors = made(0)
    plan = plan_of(tensors)
    for name in NAMES:
        edited = plan.with_bits("derivative", name)
        expected = sum(
            t.options["1"][1] * t.growth[""][name] if t.given == "derivative" else
            t.options[name if t.sites == ("derivative",) else "1"][1] for t in tensors)
        assert edited.error == pytest.approx(expected)
    again = BitPlan.from_dict(json.loads(json.dumps(edited.to_dict())))
    assert again == edited
    # Files from before have neither of the two.
    old = edited.to_dict()
    for t in old["tensors"]:
        del t["given"], t["growth"]
    assert BitPlan.from_dict(json.loads(json.dumps(old))).tensors[1].given is None


def test_no_candidate_of_a_derivative_is_lost_for_an_infinite_error() -> None:
    draw = random.Random(0)
    outputs = tensor("out", draw, "derivative")
    outputs.options["1"] = (1.0, float("inf"))
    plan = plan_of([tensor("derivative", draw), outputs])
    assert plan.within(budget=10**6).error == 0


def test_many_outputs_of_one_derivative_are_chosen_in_time() -> None:
    draw = random.Random(3)
    tensors = [tensor("derivative", draw), *(tensor(f"out {i}", draw, "derivative") for i in range(60))]
    plan = plan_of(tensors)
    least = sum(min(size for size, _ in t.options.values()) for t in tensors)
    for share in (1.0, 1.3, 2, 8):
        best_plan, greedy = (
            plan.within(budget=int(share * least), method=m) for m in ("optimal", "greedy"))
        assert best_plan.error <= greedy.error * (1 + 1e-6)
        assert best_plan.stored_bytes <= share * least
        # No other derivative is better, with the best outputs for it.
        for name in NAMES:
            fixed = [replace(t, options={name: t.options[name]}) if t.sites == ("derivative",) else t
                     for t in tensors]
            if sum(min(size for size, _ in t.options.values()) for t in fixed) <= share * least:
                assert best_plan.error <= plan_of(fixed).within(
                    budget=int(share * least)).error * (1 + 1e-6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(4096, 10))


class Gated(nn.Module):
    """A product whose factor is stored given its derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.gate, self.up, self.head = (
            nn.Linear(64, 96), nn.Linear(96, 256), nn.Linear(96, 256), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(F.silu(self.gate(y)) * self.up(y))


def test_plans_know_factors_that_are_stored_given_their_derivative() -> None:
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(128, 64, generator=generator), torch.randint(
        10, (128,), generator=generator)
    plan = plan_bit_widths(Gated(), given, loss, average_bits=3, sensitivity=Empirical(draws=4))
    assert [t.sites[0] for t in plan.tensors if t.given == "gate:silu:derivative" or (
        t.given or "").endswith("silu:derivative")] == [":mul:argument 0"]
    for bits in (2.0, 3.0, 4.0):
        chosen = plan.within(average_bits=bits)
        model = QuantBackwardWrapper(Gated(), plan=chosen)
        with track_saved_memory(model) as report:
            kept = loss(model, given)
        del kept
        # Whether the derivative is exact changes a byte for each bucket at most.
        assert report.stored_bytes == pytest.approx(chosen.stored_bytes, rel=0.01)
        torch.manual_seed(3)
        error = measure_gradient_error(model, lambda m: loss(m, given), draws=24).total
        found = error.variance + max(error.offset, 0)
        assert chosen.error * chosen.gradient_energy == pytest.approx(found, rel=0.3)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 16, 16, generator=generator), torch.randint(
        10, (16,), generator=generator)


def loss(model: nn.Module, given: Batch) -> Tensor:
    return F.cross_entropy(model(given[0]), given[1])


@pytest.fixture(scope="module")
def measured() -> BitPlan:
    return plan_bit_widths(network(), batch(), loss, average_bits=2, sensitivity=Empirical(draws=4))


def test_outputs_know_their_derivative(measured: BitPlan) -> None:
    given = {t.sites[0]: t.given for t in measured.tensors}
    assert given["3:conv2d:argument 0"] == "2:silu:derivative"
    assert given["6:conv2d:argument 0"] == "5:gelu:derivative"
    assert list(given.values()).count(None) == len(given) - 2
    for t in measured.tensors:
        if t.given is not None:
            # The derivative has four bits under the default policy.
            codes = t.growth[""]
            assert codes["4"] == pytest.approx(1, rel=0.1)
            assert codes["1"] > codes["2"] > codes["3"] > codes["4"] > codes["8"]
            # Nothing is stored of an exact derivative, so the output is stored as it is.
            assert codes["exact"] > 2
            # Averages lose something else.
            assert set(t.growth) == {"", "2avg2", "2avg4", "2avg8"}
            assert t.growth["2avg8"]["2"] != codes["2"]


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0])
def test_the_error_that_was_planned_is_the_one_that_comes(measured: BitPlan, bits: float) -> None:
    plan = measured.within(average_bits=bits)
    model = QuantBackwardWrapper(network(), plan=plan)
    torch.manual_seed(3)
    error = measure_gradient_error(model, lambda m: loss(m, batch()), draws=24).total
    found = error.variance + max(error.offset, 0)
    assert plan.error * plan.gradient_energy == pytest.approx(found, rel=0.3)


def test_derivatives_that_are_counted_alone_mislead(measured: BitPlan) -> None:
    """The control: a plan that takes the error of an output for independent of its derivative."""
    alone = BitPlan.from_dict({**measured.to_dict(), "tensors": [
        {**t, "given": None} for t in measured.to_dict()["tensors"]]})
    chosen = alone.within(average_bits=1.5)
    truly = measured
    for t in chosen.tensors:
        truly = truly.with_bits(t.sites[0], t.chosen)
    assert truly.error > 1.5 * chosen.error
    assert measured.within(average_bits=1.5).error <= truly.error
