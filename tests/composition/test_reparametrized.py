"""Weights that are computed, tied, frozen or adapted.

A computed weight (weight norm, spectral norm, ...) is not a parameter, but a layer saves it as its
weight. Backward multiplies every gradient by it. So the default policy keeps it, and the gradient of the
layer's input stays exact. Tensors that the computation itself saves are treated operation by operation.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import cotangent, run, wrapped_run
from tests.backward.test_unbiased import rounding_variance, z_bound
from tests.composition.support import (
    DRAWS,
    POLICIES,
    X,
    assert_default_policy_trains,
    assert_exact_policy_is_plain,
    mean_grad,
    naive_differs,
    saved_ratio,
)


class Symmetric(nn.Module):
    """A parametrization as users write it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Scaled(nn.Module):
    """A product of two parameters and a function of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(64, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh() * F.softplus(self.gain)


def registered(parametrization: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def register(module: nn.Module) -> nn.Module:
        parametrize.register_parametrization(module, "weight", parametrization())
        return module

    return register


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"),
    "cayley": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "old spectral_norm": nn.utils.spectral_norm,
    "symmetric": registered(Symmetric),
    "scaled": registered(Scaled),
}


def linears(way: str) -> nn.Module:
    """Returns layers that are linear in their input."""
    torch.manual_seed(0)
    return nn.Sequential(*(WAYS[way](nn.Linear(64, 64)) for _ in range(2)))


def casting(cast: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if cast else nullcontext()


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_under_both_policies(way: str, cast: bool) -> None:
    module = nn.Sequential(linears(way), nn.ReLU(), WAYS[way](nn.Linear(64, 64)))
    with casting(cast):
        assert_exact_policy_is_plain(module, X)  # with buffers: spectral norm iterates in forward
        # Three weights and their inputs are kept; the layer inputs and the mask get smaller. A layer
        # input takes three bits per element, in buckets of a row of 64. Measured: 1.085 (Householder
        # under autocast) to 2.2.
        assert_default_policy_trains(module, X, ratio=1.08)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_computed_weight_of_a_layer_is_kept(way: str, cast: bool) -> None:
    module = linears(way)
    with casting(cast):
        assert naive_differs(module, X)  # the control
        plain, ours = run(module, X), wrapped_run(module, X)
    assert torch.equal(ours.grads["input 0"], plain.grads["input 0"])
    assert torch.equal(ours.grads["0.bias"], plain.grads["0.bias"])


def test_all_is_all_but_parameters() -> None:
    # Documented: the policy "all" rounds a computed weight like any tensor that is not a parameter.
    module = linears("weight_norm")
    plain, ours = run(module, X), wrapped_run(module, X, policy="all")
    assert not torch.equal(ours.grads["input 0"], plain.grads["input 0"])
    assert torch.equal(
        wrapped_run(nn.Linear(64, 64), X, policy="all").grads["input 0"].isfinite(), X.isfinite())


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("quantizer", "unbiased"), [(Stochastic2, True), (Nearest2, False)])
def test_gradients_behind_a_computed_weight_are_unbiased(
        quantizer: type, unbiased: bool, cast: bool) -> None:
    """Weight norm: the magnitude's gradient is linear in the weight's, which is linear in the input."""
    torch.manual_seed(0)
    layer, x = parametrizations.weight_norm(nn.Linear(64, 64, bias=False)), torch.rand(64, 64)
    x = x.bfloat16().float()
    with casting(cast):
        delta = torch.rand(layer(x).shape).to(layer(x).dtype)
    name = "parametrizations.weight.original0"
    direction = F.normalize(layer.get_parameter("parametrizations.weight.original1"), dim=1)
    direction = direction.detach().double()
    of_weight = delta.double().t() @ x.double()
    exact = (of_weight * direction).sum(1, keepdim=True)
    # d magnitude_o = sum_n delta_no (x~_n . v_o), over independent elements of x~.
    variance = torch.einsum(
        "no,ni,oi->o", delta.double().square(), rounding_variance(x, 3, 64), direction.square())
    model = QuantBackwardWrapper(layer, quantizer, bucket_size=64, seed=0)
    with casting(cast):
        error = mean_grad(model, x, delta, f"module.{name}") - exact
    # In bfloat16, decoded values and the weight's gradient are rounded, by at most 2**-9 of each term.
    # In float32, sums of 64 x 64 terms are rounded, by 64 * 2**-24 of the terms.
    slack = (2 * 2**-9 if cast else 64 * 2**-24) * (of_weight * direction.abs()).sum(1, keepdim=True)
    tolerance = z_bound(64) * (variance / DRAWS).sqrt().unsqueeze(1) + slack
    assert bool((error.abs() <= tolerance).all()) == unbiased


@pytest.mark.parametrize(("quantizer", "unbiased"), [(Stochastic2, True), (Nearest2, False)])
def test_gradients_behind_a_spectral_norm_are_unbiased(quantizer: type, unbiased: bool) -> None:
    """``W / (u . W v)`` also saves ``u``, rounded to 4 bits independently of the layer's input."""
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(32, 16, bias=False), n_power_iterations=20)
    layer.eval()  # u and v stay constant
    norm: Any = layer.get_submodule("parametrizations.weight")[0]  # pyright: ignore[reportIndexIssue]
    u, v = norm._u.double(), norm._v.double()
    weight = layer.get_parameter("parametrizations.weight.original").detach().double()
    sigma, x, delta = u @ weight @ v, torch.rand(32, 32), torch.rand(32, 16)
    d, of_weight = delta.double(), delta.double().t() @ x.double()
    along = (of_weight * weight).sum() / sigma**2
    exact = of_weight / sigma - along * torch.outer(u, v)
    # Each entry is linear in x~, and has a term along * u~_i v_j with independent roundings.
    linear = torch.einsum("ni,kj->ijnk", d, torch.eye(32, dtype=torch.float64)) / sigma
    linear -= torch.einsum("i,j,no,ok->ijnk", u, v, d, weight) / sigma**2
    of_input = rounding_variance(x, 3, 64)
    of_along = (of_input * (d @ weight).square()).sum() / sigma**4
    variance = torch.einsum("ijnk,nk->ij", linear.square(), of_input) + torch.outer(
        rounding_variance(u.float(), 15, 64) * (along**2 + of_along), v.square())
    model = QuantBackwardWrapper(layer, quantizer, bucket_size=64, seed=0)
    stored = mean_grad(model, x, delta, "module.parametrizations.weight.original")
    assert ("vdot", f"4-bit {'stochastic' if unbiased else 'nearest'}") in {
        (site.op, site.stored) for site in model.explain().sites.values()}
    # Sums of 32 x 32 products in float32.
    tolerance = z_bound(512) * (variance / DRAWS).sqrt() + 32 * 2**-24 * of_weight.sum()
    assert bool(((stored - exact).abs() <= tolerance).all()) == unbiased


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("policy", POLICIES)
def test_old_weight_norm(policy: str) -> None:
    # The module cannot be deep-copied once it has run, wrapped or not, so the test makes two alike.
    def step(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.utils.weight_norm(nn.Linear(64, 64)) for _ in range(2)))
        grads = run(wrap(module), X, copied=False).grads
        return {name.removeprefix("module."): grad for name, grad in grads.items()}

    plain = step(lambda m: m)
    ours = step(lambda m: QuantBackwardWrapper(m, policy=policy))
    assert torch.equal(ours["input 0"], plain["input 0"]) == (policy != "all")
    assert torch.equal(ours["1.weight_g"], plain["1.weight_g"]) == (policy == "exact")


