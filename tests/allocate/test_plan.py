"""Plans meet budgets in live bytes, beat uniform bits, and can be saved, edited and applied."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory
from brevitas_bp.allocate import (
    BitPlan,
    Candidate,
    Empirical,
    Replanner,
    measure_gradient_error,
    plan_bit_widths,
)
from brevitas_bp.allocate.plan import parse_bytes
from brevitas_bp.errors import InfeasibleBudgetError, UnknownNameError
from brevitas_bp.quant import (
    Int4DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)
from tests.allocate.networks import Residual, images, loss

OPTIONS: dict[str, Any] = {"bucket_size": 256, "metadata_dtype": torch.bfloat16}


def module() -> nn.Module:
    torch.manual_seed(2)
    return Residual()


@pytest.fixture(scope="module")
def measured() -> BitPlan:
    """Measures once; tests derive every budget from this plan."""
    return plan_bit_widths(
        module(), images(), loss, average_bits=4, sensitivity=Empirical(draws=4), **OPTIONS)


def wrapped(plan: Any = None, **options: Any) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module(), plan=plan, **OPTIONS, **options)


def live_bytes(model: QuantBackwardWrapper) -> int:
    with track_saved_memory(model) as report:
        kept = loss(model, images())
    del kept
    return report.stored_bytes


@pytest.mark.parametrize("method", ["optimal", "greedy"])
@pytest.mark.parametrize("share", [8, 10, 14])
def test_budget_is_met_in_live_bytes(measured: BitPlan, share: int, method: Any) -> None:
    budget = measured.exact_bytes // share
    plan = measured.within(budget=budget, method=method)
    live = live_bytes(wrapped(plan))
    assert live <= budget
    assert live == plan.stored_bytes
    # The budget is used up: the rest is smaller than the smallest step.
    if method == "optimal":
        assert live > 0.97 * budget


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.5, 4.0])
def test_average_bits_count_metadata(measured: BitPlan, bits: float) -> None:
    plan = measured.within(average_bits=bits)
    elements = sum(t.elements for t in plan.tensors)
    assert live_bytes(wrapped(plan)) - plan.fixed_bytes <= bits * elements / 8
    assert 0.95 * bits < plan.average_bits <= bits


def test_optimal_is_no_worse_than_greedy(measured: BitPlan) -> None:
    for bits in (0.85, 1, 1.5, 2, 3, 4, 6):
        best = measured.within(average_bits=bits)
        greedy = measured.within(average_bits=bits, method="greedy")
        assert best.error <= greedy.error * (1 + 1e-6)
        # The bound holds for the bytes that each plan takes.
        assert 0 <= best.gap() < 0.5
        assert greedy.gap() >= -1e-9
        assert best.error * (1 - best.gap()) <= best.error


def test_more_bytes_never_cost_more(measured: BitPlan) -> None:
    errors = [measured.within(average_bits=b).error for b in (0.85, 1, 2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def total_variance(model: QuantBackwardWrapper) -> float:
    """Returns the squared error of the whole gradient, averaged over draws."""
    def run(m: nn.Module) -> Tensor:
        return loss(m, images())

    torch.manual_seed(3)
    error = measure_gradient_error(model, run, draws=24).total
    return error.variance + max(error.offset, 0)


def test_plan_beats_uniform_widths_at_their_bytes(measured: BitPlan) -> None:
    policy = OpAware(multiplier_bits=1)
    for bits in (2, 3):
        uniform = QuantBackwardWrapper(
            module(), ShiftedUint2DynamicActPerBucketFloatStochastic, policy=policy, bit_width=bits,
            **OPTIONS)
        plan = measured.within(budget=live_bytes(uniform))
        assert live_bytes(wrapped(plan)) <= live_bytes(uniform)
        # 24 draws of some thousand roundings each: a tenth is many deviations. At most three quarters
        # of the variance remain because these layers differ widely; the studies use real networks.
        assert total_variance(wrapped(plan)) < 0.75 * total_variance(uniform)


def test_error_that_was_planned_is_the_one_that_comes(measured: BitPlan) -> None:
    plan = measured.within(average_bits=3)
    # Errors of groups add up if roundings are unbiased. The rest is chance, and the bias of norms.
    assert total_variance(wrapped(plan)) == pytest.approx(
        plan.error * plan.gradient_energy, rel=0.35)


def test_choices_are_obeyed(measured: BitPlan) -> None:
    plan = measured.within(average_bits=2).with_bits("stem:*", "exact").with_bits("head:*", 8)
    model = wrapped(plan)
    loss(model, images())
    stored = {(s.module, s.op): s.stored for s in model.explain().sites.values()}
    assert stored["stem", "conv2d"] == "exact"
    assert stored["head", "linear"] == "8-bit rotated"
    assert stored["", "relu"] == "mask of relu" or "relu" in stored["", "relu"]  # exact without a plan
    model.use_plan(None)
    loss(model, images())
    assert {s.stored for s in model.explain().sites.values() if s.module == "stem"} == {
        "4-bit rotated"}


def test_averages_stay_where_their_bias_does(measured: BitPlan) -> None:
    for tensor in measured.tensors:
        averaged = [name for name in tensor.options if "avg" in name]
        if "norm:" in tensor.sites[0] or "derivative" in tensor.sites[0]:
            assert not averaged
    assert any("avg" in name for t in measured.tensors for name in t.options)
    lowest = measured.within(average_bits=0.85)
    assert any("avg" in t.chosen for t in lowest.tensors)


def test_averages_lower_the_error_at_few_bits(measured: BitPlan) -> None:
    plain = plan_bit_widths(
        module(), images(), loss, average_bits=1.5, candidates=(1, 2, 3, 4, 6, 8, "exact"),
        sensitivity=Empirical(draws=4), **OPTIONS)
    assert measured.within(average_bits=1.5).error <= plain.error


def test_buckets_may_be_candidates() -> None:
    plan = plan_bit_widths(
        module(), images(), loss, average_bits=2.2,
        candidates=("2@16", "2@64", "2@512", "3@512", "1@16", 8), **OPTIONS)
    sizes = {Candidate.parse(t.chosen).bucket_size for t in plan.tensors}
    assert len(sizes) > 1
    assert live_bytes(wrapped(plan)) == plan.stored_bytes


# Saving and editing plans.


def test_plans_are_kept(measured: BitPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    measured.save(path)
    assert BitPlan.load(path) == measured
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    values = json.loads(path.read_text())
    values["tensors"][0]["chosen"] = "8"
    path.write_text(json.dumps(values))
    assert BitPlan.load(path).choices[measured.tensors[0].sites[0]] == "8"


@pytest.mark.parametrize(("text", "message"), [
    ("{", "plan.json"), ("[]", "plan.json"), ('{"format": 2}', "format is not 1"),
    ('{"format": 1, "tensors": []}', "no plan")])
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        BitPlan.load(path)


def test_width_that_was_not_measured_is_refused(measured: BitPlan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'7' was not measured"):
        measured.with_bits("stem:*", 7)
    with pytest.raises(UnknownNameError, match=r"matches none of the .*did you mean 'stem"):
        measured.with_bits("stemm:conv2d:argument 0", 2)
    values = json.loads(json.dumps(measured.to_dict()))
    values["tensors"][0]["chosen"] = "7"
    with pytest.raises(ValueError, match="chooses '7'"):
        BitPlan.from_dict(values)


def test_overrides_say_the_same(measured: BitPlan) -> None:
    plan = measured.within(average_bits=2)
    overrides = {m: c for m, c in plan.overrides().items() if m}
    assert overrides["stem"] == plan.choices["stem:conv2d:argument 0"]
    model = QuantBackwardWrapper(module(), overrides=overrides, **OPTIONS)
    loss(model, images())
    planned = wrapped(plan)
    loss(planned, images())
    for name in ("stem", "left", "head"):
        found = [
            {s.stored for s in m.explain().sites.values() if s.module == name}
            for m in (model, planned)]
        assert found[0] == found[1]


def test_plan_is_printed(measured: BitPlan) -> None:
    text = str(measured)
    assert re.search(r"stem:conv2d +weight +\S+", text)
    assert re.search(r"left:conv2d \(\+1\) +weight", text)
    assert "times fewer bytes" in text
    assert "backward passes" in text


# Refused arguments.


def test_infeasible_budget_says_by_how_much(measured: BitPlan) -> None:
    least = sum(min(o[0] for o in t.options.values()) for t in measured.tensors)
    with pytest.raises(InfeasibleBudgetError, match=r"[0-9] bytes, 1,024 bytes more than the budget"):
        measured.within(budget=measured.fixed_bytes + int(least) - 1024)
    measured.within(budget=measured.fixed_bytes + int(least) + 1)


def test_plan_of_another_network_is_refused(measured: BitPlan) -> None:
    with pytest.raises(UnknownNameError, match="names the module 'stem'"):
        QuantBackwardWrapper(nn.Linear(4, 4), plan=measured)
    with pytest.raises(TypeError, match="plan must come from plan_bit_widths"):
        QuantBackwardWrapper(nn.Linear(4, 4), plan=3)  # pyright: ignore


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no budget": ({}, ValueError, "exactly one of budget and average_bits"),
    "two budgets": ({"budget": 1, "average_bits": 1}, ValueError, "exactly one of"),
    "budget": ({"budget": "400 monkeys"}, ValueError, "'400MB', '381MiB' or '5%'"),
    "candidates": ({"average_bits": 2, "candidates": (2,)}, ValueError, "two or more"),
    "candidate": ({"average_bits": 2, "candidates": (2, 9)}, ValueError, "1..8, got 9"),
    "notation": ({"average_bits": 2, "candidates": (2, "two")}, ValueError, "such as '2@64'"),
    "sensitivity": (
        {"average_bits": 2, "sensitivity": "closed"}, UnknownNameError, "did you mean 'closed_form'"),
    "method": ({"average_bits": 2, "method": "best"}, UnknownNameError, "method must be one of"),
    "quantizer": (
        {"average_bits": 2, "act_quant": Int8ActPerTensorFloat}, ValueError,
        "quantizes nothing that this network saves at a width"),
    "nothing to plan": ({"average_bits": 2, "policy": "exact"}, ValueError, "quantizes nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    arguments, error, message = BAD[name]
    if name != "quantizer":
        arguments = {**OPTIONS, **arguments}
    with pytest.raises(error, match=message):
        plan_bit_widths(
            module(), images(), loss, **{"sensitivity": "closed_form", **arguments})


def test_settings_of_a_wrapped_model_are_its_own() -> None:
    model = wrapped()
    plan = plan_bit_widths(model, images(), loss, average_bits=2, sensitivity="closed_form")
    model.use_plan(plan)
    assert live_bytes(model) == plan.stored_bytes
    with pytest.raises(TypeError, match=r"wrapped already.*bucket_size"):
        plan_bit_widths(model, images(), loss, average_bits=2, bucket_size=8)


def test_sizes_in_words() -> None:
    assert parse_bytes(12) == 12
    assert parse_bytes("2.5 kB") == 2500
    assert parse_bytes("3KiB") == 3072
    assert parse_bytes("10%", 55) == 5


# Plans in a training loop.


def test_progress_tells_the_cost_beforehand() -> None:
    told: list[str] = []
    plan = plan_bit_widths(
        module(), images(), loss, average_bits=2, progress=told.append, **OPTIONS)
    assert re.match(rf"sensitivity: {len(plan.tensors)} tensors, {plan.passes} backward passes", told[0])
    assert len(told) == plan.passes + 1


def test_planned_wrapper_is_copied_and_goes_on(measured: BitPlan) -> None:
    model = wrapped(measured.within(average_bits=2), seed=1)
    other = copy.deepcopy(model)
    assert live_bytes(other) == live_bytes(model)


def test_names_that_a_plan_does_not_have_are_stored_as_the_policy_says() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.used = [0, 1]

        def forward(self, x: Tensor) -> Tensor:
            for i in self.used:
                x = self.layers[i](x)
            return x

    net, x = Changing(), torch.randn(256, 64)
    plan = plan_bit_widths(
        net, x, lambda m, b: m(b).square().mean(), average_bits=5, candidates=(4, 8))
    model = QuantBackwardWrapper(net, plan=plan)
    net.used = [2, 0]  # another order, and a layer that was unused before
    with pytest.warns(UserWarning, match=r"names 'layers\.1:linear:argument 0', and no tensor"):
        model(x).sum().backward()
    model(x)
    stored = {s.module: s.stored for s in model.explain().sites.values()}
    assert stored["layers.2"] == "2-bit rotated"
    assert stored["layers.0"] == f"{plan.choices['layers.0:linear:argument 0']}-bit rotated"


def test_replanner_plans_now_and_then_and_resumes() -> None:
    def replanner(model: QuantBackwardWrapper) -> Replanner:
        return Replanner(model, loss, every=3, average_bits=2, sensitivity="closed_form")

    model = wrapped(seed=1)
    first = replanner(model)
    planned = [first.step(images()) is not None for _ in range(5)]
    assert planned == [True, False, False, True, False]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = replanner(wrapped(seed=1))
    resumed.load_state_dict(state)
    assert live_bytes(resumed.model) == live_bytes(model)
    assert [resumed.step(images()) is not None for _ in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match="every must be a positive"):
        Replanner(model, loss, every=0)
    with pytest.raises(TypeError, match="must be a QuantBackwardWrapper"):
        Replanner(module(), loss, every=1)  # pyright: ignore


def test_plan_costs_no_bit_of_the_forward(measured: BitPlan) -> None:
    plain, model = module(), wrapped(measured.within(average_bits=1))
    outputs = []
    for m in (plain, model):
        torch.manual_seed(0)
        outputs.append(m(images()[0]))
    assert torch.equal(*outputs)


def test_layers_without_a_gradient_yet_come_last_and_can_be_edited() -> None:
    class Zero(nn.Module):
        """Its adapter starts at zero, so everything before it gets a zero gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.main, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
            self.up = nn.Linear(64, 64)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + self.up(self.down(2 * x))

    plan = plan_bit_widths(
        Zero(), torch.randn(256, 64), lambda m, b: m(b).square().mean(), average_bits=4)
    bits = {t.sites[0].partition(":")[0]: Candidate.parse(t.chosen) for t in plan.tensors}
    assert bits["down"].nominal_bits < bits["main"].nominal_bits
    assert plan.with_bits("down:*", 8).choices["down:linear:argument 0"] == "8"
    roomy = plan.within(average_bits=32)
    assert set(roomy.choices.values()) == {"exact"}


