"""Bias and noise of gradients match direct computation and closed forms; the model keeps no trace."""

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp.allocate import GradientErrorRow, gradient_error, measure_gradient_error
from brevitas_bp.format.random import derive
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import Apply, cotangent, net, run
from tests.backward.test_unbiased import rounding_variance
from tests.stats import normal

DRAWS = 6
# The sums have at most a few thousand float64 terms; their order differs, and a subtraction follows.
CLOSE = {"rel": 1e-9, "abs": 1e-12}


def simple_loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y * cotangent(y)).sum()


def wrapped_net(name: str, **options: Any) -> tuple[QuantBackwardWrapper, Tensor]:
    module, (x,) = net(name)
    return QuantBackwardWrapper(module, seed=3, bucket_size=64, **options), x


def gradients_by_hand(model: QuantBackwardWrapper, x: Tensor, draws: int) -> dict[str, Tensor]:
    """Returns all gradients as a plain stack: [1 + draws, elements], the exact gradient first."""
    model.set_noise_state({"base": derive(0, 0), "position": 0})
    state, rows = torch.get_rng_state(), []
    for network in [model.module] + [model] * draws:
        torch.set_rng_state(state)
        model.zero_grad()
        simple_loss(network, x).backward()
        rows.append({
            name: torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone()
            for name, p in model.module.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}


def check_row(row: GradientErrorRow, gradients: Tensor) -> None:
    """Checks a row against the definitions, on a stack of gradients."""
    exact, draws = gradients[0], gradients[1:]
    size, mean, n = exact.norm(), draws.mean(0), len(draws)
    variance = draws.var(0, unbiased=True).sum()
    offset = (mean - exact).square().sum() - variance / n
    assert row.elements == len(exact)
    assert row.size == pytest.approx(float(size), **CLOSE)
    assert row.variance == pytest.approx(float(variance), **CLOSE)
    assert row.offset == pytest.approx(float(offset), **CLOSE)
    if row.negligible:
        assert math.isnan(row.bias) and math.isnan(row.noise) and math.isnan(row.cosine)
        return
    assert row.noise == pytest.approx(float(variance.sqrt() / size), **CLOSE)
    # A square root near zero magnifies the rounding error of the difference above.
    assert row.bias == pytest.approx(float(offset.clamp_min(0).sqrt() / size), rel=1e-6, abs=1e-6)
    assert row.signal == pytest.approx(float(mean @ exact / size**2), **CLOSE)
    cosines = (draws @ exact) / draws.norm(dim=1) / size
    assert row.cosine == pytest.approx(float(cosines.mean()), **CLOSE)


@pytest.mark.parametrize("name", ["conv", "encoder", "shared"])
@pytest.mark.parametrize("policy", ["op_aware", "all"])
def test_rows_are_the_moments_of_a_list_of_gradients(name: str, policy: str) -> None:
    model, x = wrapped_net(name, policy=policy)
    error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=DRAWS)
    lists = gradients_by_hand(model, x, DRAWS)
    assert [row.name for row in error.parameters] == list(lists)
    for row in error.parameters:
        check_row(row, lists[row.name])
    for row in error.modules:
        parts = [g for name, g in lists.items() if name.rpartition(".")[0] == row.name]
        check_row(row, torch.cat(parts, dim=1))
    check_row(error.total, torch.cat(list(lists.values()), dim=1))
    assert error.total.noise > 0.01


# Closed forms.


def test_variance_of_a_linear_layer_and_no_bias_but_chance() -> None:
    torch.manual_seed(0)
    module, x, draws = nn.Linear(1024, 4, bias=False), torch.randn(16, 1024), 16
    delta = cotangent(module(x)).double()
    # Gradients of different inputs are independent. Sum all variances, input by input:
    variances = (delta.square().sum(1)[:, None] * rounding_variance(x, 3, 64)).sum(0)
    model = QuantBackwardWrapper(
        module, Stochastic2, bucket_size=64)
    error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=draws)
    row = error.total
    predicted = float(variances.sum())
    # A squared length of Gaussians has the variance 2 tr(C^2) <= 2 sum_d V_d^2.
    spread = normal() * math.sqrt(2 * float(variances.square().sum()))
    assert abs(row.variance - predicted) <= spread / math.sqrt(draws - 1)
    assert abs(row.offset) <= spread / draws
    # The control: the distance of the mean itself is due to chance, and far above this tolerance.
    assert row.offset + row.variance / draws > 2 * spread / draws