def test_cached_parametrizations_are_computed_once() -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(64, 64))
    module = nn.Sequential(layer, nn.ReLU(), layer)
    with parametrize.cached():
        plain = run(module, X)
    with parametrize.cached():
        ours = run(QuantBackwardWrapper(copy.deepcopy(module), policy="exact"), X, copied=False)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in plain.grads.items())


def test_parametrizations_come_and_go_under_the_wrapper() -> None:
    torch.manual_seed(0)
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    layer = model.get_submodule("0")
    for change in (
            parametrizations.weight_norm,
            lambda m: parametrize.remove_parametrizations(m, "weight")):
        change(layer)
        plain = run(model.module, X)
        assert torch.equal(run(model, X, copied=False).grads["input 0"], plain.grads["input 0"])
    with pytest.raises(TypeError, match=r"parametrize wrapper\.module"):
        parametrizations.weight_norm(QuantBackwardWrapper(nn.Linear(4, 4)))


# Tying


class Tied(nn.Module):
    """An embedding, a body, and a decoder with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(100, 64), nn.Linear(64, 64)
        self.decode = nn.Linear(64, 100, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(F.gelu(self.body(self.embed(tokens))))


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_tied_weights_inside_one_wrapper(cast: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.arange(64).view(4, 16)
    with casting(cast):
        plain = assert_exact_policy_is_plain(Tied(), tokens)
        assert len([name for name in plain.grads if "weight" in name]) == 2
        assert_default_policy_trains(Tied(), tokens, ratio=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_tied_weights_across_the_boundary_of_the_wrapper(policy: str) -> None:
    torch.manual_seed(0)
    tied, tokens = Tied(), torch.arange(64).view(4, 16)
    reference = copy.deepcopy(tied)
    tied.decode = QuantBackwardWrapper(tied.decode, policy=policy)  # pyright: ignore
    assert tied.decode.get_parameter("weight") is tied.embed.weight
    output = tied(tokens)
    output.backward(cotangent(output))
    output = reference(tokens)
    output.backward(cotangent(output))
    # The body's gradient passes through the shared weight only, which is exact. The shared weight's own
    # gradient is the sum of the decoder's, from a rounded input, and the embedding's.
    assert tied.body.weight.grad is not None
    assert torch.equal(tied.body.weight.grad, reference.body.weight.grad)  # pyright: ignore
    same = torch.equal(tied.embed.weight.grad, reference.embed.weight.grad)  # pyright: ignore
    assert same == (policy == "exact")


# Frozen weights, adapters


WIDTH, BATCH = 256, 64
FLOATS = BATCH * WIDTH * 4
CODES = BATCH * (WIDTH // 4 + 8)  # 2 bits per element; a scale and an offset per bucket of 256
MASK = BATCH * WIDTH // 8


def saved_bytes(module: nn.Module) -> tuple[int, int]:
    """Returns bytes of activations saved for an input without gradient: (plain autograd, wrapper)."""
    model = QuantBackwardWrapper(module, bucket_size=256)
    with track_saved_memory(model) as report:
        output = model(torch.randn(BATCH, WIDTH))
    assert output.requires_grad == any(p.requires_grad for p in module.parameters())
    return report.exact_bytes, report.stored_bytes


#: name -> (which of three layers train, with ReLUs between them; bytes of plain autograd; ours)
FROZEN: dict[str, tuple[tuple[bool, ...], int, int]] = {
    # An input that is stored given a mask has one byte more.
    "none": ((True, True, True), 3 * FLOATS, 3 * CODES + 2 * MASK + 2),
    # The frozen layer needs its weight, not its input. The ReLU before it needs its mask.
    "middle": ((True, False, True), 3 * FLOATS, 2 * CODES + 2 * MASK + 1),
    "backbone": ((False, False, True), FLOATS, CODES),
    "head": ((True, True, False), 3 * FLOATS, 2 * CODES + 2 * MASK + 1),
    "all": ((False, False, False), 0, 0),
}


@pytest.mark.parametrize("name", FROZEN)
def test_only_what_needs_a_gradient_is_saved(name: str) -> None:
    trains, exact, stored = FROZEN[name]
    layers = [nn.Linear(WIDTH, WIDTH).requires_grad_(train) for train in trains]
    module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    assert saved_bytes(module) == (exact, stored)
    if exact:
        assert_exact_policy_is_plain(module, torch.randn(BATCH, WIDTH))


def test_freezing_may_change_between_steps() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model = QuantBackwardWrapper(module)
    x = torch.randn(BATCH, WIDTH)
    for train in (True, False, True):
        model.get_submodule("0").requires_grad_(train)
        expected = (2 * FLOATS, 2 * CODES + MASK + 1) if train else (FLOATS, CODES)
        assert saved_bytes(module) == expected
        model.zero_grad()
        model(x).sum().backward()
        assert (module[0].weight.grad is not None) == train  # pyright: ignore


class Adapted(nn.Module):
    """A frozen layer and a trained low-rank correction: LoRA by hand."""

    def __init__(self, width: int, rank: int = 8) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.randn(width, rank) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.down), self.up)


class Merged(Adapted):
    """The adapted layer as one computed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.frozen.weight + self.up @ self.down, self.frozen.bias)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", [Adapted, Merged])
