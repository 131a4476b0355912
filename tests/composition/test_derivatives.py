"""Higher derivatives, torch.func, forward mode: right, or refused with a way out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from brevitas_bp import QuantBackwardWrapper, SecondDerivativeError
from tests.backward.support import Apply, assert_same, naive_hooks, run
from tests.composition.support import POLICIES, X, both, grads, mlp

# Higher order


def critic(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 16, 3, stride=2), activation, nn.Flatten(),
        nn.Linear(16 * 36, 1))


def wgan_gp(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The critic's loss of Gulrajani et al., 2017: it pulls slopes between real and fake to one."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 8, 3, 16, 16, generator=generator, dtype=dtype)
    between = real.lerp(fake, torch.rand(8, 1, 1, 1, generator=generator, dtype=dtype))
    between.requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    (model(fake).mean() - model(real).mean() + 10 * penalty).backward()
    return grads(model)


def r1(model: nn.Module) -> dict[str, Tensor]:
    """The penalty of Mescheder et al., 2018: squared slope at real images."""
    real = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(model(real).sum(), real, create_graph=True)
    slope.square().sum().backward()
    return grads(model)


@pytest.mark.parametrize("penalty", [wgan_gp, r1])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(0.2)], ids=["silu", "leaky"])
def test_gradient_penalties_are_plain_under_the_exact_policy(
        activation: nn.Module, penalty: Any) -> None:
    module = critic(activation)
    plain = penalty(copy.deepcopy(module))
    assert_same(penalty(QuantBackwardWrapper(module, policy="exact")), plain)


def test_slope_penalty_of_a_piecewise_linear_critic_is_exact_by_default() -> None:
    # Masks and weights are exact, and the slope depends on nothing else.
    module = critic(nn.LeakyReLU(0.2))
    plain = r1(copy.deepcopy(module))
    with naive_hooks():
        naive = r1(copy.deepcopy(module))
    assert not torch.equal(naive["0.weight"], plain["0.weight"])  # the control
    assert_same(r1(QuantBackwardWrapper(module)), plain)


@pytest.mark.parametrize("penalty", [wgan_gp, r1])
def test_slope_penalty_of_a_smooth_critic_says_what_to_do(penalty: Any) -> None:
    module = critic(nn.SiLU())
    plain = penalty(copy.deepcopy(module))
    with pytest.raises(SecondDerivativeError, match=r"silu.*policy='exact'.*override of None"):
        penalty(QuantBackwardWrapper(copy.deepcopy(module)))
    remedy = QuantBackwardWrapper(module, overrides={"*": None})
    assert_same(penalty(remedy), plain)


class Gan(nn.Module):
    """Generator and critic in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Conv2d(3, 3, 3, padding=1), critic(nn.SiLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fake = F.silu(self.generator(x))
        return fake, self.critic(fake)


def test_override_of_the_critic_inside_one_wrapper() -> None:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def penalty(model: nn.Module) -> dict[str, Tensor]:
        fake, score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), fake, create_graph=True)
        slope.square().sum().backward()
        return {name: g for name, g in grads(model).items() if name.startswith("critic")}

    gan = Gan()
    plain = penalty(copy.deepcopy(gan))
    with pytest.raises(SecondDerivativeError, match="silu"):
        penalty(QuantBackwardWrapper(copy.deepcopy(gan)))
    model = QuantBackwardWrapper(gan, overrides={"critic": None})
    assert_same(penalty(model), plain)
    assert any("rotated" in site.stored for site in model.explain().sites.values())


def attention_by_formula(x: Tensor) -> Tensor:
    # Attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x[None], x[None], x[None])


@pytest.mark.parametrize("function", [
    lambda x: x.exp() * torch.linspace(0, 1, 3, dtype=x.dtype), lambda x: F.silu(x).softmax(-1),
    attention_by_formula,
    lambda x: F.layer_norm(x, (3,)).square()])
def test_second_derivatives_by_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    model = QuantBackwardWrapper(Apply(function), policy="exact")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


