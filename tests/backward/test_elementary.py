"""Functions whose derivative has any size: unbiased gradients, an error relative to each element."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor, register_op, track_saved_memory
from brevitas_bp.activations.forms import OF_INPUT, OF_OUTPUT, of_power
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.operations import elementwise
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import listening
from brevitas_bp.private import node_number
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from tests.backward.support import Apply
from tests.stats import normal
from tests.support import same_bits

Function = Callable[[Tensor], Tensor]
COPIES, WIDTH = 8192, 64

_UNIT = torch.linspace(0.02, 0.98, WIDTH)
_WIDE = torch.exp2(torch.linspace(-40, 40, WIDTH))
#: name -> (function, inputs).
FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "log": (torch.log, _WIDE), "log2": (torch.log2, _WIDE), "log10": (torch.log10, _WIDE),
    "log1p": (torch.log1p, _UNIT - 1), "sqrt": (torch.sqrt, _WIDE), "rsqrt": (torch.rsqrt, _WIDE),
    "reciprocal": (torch.reciprocal, _WIDE), "1 / x": (lambda x: 1 / x, -_WIDE),
    "exp": (torch.exp, 10 * _UNIT), "exp2": (torch.special.exp2, 12 * _UNIT),
    "expm1": (torch.expm1, -3 * _UNIT), "2 ** x": (lambda x: 2**x, 9 * _UNIT),
    "power of a number": (lambda x: torch.pow(0.5, x), 9 * _UNIT),
    "tan": (torch.tan, 1.5 * _UNIT), "asin": (torch.asin, _UNIT), "acos": (torch.arccos, -_UNIT),
    "sinh": (torch.sinh, 9 * _UNIT), "cosh": (torch.cosh, -9 * _UNIT),
    "acosh": (torch.acosh, 1 + 9 * _UNIT), "atanh": (torch.atanh, _UNIT),
    "asinh": (torch.asinh, 9 * _UNIT),
    **{f"x ** {e}": (lambda x, e=e: x**e, _WIDE.sqrt().sqrt()) for e in (-2, -1, -0.5, 0.5, 1.5, 2.5)}}
#: Functions whose saved tensor is not their derivative, at inputs that differ by 2**80.
CURVED = ["log", "log2", "sqrt", "rsqrt", "reciprocal", "1 / x"]


class _InItsOwnUnits(OpAware):
    """The policy, except that the saved tensor is rounded itself."""

    def decide(self, saved: SavedTensor) -> Decision:
        return super().decide(saved)._replace(units=None)


def z_scores(name: str, policy: OpAware) -> Tensor:
    """Returns mean error / deviation of the mean, of the gradient of each element.

    Each element is in COPIES rows, which are rounded independently, with equal levels. An error of
    float32 arithmetic, below 1e-5 of the gradient, is left out.
    """
    function, values = FUNCTIONS[name]
    x = values.repeat(COPIES, 1).requires_grad_()
    model = QuantBackwardWrapper(Apply(function), seed=0, policy=policy)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    leaf = values.clone().requires_grad_()
    (exact,) = torch.autograd.grad(function(leaf).sum(), leaf)
    error = grad.double() / exact.double() - 1
    off = (error.mean(0).abs() - 1e-5).clamp(min=0)
    # An element next to a level is rarely rounded to the other one: do not take its deviation for zero.
    deviation = error.std(0).clamp(min=0.1 * float(error.std(0).max()))
    return off / deviation * COPIES**0.5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_unbiased(name: str) -> None:
    assert float(z_scores(name, OpAware()).max()) <= normal(WIDTH)


@pytest.mark.parametrize("name", CURVED)
def test_rounding_what_is_saved_is_not(name: str) -> None:
    """The control."""
    assert float(z_scores(name, _InItsOwnUnits()).max()) > 1.5 * normal(WIDTH)


def stored(function: Function, x: Tensor, **options: Any) -> list[tuple[str, str, int]]:
    """Returns (operation, codec, bytes) of each saved tensor."""
    found = []

    def note(saved: SavedTensor, packed: Packed, decision: Decision, originals: Any) -> None:
        found.append((saved.op or "", packed.codec.name, packed.nbytes))

    model = QuantBackwardWrapper(Apply(function), seed=0, **options)
    with listening(model, note):
        model(x.detach().requires_grad_())
    return found


def gradient(function: Function, x: Tensor, **options: Any) -> Tensor:
    model = QuantBackwardWrapper(Apply(function), seed=0, **options)
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    return torch.autograd.grad(out, leaf, torch.linspace(1, 2, out.numel()).view_as(out).to(out))[0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    function, values = FUNCTIONS[name]
    x = (values.sqrt().sqrt() if values.min() < 1e-3 else values).repeat(8, 1).to(dtype)
    state = torch.get_rng_state()
    rounded, exact = gradient(function, x), gradient(function, x, policy="exact")
    assert torch.equal(torch.get_rng_state(), state)
    assert rounded.dtype == dtype
    finite = exact.isfinite()
    # Neighbouring levels differ by at most 2**(61 / 124), for x ** -2.
    assert bool(((rounded - exact)[finite].abs() <= 0.45 * exact[finite].abs() + 1e-3).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_forward_is_plain_autograds(name: str) -> None:
    function, values = FUNCTIONS[name]
    x = values.repeat(8, 1)
    assert torch.equal(QuantBackwardWrapper(Apply(function), seed=0)(x), function(x))


@pytest.mark.parametrize("x", [torch.tensor(0.5), torch.ones(0), torch.ones(3, 0, 2), torch.rand(5)],
                         ids=lambda x: str(list(x.shape)))
def test_small_tensors_are_exact(x: Tensor) -> None:
    for function, _ in FUNCTIONS.values():
        assert same_bits(gradient(function, x), gradient(function, x, policy="exact"))


def test_a_gradient_that_is_small_where_the_derivative_is_large(registry: None) -> None:
    """``d/dx`` of ``x * log(x)`` for constant ``x``; the control has steps of one size."""
    def stepped(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(stepped, (x,), x)
        return x.log()

    register_op(stepped, elementwise())
    x = torch.exp2(torch.linspace(-26, 0, 256)).repeat(4, 1)
    model = QuantBackwardWrapper(Apply(torch.log), seed=0)
    naive = QuantBackwardWrapper(Apply(stepped), seed=0)
    errors = []
    for wrapped in (model, naive):
        leaf = x.clone().requires_grad_()
        # The exact gradient is 1 everywhere.
        (grad,) = torch.autograd.grad(wrapped(leaf), leaf, x)
        errors.append(float((grad - 1).abs().max()))
    assert errors[0] < 2**(27 / 124) - 1 and errors[1] > 1000


def test_entropy() -> None:
    """Both factors of ``p * log(p)`` have relative errors where ``1 / p`` multiplies them."""
    p = torch.softmax(4 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), -1)

    def entropy(p: Tensor) -> Tensor:
        return -(p.log() * p)

    exact = gradient(entropy, p, policy="exact")
    rounded = gradient(entropy, p)
    assert float((rounded - exact).norm() / exact.norm()) < 0.15
    assert [codec for op, codec, _ in stored(entropy, p) if op == "mul"].count("8-bit relative") == 1


@pytest.mark.parametrize("function", [
    lambda x: (1 + x.exp()).log(), lambda x: 1 / (1 + (-x).exp())], ids=["softplus", "sigmoid"])
def test_activations_that_are_written_out(function: Function) -> None:
    x = 12 * torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) - 6
    exact, rounded = gradient(function, x, policy="exact"), gradient(function, x)
    # exp has a range of 2**17.3, and the derivative of the other function one of up to 2**17.3 squared:
    # the ratios of levels are 2**(17.8 / 124) and 2**(35.1 / 124).
    assert float(((rounded - exact) / exact).abs().max()) < 2**(17.8 / 124 + 35.1 / 124) - 1
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_infinities_and_nan_are_those_of_plain_autograd() -> None:
    x = torch.rand(4, 256)
    x[:, 3], x[:, 5], x[:, 9] = 0.0, -1.0, float("inf")
    for function in (torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, lambda x: x**-1.5):
        exact, rounded = gradient(function, x, policy="exact"), gradient(function, x)
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(exact), special(rounded))
        assert torch.equal(exact == 0, rounded == 0)


def test_exp_and_the_product_after_it_store_one_tensor() -> None:
    x, w = torch.randn(16, 256), torch.randn(16, 256).requires_grad_()
    model = QuantBackwardWrapper(Apply(lambda x: x.exp() * w), seed=0)
    with track_saved_memory(model) as report:
        model(x.requires_grad_())
    # The weight ``w`` is an input, in 4 bits; ``exp(x)`` counts once.
    assert report.stored_bytes < 1.6 * x.numel()


@pytest.mark.parametrize("function", [
    lambda x: (y := x.exp()) * y, lambda x: x.exp().square(), lambda x: x.exp()**2,
    lambda x: torch.linalg.vector_norm(x.exp(), dim=-1), lambda x: x.exp().var(-1),
    lambda x: x.exp() * x.exp().log().exp()])
def test_a_product_of_exp_with_itself_has_a_rounding_of_its_own(function: Function) -> None:
    roundings: dict[str, bool] = {}

    class Noting(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            if saved.op != "exp" and decision.codec is not None and not decision.waits:
                roundings[saved.op or ""] = decision.shared
            return decision

    model = QuantBackwardWrapper(Apply(lambda x: function(x).sum()), seed=0, policy=Noting())
    model(torch.randn(16, 256).requires_grad_())
    assert roundings and not any(shared for op, shared in roundings.items() if op != "mul" or len(
        roundings) == 1)


@pytest.mark.parametrize(("function", "kept"), [
    (lambda x: x.rsqrt().mean(-1, keepdim=True).rsqrt(), "one number for each row"),
    (lambda x: torch.ones_like(x) / x.sqrt(), "the next operation keeps it exact"),
    (lambda x: x.square() * (x.mean(0) + 1).rsqrt(), "the next operation keeps it exact")])
def test_what_is_kept_exact_takes_no_bytes_twice(function: Function, kept: str) -> None:
    model = QuantBackwardWrapper(Apply(function), seed=0)
    model(torch.rand(256, 512).requires_grad_())
    assert kept in str(model.explain())


def test_the_norm_of_a_language_model_keeps_its_statistic() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    found = stored(norm, torch.randn(512, 64))
    assert [codec for op, codec, _ in found if op == "rsqrt"] == ["exact"]


def test_a_quantizer_that_rounds_to_nearest_keeps_them() -> None:
    model = QuantBackwardWrapper(Apply(torch.log), Nearest2)
    model(torch.rand(16, 64).requires_grad_())
    assert "no code with a relative error" in str(model.explain())


@pytest.mark.parametrize("name", ["log", "sqrt", "rsqrt", "reciprocal", "exp", "x ** 1.5"])
def test_second_derivatives_run_as_in_plain_autograd(name: str) -> None:
    """They are those of the rounded derivative, which is off by at most a level of 2**(82 / 124)."""
    function, values = FUNCTIONS[name]
    x = (values.sqrt().sqrt() if values.min() < 1e-3 else values).repeat(8, 1)
    second = []
    for policy in ("exact", "op_aware"):
        leaf = x.clone().requires_grad_()
        out = QuantBackwardWrapper(Apply(function), seed=0, policy=policy)(leaf)
        (first,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.sum(), leaf)[0])
    torch.testing.assert_close(second[1], second[0], rtol=1.0, atol=1e-6)


def test_every_form_is_tested() -> None:
    names = {name.removeprefix("arc").removeprefix("a") for name in (*OF_INPUT, *OF_OUTPUT)}
    assert names <= {name.removeprefix("a") for name in FUNCTIONS}
    assert of_power(-2.0) is not None


def test_softmin_stores_probabilities() -> None:
    ((_, codec, _),) = stored(lambda x: F.softmin(x, -1), torch.randn(16, 64))
    assert codec == "4-bit companded"


def test_a_long_recurrence_is_not_searched_for_each_step() -> None:
    """Nodes before ``exp`` cannot depend on its output."""
    visited: list[Any] = []

    def number(node: Any) -> int:
        visited.append(node)
        return node_number(node)

    def recurrence(x: Tensor) -> Tensor:
        state = x[0]
        for step in range(64):
            state = state * x[step].exp() + x[step]
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brevitas_bp.backward.origins.node_number", number)
        QuantBackwardWrapper(Apply(recurrence), seed=0)(torch.randn(64, 16, 32).requires_grad_())
    # Each product looks at a few nodes; all nodes of all steps before would be 64 * 64 * 2.
    assert 0 < len(visited) < 64 * 16
