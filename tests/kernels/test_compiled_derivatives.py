"""Compiled derivatives have the bits of their definition, in every kernel that computes them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.activations.derivatives import COMPILED, derivative
from brevitas_bp.format import reference
from brevitas_bp.kernels import dispatch
from tests.activations.support import GRID, source
from tests.kernels.table import SPECS, same_bytes, samples
from tests.support import same_bits

each_function = pytest.mark.parametrize("name", COMPILED)


def compiled(flat: Tensor, name: str) -> Tensor:
    return pytest.importorskip("brevitas_bp.kernels.cpu.derivatives").derivative(flat, name)


@each_function
def test_compiled_derivatives_have_the_bits_of_the_definition(name: str) -> None:
    odd = source(name, torch.tensor([math.inf, -math.inf, math.nan]))
    for x in (GRID, odd, *samples(torch.float32).values(), torch.empty(0)):
        assert same_bits(compiled(x, name), derivative(x, name))


@given(
    name=st.sampled_from(COMPILED),
    values=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_floats_have_the_bits_of_the_definition(name: str, values: list[float]) -> None:
    x = torch.tensor(values)
    assert same_bits(compiled(x, name), derivative(x, name))


@each_function
def test_encoding_a_derivative_gives_the_bytes_of_the_reference(name: str) -> None:
    cpu = pytest.importorskip("brevitas_bp.kernels.cpu.launch")
    # Several groups, chunks and threads, and a padded last bucket.
    large = torch.randn(5 * 2**14 + 3, generator=torch.Generator().manual_seed(1)) * 3
    cases = [(spec, x) for spec in SPECS[::3] for x in samples(torch.float32).values()]
    for spec, x in [*cases, *((spec, large) for spec in SPECS[::17])]:
        got = cpu.launcher(spec, x.numel(), x.dtype).encode(x, 3, name)
        expected = reference.encode(derivative(x, name), spec, 3)
        assert all(map(same_bytes, got, expected.tensors)), (spec, x.numel())


@each_function
@pytest.mark.parametrize(("size", "numel"), [(256, 3000), (None, 3000), (None, 70_000)])
def test_every_plan_encodes_derivatives(name: str, size: int | None, numel: int) -> None:
    """With compiled kernels, including those for large tensors, and without any."""
    x, spec = torch.randn(numel) * 3, reference.BucketQuantSpec(3, size)
    expected = reference.encode(derivative(x, name), spec, 5)
    for preference in ("fastest", "reference"):
        with dispatch.use(preference):
            plan = dispatch.launcher(spec, x.numel(), x.dtype, x.device)
        payload, metadata = plan.encode(x, 5, name)
        assert same_bytes(payload, expected.payload) and same_bytes(metadata, expected.metadata)
        decoded = plan.decode(payload, metadata, 5, x.shape, x.stride())
        assert same_bits(
            decoded, reference.decode(expected, spec, 5, x.numel(), x.dtype))