def test_rounding_to_nearest_is_all_bias_and_no_noise() -> None:
    model, x = wrapped_net("shared", act_quant=Nearest2, policy="all")
    error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=3)
    for row in error.parameters:
        exact, rounded = (
            dict(run(m, x).grads)[row.name].double() for m in (model.module, model))
        assert row.noise == 0
        expected = (rounded - exact).norm() / exact.norm()
        assert row.bias == pytest.approx(float(expected), rel=1e-6)
        assert row.bias > 0.01


def test_exact_policy_has_no_error_with_dropout_and_batch_norm() -> None:
    model, x = wrapped_net("conv", policy="exact")
    model.train()
    error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=2)
    compared = [row for row in error.parameters if not row.negligible]
    assert {(row.bias, row.noise, row.signal) for row in compared} == {(0.0, 0.0, 1.0)}
    assert error.total.cosine == pytest.approx(1, abs=1e-12)
    # The control: if each draw had another mask, nothing would be zero.
    grads = [run(model, x, seed=seed).grads["13.weight"] for seed in (1, 2)]
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


def test_gradient_of_zero_is_marked() -> None:
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    module[2].unused = nn.Parameter(torch.ones(3))
    x = torch.randn(8, 3, 16, 16)
    error = measure_gradient_error(
        QuantBackwardWrapper(module), lambda m: simple_loss(m, x), draws=2)
    rows = {row.name: row for row in error.parameters}
    assert {name for name, row in rows.items() if row.negligible} == {"0.bias", "2.unused"}
    assert rows["0.bias"].variance**0.5 / rows["0.bias"].size > 100  # the quotient would mislead
    assert error.largest("noise") == max(
        row.noise for row in error.parameters if not row.negligible)
    assert error.total.variance == pytest.approx(sum(row.variance for row in rows.values()))


# The model is unchanged afterwards.


class Same:
    """Compares equal to one object only. Holds that object, so that its address is not reused."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.kept is other.kept

    __hash__ = None  # type: ignore[assignment]


def trace(model: QuantBackwardWrapper) -> dict[str, Any]:
    """Returns everything that a measurement might leave behind."""
    codec: Any = model._codec
    return {
        "generator": torch.get_rng_state().tolist(), "noise": model.noise_state(),
        "buffers": {name: b.tolist() for name, b in model.named_buffers()},
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist())
                  for p in model.parameters()],
        "modes": [m.training for m in model.modules()], "explanation": Same(model._explanation),
        "statistics": len(getattr(codec, "slots", [])), "policy": id(model._policy)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in before if before[key] != after[key]}


class BrokenError(Exception):
    """Raised by a run on purpose."""


def failing(at: int, x: Tensor) -> Callable[[nn.Module], Tensor]:
    """Returns a run that changes modes, and raises in call number ``at``."""
    calls = iter(range(100))

    def run_once(model: nn.Module) -> Tensor:
        model.train()
        loss = simple_loss(model, x)
        if next(calls) == at:
            raise BrokenError
        return loss

    return run_once


@pytest.mark.parametrize("quantizer", [Nearest2, Int8ActPerTensorFloat])
@pytest.mark.parametrize("started", [False, True])
def test_measuring_leaves_no_trace(quantizer: Any, started: bool) -> None:
    module, (x,) = net("conv")
    module[1].eval()
    model = QuantBackwardWrapper(module, quantizer, seed=2)
    if started:
        simple_loss(model, x).backward()
    before = trace(model)
    for at in (0, 2):  # in the exact run, and in a draw
        with pytest.raises(BrokenError):
            measure_gradient_error(model, failing(at, x), draws=3)
        assert changed(before, trace(model)) == set()
    measure_gradient_error(model, failing(100, x), draws=3)
    assert changed(before, trace(model)) == set()
    # The control: the same steps by hand leave all of these traces.
    for _ in range(3):
        failing(100, x)(model).backward()
    stateful = {"statistics"} if quantizer is Int8ActPerTensorFloat and not started else set()
    assert changed(before, trace(model)) == {
        "generator", "noise", "buffers", "grads", "modes", "explanation", *stateful}


def test_buffer_that_a_graph_holds_is_not_touched() -> None:
    module = Apply(lambda x, w: x * w * module.mask, nn.Parameter(torch.ones(8)))
    module.register_buffer("mask", torch.ones(8))
    model = QuantBackwardWrapper(module)
    x = torch.randn(4, 8)
    loss = simple_loss(model, x)
    measure_gradient_error(model, lambda m: simple_loss(m, x), draws=2)
    loss.backward()  # would raise if a buffer had been overwritten
    assert module.weights[0].grad is not None


class Replaced(nn.Module):
    """Scales by a buffer and replaces the buffer object, as many running averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 2
        return self.layer(x) * self.scale


