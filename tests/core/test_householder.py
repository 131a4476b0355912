"""The block Householder transform against matrices built from its definition."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.core.householder import RowHouseholder, blocks_of

ROWS: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda n: torch.ones(n),
    "uniform": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.01,
    "lognormal": lambda n: (3 * torch.randn(n, generator=torch.Generator().manual_seed(n))).exp(),
    "one large": lambda n: torch.full((n,), 0.01).index_fill(0, torch.tensor([n // 2]), 100.0),
}
each_kind = pytest.mark.parametrize("kind", ROWS)


def matrix_of(kind: str, n: int, columns: int = 12) -> Tensor:
    """Returns rows whose ranges are those of a kind, exactly, in float64."""
    x = torch.rand(n, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :2] = torch.tensor([0.0, 1.0])
    return x * ROWS[kind](n).double()[:, None]


def dense(ranges: list[float]) -> tuple[list[int], Tensor]:
    """Builds order and matrix of the transform from the paper's definition, with loops."""
    n = len(ranges)
    order = sorted(range(n), key=lambda i: -ranges[i])
    lam = [ranges[i] for i in order]
    leaders = max(g for g in range(1, n) if (n - g) * lam[g - 1] >= math.fsum(lam[:g]))
    ends = [
        math.floor((n - leaders) * math.fsum(lam[:i]) / math.fsum(lam[:leaders]) + 0.5)
        for i in range(leaders)] + [n - leaders]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(leaders):
        rows = [i, *range(leaders + ends[i], leaders + ends[i + 1])]
        size = len(rows)
        q = torch.eye(size, dtype=torch.float64)
        scales = torch.full((size,), lam[i]**(-1 / 3), dtype=torch.float64)
        if size > 1:
            q -= 1 / (size - math.sqrt(size))
            q[0], q[:, 0] = 1 / math.sqrt(size), 1 / math.sqrt(size)
            scales[0] = (lam[i] / math.sqrt(size))**(-1 / 3)
            scales[1:] = (lam[rows[1]] * float(q.abs().max()) / (size - 1))**(-1 / 3)
        index = torch.tensor(rows)
        matrix[index[:, None], index] = q * scales
    return order, matrix


@each_kind
@pytest.mark.parametrize("n", [*range(2, 20), 64, 127, 128])
def test_transform_is_the_matrix_of_its_definition(kind: str, n: int) -> None:
    x = matrix_of(kind, n)
    order, matrix = dense((x.amax(1) - x.amin(1)).tolist())
    transform = RowHouseholder.of(x)
    # A common factor does not count: a quantizer scales every row.
    largest = float((x.amax(1) - x.amin(1)).max())
    expected = matrix @ x[order]
    assert transform.blocks.order.tolist() == order
    factor = float(transform.inverse_unit) * largest**(1 / 3)
    torch.testing.assert_close(transform.forward(x), expected * factor, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "largest"), [(2, .7071), (3, .7887), (4, .5), (7, .7703), (64, .9821)])
def test_reflections_have_the_published_entries(size: int, largest: float) -> None:
    """One large row leads all others, so the transform of unit rows is one reflection."""
    x = torch.eye(size, dtype=torch.float64)
    x[0] *= 1e6
    transform = RowHouseholder.of(x)
    reflection = transform._reflect(torch.eye(size, dtype=torch.float64))
    assert int(transform.blocks.is_leader.sum()) == 1
    assert float(reflection.abs().max()) == pytest.approx(largest, abs=5e-5)
    torch.testing.assert_close(reflection @ reflection, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(reflection, reflection.T)


def test_both_ways_to_reflect_agree() -> None:
    """The one that reads the number of leaders, and the one that waits for nothing."""
    x = matrix_of("lognormal", 37)
    transform = RowHouseholder.of(x)
    z = torch.randn_like(x)
    torch.testing.assert_close(
        transform._reflect(z), transform._reflect(z.clone().requires_grad_()).detach())


@given(st.lists(st.floats(0, 1e30), min_size=2, max_size=40))
def test_every_follower_has_a_leader(ranges: list[float]) -> None:
    blocks = blocks_of(torch.tensor(ranges))
    leaders = int(blocks.is_leader.sum())
    assert 1 <= leaders < len(ranges)
    assert blocks.is_leader[:leaders].all() and (blocks.leader < leaders).all()
    counts = torch.bincount(blocks.leader, minlength=leaders)
    assert (counts[blocks.leader] == blocks.size).all()
    assert sorted(blocks.order.tolist()) == list(range(len(ranges)))
    assert blocks.scale.isfinite().all() and (blocks.scale > 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 5e37])
def test_any_size_of_values_is_restored(scale: float) -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * scale
    x[3:] *= 1e-3
    transform = RowHouseholder.of(x)
    mixed = transform.forward(x)
    assert mixed.isfinite().all()
    # The second term is the smallest float.
    torch.testing.assert_close(transform.inverse(mixed), x, rtol=0, atol=2e-6 * scale + 1.5e-45)


def test_rows_of_zeros_stay_zeros() -> None:
    x = torch.zeros(6, 4)
    assert torch.equal(RowHouseholder.of(x).inverse(RowHouseholder.of(x).forward(x)), x)
    x[2] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    transform = RowHouseholder.of(x)
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_every_row(bad: float) -> None:
    x = torch.randn(6, 4)
    x[1, 2] = bad
    transform = RowHouseholder.of(x)
    assert transform.inverse(transform.forward(x)).isnan().all()
