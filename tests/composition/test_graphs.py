"""Gradient accumulation, several losses, partial backwards, hooks of users, other tools.

For repeated backwards see tests/backward/test_repeated_backward.py.
"""


import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import ModifiedInPlaceError, QuantBackwardWrapper
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import Apply, assert_same, cotangent
from tests.backward.test_unbiased import rounding_variance, z_bound
from tests.composition.support import DRAWS, POLICIES, X, both, grads, mlp

# Accumulation


def accumulate(model: nn.Module) -> None:
    for part in X.split(16):
        (model(part).square().mean() / 4).backward()


def test_micro_batches_accumulate_to_plain_autograds_bits() -> None:
    (_, plain), (_, ours) = both(accumulate)
    assert_same(ours, plain)


@pytest.mark.parametrize(("noise", "unbiased"), [("own", True), ("repeated", False)])
def test_micro_batches_have_independent_noise(noise: str, unbiased: bool) -> None:
    # The variance of a sum is the sum of variances only if draws are independent. The test accumulates
    # one batch eight times; the control repeats the noise of the first draw.
    layer, parts = nn.Linear(64, 16, bias=False), 8
    x = torch.rand(16, 64, generator=torch.Generator().manual_seed(2))
    delta = cotangent(layer(x)).detach()
    variance = parts * (delta.double().square().t() @ rounding_variance(x, 3, 64))
    model = QuantBackwardWrapper(layer, Stochastic2, bucket_size=64, seed=0)
    squares = []
    for _ in range(DRAWS):
        layer.weight.grad = None
        state = model.noise_state()
        for _ in range(parts):
            if noise == "repeated":
                model.set_noise_state(state)
            model(x).backward(delta)
        assert layer.weight.grad is not None
        error = layer.weight.grad.double() - parts * (delta.double().t() @ x.double())
        squares.append((error.square() / variance).mean())
    # A chi-square of many degrees, divided by their number. Its deviation is below sqrt(2 / DRAWS), even
    # if all entries draw alike. Repeated noise has eight times the variance.
    close = abs(torch.stack(squares).mean() - 1) <= z_bound(1) * (2 / DRAWS)**0.5
    assert bool(close) == unbiased


# Several losses, partial backward


class TwoHeads(nn.Module):
    """A shared body and two heads with outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.body(x))
        return self.first(hidden).tanh(), self.second(hidden).sigmoid()


def heads(policy: str | None) -> nn.Module:
    torch.manual_seed(0)
    module = TwoHeads()
    return module if policy is None else QuantBackwardWrapper(module, policy=policy, seed=0)


def separately(model: nn.Module) -> dict[str, Tensor]:
    first, second = model(X)
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    return grads(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_losses_of_one_forward_may_be_taken_one_by_one(policy: str) -> None:
    ours = separately(heads(policy))
    if policy == "exact":
        assert_same(ours, separately(heads(None)))
    # The payload that both share decodes to the same values each time, so repeating gives equal bits.
    assert_same(ours, separately(heads(policy)))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_of_two_outputs_may_get_no_backward(policy: str) -> None:
    results = []
    for model in (heads(None), heads(policy)):
        first, _ = model(X)
        first.sum().backward()
        results.append(grads(model))
    assert results[0].keys() == results[1].keys() == {
        "body.weight", "body.bias", "first.weight", "first.bias"}
    if policy == "exact":
        assert_same(results[1], results[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_to_chosen_inputs_alone(policy: str) -> None:
    (_, plain), (_, ours) = both(
        lambda m: m(X).square().sum().backward(inputs=[m.get_parameter("3.bias")]), policy)
    assert ours.keys() == {"3.bias"}
    assert_same(ours, plain)  # no quantized tensor is on the path


@pytest.mark.parametrize("policy", POLICIES)
def test_unused_inputs_are_told(policy: str) -> None:
    def unused(model: nn.Module) -> list[Tensor | None]:
        other, x = torch.ones(3, requires_grad=True), X.clone().requires_grad_()
        y = model(x).sum()
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(y, [x, other], retain_graph=True)
        return list(torch.autograd.grad(y, [x, other], allow_unused=True))

    (plain, _), (ours, _) = both(unused, policy)
    assert plain[1] is ours[1] is None
    assert ours[0].isfinite().all()
    assert policy != "exact" or torch.equal(ours[0], plain[0])


# Hooks of the user


def hooked(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Registers every kind of hook, some of which change tensors or gradients."""
    log: list[tuple[str, Tensor]] = []
    first, gelu, last = (model.get_submodule(n) for n in ("0", "1", "3"))
    gelu.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    gelu.register_forward_hook(lambda m, args, output: output / 2)  # pyright: ignore
    gelu.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 3,))
    gelu.register_full_backward_hook(lambda m, gi, go: log.append(("gelu", gi[0])))
    last.register_full_backward_hook(lambda m, gi, go: (gi[0] / 3,))
    model.register_full_backward_hook(lambda m, gi, go: log.append(("model", go[0])))
    last.get_parameter("bias").register_hook(lambda g: g.clamp(-1, 1))
    first.get_parameter("weight").register_post_accumulate_grad_hook(
        lambda p: log.append(("accumulated", p.grad.clone())))  # pyright: ignore
    x = X.clone().requires_grad_()
    y = model(x)
    y.register_hook(lambda g: g * 2)
    node = y.grad_fn
    assert node is not None
    node.register_prehook(lambda grads: log.append(("node", grads[0])))
    y.square().sum().backward()
    assert x.grad is not None
    return [*log, ("input", x.grad)]