def test_every_draw_starts_from_the_same_buffers() -> None:
    model, x = QuantBackwardWrapper(Replaced()), torch.randn(4, 8)
    scale = model.module.scale
    measure_gradient_error(model, lambda m: simple_loss(m, x), draws=3)
    assert model.module.scale is scale
    assert scale.item() == 1


def test_what_is_random_elsewhere_is_noticed() -> None:
    model, x = wrapped_net("shared")
    random.seed(0)
    with pytest.raises(ValueError, match=r"same loss at every call, got .* outside of run"):
        measure_gradient_error(
            model, lambda m: simple_loss(m, x + random.random()), draws=2)


def test_seed_decides_and_the_wrappers_own_does_not() -> None:
    model, x = wrapped_net("conv")
    other = QuantBackwardWrapper(model.module, seed=99, bucket_size=64)
    first, same, new = (
        measure_gradient_error(m, lambda m: simple_loss(m, x), draws=2, seed=seed).to_dict()
        for m, seed in ((model, 5), (other, 5), (model, 6)))
    assert first == same
    assert first != new


# Kinds of networks.


def test_wrappers_inside_have_no_name_and_are_exact_in_turn() -> None:
    module, (x,) = net("encoder")
    inside = copy.deepcopy(module)
    inside.mlp = QuantBackwardWrapper(
        nn.Sequential(*inside.mlp[:3], QuantBackwardWrapper(inside.mlp[3])))
    inside.norm.weight.requires_grad_(False)
    for model in (inside, QuantBackwardWrapper(inside)):
        torch.manual_seed(0)  # of the dropout in the plain run below
        error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=2)
        assert [row.name for row in error.parameters] == [
            name for name, _ in module.named_parameters() if name != "norm.weight"]
        size = {row.name: row.size for row in error.parameters}["mlp.3.weight"]
        plain = run(module, x).grads["mlp.3.weight"]
        assert size == pytest.approx(float(plain.double().norm()), **CLOSE)


def test_without_gradients_enabled() -> None:
    model, x = wrapped_net("shared")
    with torch.no_grad():
        error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=2)
        assert not torch.is_grad_enabled()
    assert error.total.noise > 0