class Force(nn.Module):
    """The output is the gradient of an energy, as in molecular models: backward runs in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        (force,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return force


def test_backward_inside_of_forward() -> None:
    torch.manual_seed(0)
    module = Force()
    plain = run(module, X)
    ours = run(QuantBackwardWrapper(copy.deepcopy(module), policy="exact"), X, copied=False)
    assert torch.equal(ours.output, plain.output)
    assert_same(ours.grads, plain.grads)
    with pytest.raises(SecondDerivativeError, match="tanh"):
        run(QuantBackwardWrapper(copy.deepcopy(module)), X, copied=False)
    # The part that is differentiated twice is exact. The rest of the model stays quantized.
    exact = QuantBackwardWrapper(module, overrides={"net": None})
    assert_same(run(exact, X, copied=False).grads, plain.grads)


# torch.func, torch.autograd.functional, forward mode


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda f: torch.func.vmap(f)(X),
    "jvp": lambda f: torch.stack(torch.func.jvp(f, (X,), (X.cos(),))),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X[0]),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "forward mode": lambda f: _forward_mode(f),
}
REFUSED: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: torch.func.vjp(f, X)[1](torch.ones(64, 8))[0],
    "jacrev": lambda f: torch.func.jacrev(f)(X[0]),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(X[0]),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(X),
}
TWICE: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "hessian": lambda f: torch.autograd.functional.hessian(lambda x: f(x).sum(), X[:4]),
    "hvp": lambda f: torch.autograd.functional.hvp(lambda x: f(x).square().sum(), X, X)[1],
    "jvp": lambda f: torch.autograd.functional.jvp(f, X, X)[1],
}


def _forward_mode(function: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(X, X.cos()))
        tangent = forward_ad.unpack_dual(dual).tangent
        assert tangent is not None
        return tangent.clone()


# Forward mode of GELU and layer norm is TorchScript inside of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_that_save_nothing_work(name: str, policy: str) -> None:
    module = mlp()
    expected = TRANSFORMS[name](module)
    assert torch.equal(TRANSFORMS[name](QuantBackwardWrapper(module, policy=policy)), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_zero_tangents_have_no_memory() -> None:
    # The control of the test above: a kernel cannot read what forward mode saves.
    seen: list[bool] = []
    with saved_tensors_hooks(lambda x: (seen.append(x._is_zerotensor()), x)[1], lambda x: x):
        _forward_mode(mlp())
    assert any(seen)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", REFUSED)
def test_transforms_that_need_their_own_autograd_are_refused_with_a_way_out(
        name: str, policy: str) -> None:
    model = QuantBackwardWrapper(mlp(), policy=policy)
    with pytest.raises(RuntimeError, match=r"hooks are disabled here.*wrapper\.module"):
        REFUSED[name](model)
    assert REFUSED[name](model.module).isfinite().all()


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_of_autograd_functional(name: str) -> None:
    module = mlp()
    expected = TWICE[name](module)
    assert torch.equal(TWICE[name](QuantBackwardWrapper(module, policy="exact")), expected)
    with pytest.raises(SecondDerivativeError, match="gelu"):
        TWICE[name](QuantBackwardWrapper(module))


@pytest.mark.parametrize("policy", POLICIES)
def test_jacobians_and_batched_cotangents(policy: str) -> None:
    def rows(model: nn.Module) -> list[Tensor]:
        y = model(X[:4])
        weights = torch.eye(8).unsqueeze(1).expand(8, 4, 8)
        parameters = list(model.parameters())
        return [
            torch.autograd.functional.jacobian(model, X[0]),
            *torch.autograd.grad(y, parameters, weights, is_grads_batched=True)]

    (plain, _), (ours, _) = both(rows, policy)
    assert [g.shape for g in ours] == [g.shape for g in plain]
    assert all(g.isfinite().all() for g in ours)
    if policy == "exact":
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))


@pytest.mark.parametrize("policy", POLICIES)
def test_functional_call_by_the_names_of_the_wrapper(policy: str) -> None:
    module = mlp()
    given = {name: torch.zeros_like(p).requires_grad_() for name, p in module.named_parameters()}
    model = QuantBackwardWrapper(module, policy=policy)
    y = torch.func.functional_call(model, {f"module.{n}": p for n, p in given.items()}, X)
    assert torch.equal(y, torch.zeros(64, 8))
    y.sum().backward()
    assert torch.equal(given["3.bias"].grad, torch.full((8,), 64.0))  # pyright: ignore
