"""Means of groups agree with exact arithmetic, and every form agrees with the reference."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from brevitas_bp.format import averages
from brevitas_bp.format.averages import group_count
from brevitas_bp.kernels import dispatch
from tests.strategies import DTYPES, dtype_name, normals
from tests.support import same_bits

SIZES = (1, 2, 3, 4, 5, 8)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def cases(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tensors [A, L, I] whose rows end within a group, with values of all sizes."""
    largest = torch.finfo(dtype).max
    out = {
        f"{shape}": normals(shape).to(dtype)
        for shape in product((1, 3), (1, 2, 7, 8, 29), (1, 5))}
    out["many"] = normals((40, 1000, 1)).to(dtype)
    out["broken"] = normals((2, 9, 2)).index_fill(1, torch.tensor([5]), torch.nan).to(dtype)
    out["infinite"] = normals((2, 9, 2)).index_fill(1, torch.tensor([5]), torch.inf).to(dtype)
    out["largest"] = torch.full((2, 9, 1), largest, dtype=dtype)
    out["both ends"] = (largest * torch.tensor([1.0, -1.0, -1.0] * 3).double()).view(1, 9, 1).to(dtype)
    out["subnormal"] = (normals((2, 9, 1)) * torch.finfo(dtype).smallest_normal / 8).to(dtype)
    return out


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_every_form_gives_the_same_bits(dtype: torch.dtype, size: int) -> None:
    for name, x in cases(dtype).items():
        expected = averages.means(x, size)
        assert expected.shape == (x.shape[0], group_count(x.shape[1], size), x.shape[2])
        for form in (averages.group_means, dispatch.group_means):
            assert same_bits(form(x, size), expected), name


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_every_form_repeats_each_mean_for_its_group(dtype: torch.dtype, size: int) -> None:
    for name, x in cases(dtype).items():
        means = averages.means(x, size).to(dtype)
        index = torch.arange(x.shape[1]) // size
        for form in (averages.spread, dispatch.spread):
            assert same_bits(form(means, size, x.shape[1]).contiguous(), means[:, index]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("size", SIZES)
def test_a_mean_is_the_exact_one_rounded(dtype: torch.dtype, size: int) -> None:
    x = normals((3, 29, 2)).to(dtype)
    means = dispatch.group_means(x, size)
    for a, group, i in product(range(3), range(means.shape[1]), range(2)):
        values = x[a, group * size:(group + 1) * size, i].tolist()
        exact = sum(map(Fraction, values)) / len(values)
        # Float32: up to `size` float64 roundings, then half a unit in the last place. Float64: two
        # roundings per element, each at most half a unit of the sum of magnitudes.
        peak = max(map(abs, values))
        slack = 2.0**-24 * abs(exact) if dtype == torch.float32 else 0
        assert abs(Fraction(float(means[a, group, i])) - exact) <= slack + 2 * size * 2.0**-53 * peak


@each_dtype
@pytest.mark.parametrize("size", SIZES)
def test_constant_groups_are_exact_and_finite_ones_stay_finite(
        dtype: torch.dtype, size: int) -> None:
    largest = torch.finfo(dtype).max
    for constant in (largest, -largest, 0.1, 3.3e-7):
        x = torch.full((2, 23, 3), constant, dtype=torch.float64).to(dtype)
        means = dispatch.group_means(x, size)
        assert torch.equal(means, x[:, :means.shape[1]].to(means.dtype))
    assert dispatch.group_means(cases(dtype)["both ends"], size).isfinite().all()


def test_the_naive_mean_overflows() -> None:
    assert torch.full((4,), torch.finfo(torch.float32).max).mean().isinf()


def test_the_middle_dimension_is_averaged_and_no_row_straddled() -> None:
    x = torch.arange(2 * 5 * 2.0).view(2, 5, 2)
    # Rows of 5 in groups of 2: the last group of a row has one element.
    assert dispatch.group_means(x, 2)[:, :, 0].tolist() == [[1, 5, 8], [11, 15, 18]]


@pytest.mark.parametrize("shape", [(0, 4, 1), (3, 0, 1), (3, 4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for form in (averages.group_means, dispatch.group_means):
        means = form(torch.empty(shape), 4)
        assert means.shape == (shape[0], group_count(shape[1], 4), shape[2])
        for repeat in (averages.spread, dispatch.spread):
            assert repeat(means, 4, shape[1]).shape == shape