def test_sparse_and_complex_gradients() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 64, sparse=True)
            self.phase = nn.Parameter(torch.randn(64, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.embedding(x).square() * self.phase).abs()

    torch.manual_seed(0)
    x = torch.arange(8)
    error = measure_gradient_error(
        QuantBackwardWrapper(Both()), lambda m: simple_loss(m, x), draws=2)
    assert [row.elements for row in error.parameters] == [128, 640]
    assert all(row.size > 0 for row in error.parameters)


@pytest.mark.parametrize("bits", [None, 2])
def test_checkpointed_parts(bits: int | None) -> None:
    module, (x,) = net("encoder")
    whole = Apply(lambda x: checkpoint(module, x * 1, use_reentrant=False))
    whole.part = module
    policy = OpAware(checkpoint_quant=None if bits is None else Nearest2)
    x = x.requires_grad_()
    error = measure_gradient_error(
        QuantBackwardWrapper(whole, policy=policy), lambda m: simple_loss(m, x), draws=2)
    assert (error.median("bias") > 0.01) == (bits is not None)


@pytest.mark.parametrize("stem", [False, True])
def test_parameters_that_reentrant_checkpoints_hide_are_noticed(stem: bool) -> None:
    part = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    whole = Apply(
        lambda x, w: checkpoint(part, x * w if stem else x, use_reentrant=True) * w,
        nn.Parameter(torch.ones(32)))
    whole.part = part
    x = torch.randn(4, 32).requires_grad_()
    if not stem:  # the control: half of the gradients are missing, without an error
        (hidden,) = torch.autograd.grad(whole(x).sum(), part[0].weight, materialize_grads=True)
        assert not hidden.any()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        measure_gradient_error(QuantBackwardWrapper(whole), lambda m: simple_loss(m, x))


# Several batches.


def batches() -> Any:
    """Yields batches lazily, while the measurement runs."""
    return (torch.randn(8, 32) for _ in range(3))


def test_batches_by_hand() -> None:
    model, _ = wrapped_net("shared")
    torch.manual_seed(1)
    drawn = list(batches())
    error = measure_gradient_error(model, simple_loss, draws=DRAWS, batches=drawn)
    model.set_noise_state({"base": derive(0, 0), "position": 0})
    exact, rounded = [], []
    for x in drawn:
        for network, kept in [(model.module, exact)] + [(model, rounded)] * DRAWS:
            model.zero_grad()
            simple_loss(network, x).backward()
            kept.append(model.module.body.weight.grad.flatten().double())
    g, all_exact = torch.stack(exact).mean(0), torch.stack(exact)
    grouped = torch.stack(rounded).view(3, DRAWS, -1)
    variance = float(grouped.var(1, unbiased=True).sum(1).mean())
    offset = float((grouped.mean((0, 1)) - g).square().sum()) - variance / (3 * DRAWS)
    row = next(row for row in error.parameters if row.name == "body.weight")
    assert (error.batches, error.draws) == (3, DRAWS)
    assert row.size == pytest.approx(float(g.norm()), **CLOSE)
    assert row.variance == pytest.approx(variance, **CLOSE)
    assert row.offset == pytest.approx(offset, **CLOSE)
    sampling = float(all_exact.var(0, unbiased=True).sum())
    assert row.sampling_variance == pytest.approx(sampling, **CLOSE)
    assert row.sampling_noise == pytest.approx(sampling**0.5 / float(g.norm()), **CLOSE)


def test_batches_that_are_drawn_meanwhile_are_those_drawn_before(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = wrapped_net("shared")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    meanwhile = measure_gradient_error(model, simple_loss, draws=2, batches=batches()).to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    drawn = list(batches())
    assert measure_gradient_error(model, simple_loss, draws=2, batches=drawn).to_dict() == meanwhile
    torch.set_rng_state(state)
    monkeypatch.setattr(gradient_error, "apart", lambda items: items)
    with_draws_between = measure_gradient_error(model, simple_loss, draws=2, batches=batches())
    assert with_draws_between.to_dict() != meanwhile


# Printed tables, and refused arguments.


def test_table_and_json() -> None:
    model, x = wrapped_net("conv")
    error = measure_gradient_error(model, lambda m: simple_loss(m, x), draws=2, progress=True)
    values = json.loads(json.dumps(error.to_dict(), allow_nan=False))
    assert values["total"]["noise"] == error.total.noise
    marked = next(row for row in values["parameters"] if row["negligible"])
    assert marked["noise"] is None
    for by, rows in (("module", error.modules), ("parameter", error.parameters)):
        lines = error.table(by).splitlines()  # type: ignore[arg-type]
        assert [line.split()[0] for line in lines[2:2 + len(rows)]] == [row.name for row in rows]
        assert lines[3 + len(rows)].startswith("total")
    assert str(error) == error.table("module")
    assert f"largest {error.largest('noise'):.4f}" in str(error)


class Replicated(DistributedDataParallel):
    """A replica for one process, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = QuantBackwardWrapper(module)


@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"model": nn.Linear(2, 2)}, TypeError, "contain one, got Linear"),
    ({"model": nn.Sequential(Replicated(nn.Linear(2, 2)))}, TypeError, "the module that it wraps"),
    ({"draws": 1}, ValueError, "draws must be at least 2"),
    ({"run": lambda m, x=None: m(torch.ones(2, 64))}, ValueError, r"got shape \(2, 4\)"),
    ({"run": lambda m, x=None: 3.0}, ValueError, "got float"),
    ({"run": lambda m, x=None: m(torch.ones(2, 64)).sum().detach()}, ValueError, "depends on"),
    ({"run": lambda m, x=None: m(torch.ones(2, 64)).sum() * torch.inf}, ValueError, "NaN or Inf"),
    ({"batches": [1]}, ValueError, "batches must yield at least 2"),
    ({"batches": []}, ValueError, "batches must yield at least 2"),
    ({"model": QuantBackwardWrapper(nn.Flatten())}, ValueError, "no parameter of")])
def test_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {
        "model": QuantBackwardWrapper(nn.Linear(64, 4)), "draws": 2,
        "run": lambda m, x=None: m(torch.ones(2, 64)).sum(), **options}
    model, once = arguments.pop("model"), arguments.pop("run")
    with pytest.raises(kind, match=message):
        measure_gradient_error(model, once, **arguments)