def test_adapters_of_frozen_layers(kind: type[Adapted], cast: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(kind(64), kind(64)), X
    with casting(cast):
        plain = assert_exact_policy_is_plain(module, x)
        assert "0.frozen.weight" not in plain.grads
        assert "1.down" in plain.grads
        ours = assert_default_policy_trains(module, x, ratio=1.2)
        assert naive_differs(module, x)  # the control
    # The module is linear in its input, and all weights are exact, including the sum of two.
    assert torch.equal(ours.grads["input 0"], plain.grads["input 0"])


def test_bytes_of_adapters() -> None:
    low_rank, low_codes = BATCH * 8 * 4, BATCH * 8 // 4 + 2 * 8
    assert saved_bytes(nn.Sequential(*(Adapted(WIDTH) for _ in range(3)))) == (
        3 * (FLOATS + low_rank), 3 * (CODES + low_codes))
    # A merged weight is computed, so plain autograd saves it if the input needs a gradient. So do we.
    weight = WIDTH * WIDTH * 4
    assert saved_bytes(nn.Sequential(*(Merged(WIDTH) for _ in range(3)))) == (
        3 * FLOATS + 2 * weight, 3 * CODES + 2 * weight)


def test_ratio_of_a_frozen_backbone_and_a_head() -> None:
    # Fewer tensors are saved, and each is smaller.
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    module[:3].requires_grad_(False)
    assert saved_bytes(module)[0] * 4 == saved_bytes(copy.deepcopy(module).requires_grad_())[0]
    assert saved_ratio(module[3:], torch.randn(BATCH, WIDTH), bucket_size=256) == FLOATS / CODES
