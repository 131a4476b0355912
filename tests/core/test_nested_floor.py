"""floor(P / s) * s: its values, its straight-through gradient and the gradient-ratio rule."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.core.nested_floor import (
    EPSILON,
    LEAST_SCALE,
    nested_floor,
    nested_integers,
    ratio_gradient,
)
from tests.stats import hoeffding
from tests.strategies import DTYPES, LAYOUTS, MODERATE, dtype_name, float_tensors, normals
from tests.support import same_bits

P = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
GRADIENT = torch.tensor([[.01, .2, 0], [.6, .5, .4]])
S = 0.25
# Shape of the scale -> lam -> dL/ds. Six digits, for the rows and columns of P.
GOLDEN: dict[tuple[int, ...], dict[float, list[float]]] = {
    (): {0.1: [-0.119665], 0.5: [-0.738465], 1.0: [-1.979139]},
    (2, 1): {0.1: [-0.119665, -0.398672], 0.5: [-0.672019, -0.132891], 1.0: [-1.367806, -1.222665]},
    (1, 3): {
        0.1: [-0.159660, -0.199336, -0.199336], 0.5: [-0.892487, -0.099668, -1.123570],
        1.0: [-2.266030, -0.537050, -2.597287]}}


def test_golden_integers() -> None:
    assert nested_integers(P, torch.tensor(S)).tolist() == [[2, -2, 0], [4, 2, -4]]


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_golden_gradients(shape: tuple[int, ...], lam: float, dtype: torch.dtype) -> None:
    scale = torch.full(shape, S, dtype=dtype, requires_grad=True)
    nested_floor(P.to(dtype), scale, lam).backward(GRADIENT.to(dtype))
    assert scale.grad is not None and scale.grad.shape == shape and scale.grad.dtype == dtype
    # Half a unit of the sixth digit, and float32's rounding of numbers up to 4.
    expected = torch.tensor(GOLDEN[shape][lam], dtype=torch.float64).view(shape)
    assert (scale.grad.double() - expected).abs().max() <= 0.5e-6 + 4 * 2**-22


def naive(gradient: Tensor, x: Tensor, scale: Tensor, lam: float, unanimity: bool) -> Tensor:
    """Applies the rule of the thesis, element by element, in Python's floats."""
    wide = scale.expand(x.shape)
    result = torch.zeros(scale.numel(), dtype=torch.float64)
    index = torch.arange(scale.numel()).view(scale.shape).expand(x.shape)
    for group in range(scale.numel()):
        rows = [
            (float(g), float(p), max(float(s), LEAST_SCALE))
            for g, p, s, i in zip(gradient.flatten(), x.flatten(), wide.flatten(), index.flatten())
            if i == group]
        integers = [math.floor(p / s) for _, p, s in rows]
        ratios = [
            abs(g) / (abs(q * s) if q else EPSILON) for (g, _, s), q in zip(rows, integers)]
        votes = [0.0 if r >= lam else -math.tanh(lam - r) for r in ratios]
        if unanimity and all(r >= lam for r in ratios):
            votes = [-math.tanh(lam)] * len(votes)
        result[group] = sum(votes) / len(votes) * max(abs(q) for q in integers)
    return result.view(scale.shape)


@given(
    seed=st.integers(0, 2**16), shape=st.sampled_from([(4, 5), (3, 2, 3, 2)]),
    kept=st.sampled_from([None, 0, 1]), lam=st.sampled_from([0.0, 1e-9, 0.3, 2.0, 50.0]),
    unanimity=st.booleans())
def test_the_rule_is_that_of_a_loop_over_elements(
        seed: int, shape: tuple[int, ...], kept: int | None, lam: float, unanimity: bool) -> None:
    x, gradient = normals(shape, seed), normals(shape, seed + 1)
    gradient = gradient * (normals(shape, seed + 2) > 0)  # zeros vote
    scale_shape = () if kept is None else tuple(n if d == kept else 1 for d, n in enumerate(shape))
    scale = normals(scale_shape, seed + 3).abs() * 0.3 + 0.01
    got = ratio_gradient(gradient, x, scale, lam, unanimity)
    expected = naive(gradient, x, scale, lam, unanimity)
    # Votes are sums of at most 36 numbers below 1, times integers below 500, in float64.
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert (got <= 0).all()


