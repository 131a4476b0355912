"""Derivatives of activations: right, and the same bits wherever they are computed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations import derivatives
from brevitas_bp.activations.derivatives import DERIVATIVES, derivative
from brevitas_bp.format import reference
from brevitas_bp.kernels import dispatch
from tests.kernels.table import SPECS, same_bytes, samples
from tests.support import same_bits

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid, "tanh": torch.tanh}
OF_OUTPUT = ("sigmoid", "tanh")
each_function = pytest.mark.parametrize("name", FUNCTIONS)

GRID = torch.cat([
    torch.linspace(-100, 100, 200_001), torch.linspace(-6, 6, 100_001),
    torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45, 1e6, -1e6, 1e15, -1e15, 1e18, -1e18])])


def source(name: str, x: Tensor) -> Tensor:
    """What the derivative is computed from."""
    return FUNCTIONS[name](x) if name in OF_OUTPUT else x


def of_autograd(name: str, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x).sum(), x)[0]


def compiled(flat: Tensor, name: str) -> Tensor:
    return pytest.importorskip("brevitas_bp.kernels.cpu.derivatives").derivative(flat, name)


def test_every_derivative_is_tested() -> None:
    assert set(FUNCTIONS) == set(DERIVATIVES)


@each_function
def test_derivatives_are_as_exact_as_those_of_torch(name: str) -> None:
    exact = of_autograd(name, GRID.double())
    ours = (derivative(source(name, GRID), name) - exact).abs().max().item()
    theirs = (of_autograd(name, GRID) - exact).abs().max().item()
    # Both round x (1 - s), where s is close to 1, to multiples of |x| 2**-24.
    assert ours <= 2.5 * theirs and ours < 2.5e-6
    # Positive control: a table of 2**12 intervals would not pass.
    step = 12 / 2**12
    coarse = of_autograd(name, (GRID / step).round() * step)
    assert (coarse - exact).abs().max() > 100 * ours


@each_function
@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_none_where_it_is_none_for_torch(name: str, x: float) -> None:
    values = torch.full((3,), x)
    expected = of_autograd(name, values)
    for got in (derivative(source(name, values), name), compiled(source(name, values), name)):
        assert same_bits(got.isfinite(), expected.isfinite())


@each_function
def test_compiled_derivatives_have_the_bits_of_the_definition(name: str) -> None:
    for x in (GRID, *samples(torch.float32).values(), torch.empty(0)):
        assert same_bits(compiled(x, name), derivative(x, name))


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    values=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_floats_have_the_bits_of_the_definition(name: str, values: list[float]) -> None:
    x = torch.tensor(values)
    assert same_bits(compiled(x, name), derivative(x, name))


@each_function
def test_encoding_a_derivative_gives_the_bytes_of_the_reference(name: str) -> None:
    cpu = pytest.importorskip("brevitas_bp.kernels.cpu.launch")
    # Of several groups, chunks and threads, and with a last bucket that is padded.
    large = torch.randn(5 * 2**14 + 3, generator=torch.Generator().manual_seed(1)) * 3
    cases = [(spec, x) for spec in SPECS[::3] for x in samples(torch.float32).values()]
    for spec, x in [*cases, *((spec, large) for spec in SPECS[::17])]:
        got = cpu.launcher(spec, x.numel(), x.dtype).encode(x, 3, name)
        expected = reference.encode(derivative(x, name), spec, 3)
        assert all(map(same_bytes, got, expected.tensors)), (spec, x.numel())


@each_function
@pytest.mark.parametrize(("size", "numel"), [(256, 3000), (None, 3000), (None, 70_000)])
def test_every_plan_encodes_derivatives(
        name: str, size: int | None, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compiled kernels, those for large tensors among them, and without any."""
    x, spec = torch.randn(numel) * 3, reference.BucketQuantSpec(3, size)
    expected = reference.encode(derivative(x, name), spec, 5)
    for kernels in (dispatch._cpu_kernels, lambda: None):
        monkeypatch.setattr(dispatch, "_cpu_kernels", kernels)
        plan = dispatch.launcher(spec, x.numel(), x.dtype, x.device)
        payload, metadata = plan.encode(x, 5, name)
        assert same_bytes(payload, expected.payload) and same_bytes(metadata, expected.metadata)
        decoded = plan.decode(payload, metadata, 5, x.shape, x.stride())
        assert same_bits(
            decoded, reference.decode(expected, spec, 5, x.numel(), x.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_not_supported(dtype: Any) -> None:
    assert not derivatives.supports(torch.zeros(3, dtype=dtype))
    assert derivatives.supports(torch.zeros(3))