@pytest.mark.parametrize("policy", POLICIES)
def test_hooks_on_tensors_nodes_and_modules(policy: str) -> None:
    (plain, plain_grads), (ours, our_grads) = both(hooked, policy)
    assert [name for name, _ in ours] == [name for name, _ in plain]
    assert {name for name, _ in ours} == {"gelu", "model", "accumulated", "node", "input"}
    assert our_grads["3.bias"].abs().max() <= 1
    if policy == "exact":
        assert_same(dict(ours), dict(plain))
        assert_same(our_grads, plain_grads)


@pytest.mark.parametrize("policy", POLICIES)
def test_optimizer_in_backward_and_clipping(policy: str) -> None:
    def train(model: nn.Module) -> dict[str, Tensor]:
        optimizers = {p: torch.optim.SGD([p], lr=0.01, momentum=0.9) for p in model.parameters()}

        def step(p: Tensor) -> None:
            torch.nn.utils.clip_grad_value_(p, 0.5)
            optimizers[p].step()  # pyright: ignore[reportArgumentType]
            optimizers[p].zero_grad()  # pyright: ignore[reportArgumentType]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(X).square().mean().backward()
            assert all(p.grad is None for p in model.parameters())
        return {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}

    (plain, _), (ours, _) = both(train, policy)
    assert all(p.isfinite().all() for p in ours.values())
    if policy == "exact":
        assert_same(ours, plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_lbfgs_calls_its_closure_many_times(policy: str) -> None:
    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        losses: list[float] = []

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            losses.append(loss.item())
            return losses[-1]

        optimizer.step(closure)
        return losses

    (plain, _), (ours, _) = both(train, policy)
    assert len(ours) > 2
    assert ours[-1] < ours[0]
    if policy == "exact":
        assert ours == plain


@pytest.mark.parametrize("policy", POLICIES)
def test_global_norm_of_gradients_is_clipped(policy: str) -> None:
    def train(model: nn.Module) -> Tensor:
        model(X).exp().sum().backward()
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    (plain, _), (norm, ours) = both(train, policy)
    assert norm > 1
    assert torch.stack([g.norm() for g in ours.values()]).norm() <= 1 + 1e-5  # sums in float32
    assert policy != "exact" or torch.equal(norm, plain)


# Other tools that use saved tensors


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("policy", POLICIES)
def test_anomaly_mode_finds_the_operation(policy: str) -> None:
    def root_of_zero(x: Tensor) -> Tensor:
        return (x * 0).sqrt() * 0  # the line that the message must quote

    model, x = QuantBackwardWrapper(Apply(root_of_zero), policy=policy), X.clone().requires_grad_()
    model(x).sum().backward()  # the control: no error is raised
    assert x.grad is not None
    assert x.grad.isnan().all()
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="must quote"), \
            pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan values"):
        model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("policy", POLICIES)
def test_anomaly_mode_changes_no_gradient(policy: str) -> None:
    (_, plain), (_, ours) = both(accumulate, policy)
    with torch.autograd.set_detect_anomaly(True):
        (_, plain_checked), (_, ours_checked) = both(accumulate, policy)
    assert_same(plain_checked, plain)
    assert_same(ours_checked, ours)


@pytest.mark.parametrize("policy", POLICIES)
def test_save_on_cpu_outside_of_the_wrapper_takes_the_rest(policy: str) -> None:
    def train(model: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            model(X).exp().sum().backward()

    (_, plain), (_, ours) = both(train, policy)
    assert policy != "exact" or not assert_same(ours, plain)
    assert ours["3.bias"].equal(plain["3.bias"])


@pytest.mark.parametrize("policy", POLICIES)
def test_hooks_that_are_disabled_are_reported_with_the_users_reason(policy: str) -> None:
    model = QuantBackwardWrapper(mlp(), policy=policy)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks in this house"), pytest.raises(
            RuntimeError, match=r"hooks are disabled here.*no hooks in this house"):
        model(X)
    assert model(X).requires_grad


def test_mutation_of_saved_tensors_is_refused_where_they_are_kept() -> None:
    def mutate(module: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            y = x * 2
            z = module(y)
            y.zero_()
            z.sum().backward()
        assert x.grad is not None
        return x.grad

    module = Apply(torch.sin)
    torch.testing.assert_close(mutate(module), 2 * (2 * X).cos())
    with pytest.raises(ModifiedInPlaceError, match="saved by sin"):
        mutate(QuantBackwardWrapper(module, policy="exact"))
    # Codes are a copy: the error is one of 255 steps of derivatives between -1 and 1, times two.
    model = QuantBackwardWrapper(module, Stochastic2, bit_width=8)
    assert (mutate(model) - 2 * (2 * X).cos()).abs().max() <= 2 * 2 / 255