def test_unanimity_is_the_difference_between_the_versions() -> None:
    # The second row's ratios are 0.6, 1 and 0.4: none is below 0.3.
    row = P[1:], GRADIENT[1:], torch.tensor(S)
    earlier = ratio_gradient(row[1], row[0], row[2], lam=0.3, unanimity=False)
    finished = ratio_gradient(row[1], row[0], row[2], lam=0.3)
    assert earlier == 0
    assert finished.item() == pytest.approx(-math.tanh(0.3) * 4, rel=1e-6)
    # A group with a voter does not differ.
    assert ratio_gradient(GRADIENT, P, row[2], 0.3, False) == ratio_gradient(GRADIENT, P, row[2], 0.3)


@pytest.mark.parametrize("unanimity", [False, True])
def test_lam_zero_gives_no_gradient(unanimity: bool) -> None:
    assert (ratio_gradient(GRADIENT, P, torch.full((1, 3), S), 0.0, unanimity) == 0).all()


def test_without_lam_the_scale_gets_no_gradient() -> None:
    x, scale = P.clone().requires_grad_(), torch.tensor(S, requires_grad=True)
    nested_floor(x, scale, None).backward(GRADIENT)
    assert scale.grad is None and x.grad is not None and torch.equal(x.grad, GRADIENT)


@given(x=float_tensors(values=MODERATE), exponent=st.integers(-10, 3))
def test_values_gradients_dtypes_and_layouts(x: Tensor, exponent: int) -> None:
    x = x.detach().requires_grad_()
    scale = torch.tensor(2.0**exponent, dtype=x.dtype, requires_grad=True)
    y = nested_floor(x, scale, 1e-3)
    assert y.dtype == x.dtype and y.shape == x.shape
    wide, s = x.detach().to(torch.float64), max(scale.item(), LEAST_SCALE)
    quotient = wide / s
    # In the compute dtype a quotient has a relative error of 2**-24; above 2**24 it is whole.
    if quotient.abs().max() < 2**20:
        error = (wide - y.detach().double()) / s
        # The result is rounded to the dtype of x.
        slack = torch.finfo(x.dtype).eps * quotient.abs() + 2**-20
        assert ((error >= -slack) & (error <= 1 + slack)).all()
    gradient = torch.full_like(y, 0.5)
    y.backward(gradient)
    assert x.grad is not None and scale.grad is not None
    assert torch.equal(x.grad, gradient)
    assert scale.grad.dtype == scale.dtype


# These two change the shape or the values.
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("expanded", "odd unit stride")])
def test_memory_layouts_give_the_same_bits(layout: str) -> None:
    x, gradient = normals((2, 5, 9, 11)).float(), normals((2, 5, 9, 11), 1).float()
    scale = torch.full((1, 5, 1, 1), 0.1)
    for dtype in DTYPES:
        found = []
        for change in (lambda t: t, LAYOUTS[layout]):
            p, s = change(x.to(dtype)).requires_grad_(), scale.clone().requires_grad_()
            y = nested_floor(p, s, 1.0)
            y.backward(change(gradient.to(dtype)))
            assert s.grad is not None and y.dtype == dtype
            found.append((y.detach(), s.grad))
        assert same_bits(found[0][0], found[1][0])
        # Sums of 198 terms of one sign run in another order.
        assert torch.allclose(found[0][1], found[1][1], rtol=198 * 2**-23)


def test_half_precision_counts_in_float32() -> None:
    # 4097 is no float16.
    x, scale = torch.tensor([0.5], dtype=torch.float16), torch.tensor(0.5 / 4097)
    assert nested_integers(x, scale).item() in (4096, 4097)
    assert nested_integers(x, scale).dtype == torch.float32
    for dtype in DTYPES:
        assert torch.tensor(LEAST_SCALE, dtype=dtype).double().item() == LEAST_SCALE