def test_overrides_of_containers_come_after_what_they_contain() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x @ self.weight)

    class Root(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

    x = torch.randn(256, 64)
    plan = plan_bit_widths(Root(), x, lambda m, b: m(b).square().mean(), average_bits=4)
    plan = plan.with_bits("inner.inner:*", 8).with_bits("inner:*", 4).with_bits(":*", 3)
    assert plan.overrides() == {"inner.inner": "8", "inner": "4", "*": "3"}
    model = QuantBackwardWrapper(Root(), overrides=plan.overrides())
    model(x.requires_grad_()).sum().backward()
    stored = {s.module: s.stored for s in model.explain().sites.values()}
    assert stored["inner.inner"] == "8-bit rotated"
    assert stored["inner"] == "4-bit rotated"


def test_a_plan_is_made_under_the_policy_not_under_the_plan_before() -> None:
    model = wrapped({"stem:*": "exact"})
    plan = plan_bit_widths(model, images(), loss, average_bits=2, sensitivity="closed_form")
    assert "stem:conv2d:argument 0" in plan.choices
    before = model._policy
    replanner = Replanner(model, loss, every=1, average_bits=0.01, sensitivity="closed_form")
    with pytest.raises(InfeasibleBudgetError):
        replanner.step(images())
    assert model._policy is before


def test_arguments_are_checked_before_anything_runs() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("it ran")

    for arguments in ({"average_bits": 2, "method": "best"}, {"budget": "lots"}, {}):
        with pytest.raises(ValueError, match=r"method|budget"):
            plan_bit_widths(module(), images(), never, **arguments)


def test_globs_average_only_what_stays_in_one_weight() -> None:
    model = wrapped({"*": 0.5})
    loss(model, images())
    stored = {(s.module, s.op, s.stored) for s in model.explain().sites.values()}
    assert ("stem", "conv2d", "2-bit rotated, means of 4") in stored
    assert ("", "silu", "2-bit dithered") in stored
    assert ("norm", "batch_norm", "2-bit rotated") in stored


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(TypeError, match="a plan chooses widths of bucket quantizers"):
        QuantBackwardWrapper(module(), Int8ActPerTensorFloat, plan={"*": 2})
    model = wrapped({"*": 2})
    with pytest.raises(TypeError, match="a plan says the bit widths"):
        model.configure(bit_width=8)
    model.configure(bucket_size=64)
    model.use_plan(None)
    model.configure(bit_width=8)


def test_default_candidates_are_those_that_the_quantizer_can_have() -> None:
    """Signed codes have no width of 1 bit."""
    def plan(**settings: Any) -> BitPlan:
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
        return plan_bit_widths(
            net, torch.randn(256, 64), lambda model, x: model(x).sum(), budget="50%",
            act_quant=Int4DynamicActPerBucketFloatStochastic, **settings)

    assert all("2" in t.options and "1" not in t.options for t in plan().tensors)
    with pytest.raises(ValueError, match="bit_width >= 2"):
        plan(candidates=[1, 2])


def test_a_plan_with_a_width_that_the_quantizer_cannot_have_is_refused_when_it_is_set() -> None:
    signed: Any = Int4DynamicActPerBucketFloatStochastic
    with pytest.raises(ValueError, match="bit_width >= 2"):
        QuantBackwardWrapper(module(), signed, plan={"*": 1})
    model = QuantBackwardWrapper(module(), signed)
    with pytest.raises(ValueError, match="bit_width >= 2"):
        model.use_plan({"*": 1})
    model.use_plan({"*": 2})
