"""Filling zeros, masks and predictions: a plain oracle, and equal bits of reference and kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations.predictions import PREDICTIONS, Prediction
from brevitas_bp.codec.regions import relu_region
from brevitas_bp.format import differences as reference
from brevitas_bp.format import masks
from brevitas_bp.testing.subject import same_bits

ROWS = (1, 5, 16, 49, 64, 192, 196, 256, 1000)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
each_chunk = pytest.mark.parametrize("chunk", [256, 512, 1000])


def compiled() -> object:
    pytest.importorskip("numba")
    from brevitas_bp.kernels.cpu import differences

    return differences


def drawn(row: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Returns rows of very different scale, and a row each with NaN, infinity and huge numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, row, dtype=torch.float64, generator=generator)
    x *= 10.0 ** torch.linspace(-6, 3, count, dtype=torch.float64)[:, None]
    x = x.to(dtype)
    if count >= 4:
        x[0, 0], x[1, -1] = float("nan"), float("inf")
        x[2] = 3e38
    return x.view(-1)


def derivative_of_silu(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def in_chunks(row: int, numel: int, chunk: int = 256) -> list[range]:
    return [
        range(first, min(first + chunk, start + row))
        for start in range(0, numel, row) for first in range(start, start + row, chunk)]


@pytest.mark.parametrize("row", ROWS)
def test_zeros_become_the_mean_of_the_others(row: int) -> None:
    x = torch.randn(3 * row, dtype=torch.float64, generator=torch.Generator().manual_seed(row)).relu()
    filled = reference.fill_zeros(x, row)
    for chunk in in_chunks(row, x.numel()):
        part, found = x[chunk.start:chunk.stop], filled[chunk.start:chunk.stop]
        given = part != 0
        assert torch.equal(found[given], part[given])
        if given.any():
            assert torch.allclose(found[~given], part[given].mean(), rtol=1e-12)
            assert found.var(unbiased=False) <= part.var(unbiased=False) + 1e-12
        else:
            assert not found.any()


def test_the_mean_of_huge_elements_stays_finite() -> None:
    x = torch.full((256,), 3e38)
    x[::2] = 0
    assert torch.equal(reference.fill_zeros(x, 256), torch.full((256,), 3e38))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_elements_spread_to_no_zero(broken: float) -> None:
    from brevitas_bp.kernels.cpu import differences

    x = torch.randn(512, generator=torch.Generator().manual_seed(0)).relu()
    x[3] = broken
    for form in (reference, differences):
        filled = form.fill_zeros(x, 512)
        assert same_bits(filled[:256].nan_to_num(7), x[:256].nan_to_num(7))
        assert bool((filled[256:] > 0).all())


def test_empty_tensors() -> None:
    from brevitas_bp.kernels.cpu import differences

    for dtype in (torch.float32, torch.bfloat16):
        for form in (reference, differences):
            assert form.fill_zeros(torch.empty(0, dtype=dtype), 0).shape == (0,)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_is_its_polynomial(name: str) -> None:
    d = torch.linspace(-1, 2, 1001, dtype=torch.float64)
    t = d.clamp(-0.125, 1.125) - 0.5
    expected = sum(c * t**(k + 1) for k, c in enumerate(PREDICTIONS[name].coefficients))
    assert torch.allclose(reference.predict(d, PREDICTIONS[name]), torch.as_tensor(expected), atol=1e-12)
    assert reference.predict(torch.tensor([0.5, float("nan")]), PREDICTIONS[name])[0] == 0


@each_dtype
@pytest.mark.parametrize("row", ROWS)
@each_chunk
def test_no_chunk_gets_a_larger_range(chunk: int, row: int, dtype: torch.dtype) -> None:
    x = drawn(row, 8, dtype)
    y, d = F.silu(x), derivative_of_silu(x)
    rest, used = reference.subtract_prediction(y, d.clone(), PREDICTIONS["silu"], row, None, chunk)
    chunks = in_chunks(row, x.numel(), chunk)
    assert len(chunks) == len(used) == reference.chunk_count(x.numel(), row, chunk)
    for place, subtracted in zip(chunks, used.tolist()):
        part, found = y[place.start:place.stop], rest[place.start:place.stop]
        if subtracted:
            assert found.max() - found.min() < part.max() - part.min()
        else:
            assert same_bits(found, part)
    again = reference.add_prediction_(rest.clone(), d, PREDICTIONS["silu"], row, used, chunk)
    finite = y.isfinite()
    assert torch.allclose(again[finite], y[finite], rtol=1e-6, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("prediction", [*PREDICTIONS.values(), Prediction((1.0,))])
@each_chunk
def test_kernels_give_the_bits_of_the_reference(
        chunk: int, row: int, dtype: torch.dtype, prediction: Prediction) -> None:
    kernels: object = compiled()
    x = drawn(row, 7, dtype)
    y, d = F.silu(x), derivative_of_silu(x) + 0.03 * torch.randn(x.shape, dtype=dtype)
    d[3] = float("nan")
    (rest, used), (its_rest, its_used) = (
        form.subtract_prediction(  # type: ignore[attr-defined]
            y, d.clone(), prediction, row, None, chunk)
        for form in (reference, kernels))
    assert torch.equal(used, its_used)
    assert same_bits(rest.nan_to_num(7, 8, 9), its_rest.nan_to_num(7, 8, 9))
    factors = torch.rand(row, dtype=dtype)
    (scaled, used_so), (its_scaled, its_so) = (
        form.subtract_prediction(  # type: ignore[attr-defined]
            y, d.clone(), prediction, row, factors, chunk)
        for form in (reference, kernels))
    assert torch.equal(used_so, its_so)
    assert same_bits(scaled.nan_to_num(7, 8, 9), its_scaled.nan_to_num(7, 8, 9))
    sums = [
        form.add_prediction_(  # type: ignore[attr-defined]
            rest.clone(), d, prediction, row, used, chunk)
        for form in (reference, kernels)]
    assert same_bits(*[s.nan_to_num(7, 8, 9) for s in sums])


@each_dtype
@given(row=st.integers(1, 600), count=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_kernels_fill_and_mask_alike(dtype: torch.dtype, row: int, count: int, seed: int) -> None:
    kernels: object = compiled()
    x = drawn(row, count, dtype, seed)
    filled = [form.fill_zeros(x.relu(), row) for form in (reference, kernels)]  # type: ignore[attr-defined]
    assert same_bits(*[f.nan_to_num(7, 8, 9) for f in filled])
    mask = relu_region().encode(x.relu()).tensors[0]
    from brevitas_bp.kernels.cpu import masks as compiled_masks

    rectified = x.relu()
    strays = [form.find_strays(rectified, mask) for form in (masks, compiled_masks)]
    assert torch.equal(*strays) and not strays[0].any()
    masked = [
        form.mask_(x.clone(), mask, strays=strays[0]) for form in (masks, compiled_masks)]
    assert same_bits(*[m.nan_to_num(7, 8, 9) for m in masked])
    finite = x.isfinite()
    assert torch.equal(masked[0][finite], x[finite].relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 7, 300, 5000])
@pytest.mark.parametrize("place", [0, 0.4, 1])
def test_strays_are_found_and_nothing_is_filled_or_masked(
        numel: int, place: float, dtype: torch.dtype) -> None:
    from brevitas_bp.kernels.cpu import differences
    from brevitas_bp.kernels.cpu import masks as compiled_masks

    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    index = int(place * (numel - 1))
    x[index] = 0
    mask = relu_region().encode(x).tensors[0]
    changed = x.clone()
    changed[index] = torch.finfo(dtype).smallest_normal
    for form, fill in ((masks, reference), (compiled_masks, differences)):
        for other in (x, -x.abs() * 0 + x):
            assert form.find_strays(other, mask).tolist() == [0]
        strays = form.find_strays(changed, mask)
        assert (strays.dtype, strays.tolist()) == (torch.uint8, [1])
        assert torch.equal(fill.fill_zeros(changed, numel, strays), changed)
        assert torch.equal(form.mask_(changed.clone(), mask, strays=strays), changed)
        assert torch.equal(
            fill.fill_zeros(x, numel, torch.zeros_like(strays)), fill.fill_zeros(x, numel))