@pytest.mark.parametrize("given_scale", [LEAST_SCALE, 0.0, -1.0, 1e-30])
def test_scales_that_are_too_small_count_as_the_least(given_scale: float) -> None:
    x = torch.tensor([0.05, -0.05])
    assert nested_integers(x, torch.tensor(given_scale)).tolist() == [4194, -4195]
    got = ratio_gradient(torch.zeros(2), x, torch.tensor(given_scale), 1.0)
    assert got.item() == pytest.approx(-math.tanh(1.0) * 4195)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x = P.clone()
    x[0, 0] = bad
    y = nested_floor(x, torch.tensor(S), 1.0)
    assert not y[0, 0].isfinite() and y.isfinite().sum() == 5
    gradient = GRADIENT.clone()
    gradient[0, 0] = float("nan")
    got = ratio_gradient(gradient, P, torch.full((2, 1), S), 1.0)
    assert got[0].isnan() and got[1].isfinite()


@pytest.mark.parametrize("shape", [(), (1, 3)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x, scale = torch.empty(0, 3, requires_grad=True), torch.full(shape, S, requires_grad=True)
    nested_floor(x, scale, 1.0).sum().backward()
    assert scale.grad is not None and (scale.grad == 0).all() and scale.grad.shape == shape


def test_a_single_number() -> None:
    x, scale = torch.tensor(0.7, requires_grad=True), torch.tensor(S, requires_grad=True)
    y = nested_floor(x, scale, 1.0)
    y.backward()
    # The ratio is 1 / 0.5 >= 1, so the only element votes by unanimity.
    assert y.item() == 0.5 and x.grad == 1 and scale.grad is not None
    assert scale.grad.item() == pytest.approx(-math.tanh(1.0) * 2)


def mean_offset(y: Tensor, x: Tensor, s: float) -> float:
    return float(((y - x) / s).mean() + 0.5)


def test_the_mean_offset_is_half_a_scale() -> None:
    n, s = 100_000, 0.25
    x = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8 - 4
    # (y - x) / s is uniform in (-1, 0].
    assert abs(mean_offset(nested_floor(x, torch.tensor(s), None), x, s)) <= hoeffding(n)
    # The control: rounding to nearest has no offset.
    assert abs(mean_offset((x / s).round() * s, x, s)) > hoeffding(n)


def test_quantized_values_are_not_always_quantized_to_themselves() -> None:
    """Documented: quotients of rounded products may fall just below an integer."""
    scale = torch.rand(1, 4096, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-3
    q = torch.arange(-300.0, 300.0)[:, None].expand(600, 4096)
    again = nested_integers(q * scale, scale)
    assert ((again == q) | (again == q - 1)).all() and (again != q).any()


def twice(x: Tensor, scale: Tensor) -> Tensor:
    return nested_floor(x, scale, 1.0).pow(2).sum()


def test_second_derivatives_are_those_of_the_identity() -> None:
    x, scale = P.clone().requires_grad_(), torch.tensor(S, requires_grad=True)
    (first,) = torch.autograd.grad(twice(x, scale), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full_like(P, 2.0))


def test_transforms_of_torch_func() -> None:
    scale = torch.full((2, 1), S)
    plain = P.clone().requires_grad_()
    s = scale.clone().requires_grad_()
    twice(plain, s).backward()
    gradients: Any = torch.func.grad(twice, argnums=(0, 1))(P, scale)
    assert torch.equal(gradients[0], plain.grad) and torch.equal(gradients[1], s.grad)  # pyright: ignore
    stacked: Any = torch.func.vmap(torch.func.grad(twice, argnums=(0, 1)), in_dims=(0, None))(
        torch.stack([P, 2 * P]), scale)
    assert torch.equal(stacked[0][0], gradients[0]) and torch.equal(stacked[1][0], gradients[1])


def test_nothing_but_parameter_and_scale_is_saved() -> None:
    x, scale = P.clone().requires_grad_(), torch.tensor(S, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nested_floor(x, scale, 1.0)
        assert [t.data_ptr() for t in saved] == [x.data_ptr(), scale.data_ptr()]
        saved.clear()
        nested_floor(x, scale, None)
        assert saved == []
