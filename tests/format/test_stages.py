"""Rows of stages: their names and numbers, copies, and the kernels that serve them."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from brevitas_bp.errors import UnknownNameError
from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    NO_TRANSFORM,
    STOCHASTIC,
    CodeRange,
    Rounding,
    ScaleRule,
    Stage,
    Transform,
)
from brevitas_bp.kernels import dispatch, use
from tests.support import stage_name

TABLES: list[type[Stage]] = [Transform, ScaleRule, CodeRange, Rounding]
# Rows that ship. Tests add others with larger numbers.
ROWS = [row for table in TABLES for row in table.rows.values() if row.number < 1000]
CPU = torch.device("cpu")


@pytest.fixture
def upwards() -> Iterator[Rounding]:
    """A rounding that no kernel supports."""
    yield Rounding("upwards", 1000, lambda u, noise, top: u.ceil_())
    del Rounding.rows["upwards"]


@pytest.fixture
def dither() -> Iterator[Rounding]:
    """Subtractive dither: decode draws the noise of encode again."""
    yield Rounding(
        "dither", 1001, lambda u, noise, top: u.add_(_some(noise)).floor_(), encoding_draws=True,
        decoding_draws=True, restore=lambda codes, noise, top: codes - (_some(noise) - 0.5))
    del Rounding.rows["dither"]


@pytest.fixture
def reversal() -> Iterator[Transform]:
    """Reverses buckets, and shifts them by the bucket's number and by the seed."""
    def shifts(buckets: Tensor, seed: int, size: int) -> Tensor:
        return (torch.arange(size) + buckets.unsqueeze(-1) + seed) % size

    def apply(x: Tensor, buckets: Tensor, seed: int) -> Tensor:
        return x.flip(-1).gather(-1, shifts(buckets, seed, x.shape[-1]))

    def undo(y: Tensor, buckets: Tensor, seed: int) -> Tensor:
        return torch.empty_like(y).scatter_(-1, shifts(buckets, seed, y.shape[-1]), y).flip(-1)

    yield Transform("reversal", 1002, apply, undo, pads_with_zero=True, draws=True)
    del Transform.rows["reversal"]


def _some(noise: Tensor | None) -> Tensor:
    assert noise is not None
    return noise


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_names_and_numbers_of_a_table_differ(table: type[Stage]) -> None:
    rows = table.rows.values()
    assert len({row.name for row in rows}) == len({row.number for row in rows}) == len(rows) > 0


@pytest.mark.parametrize(("name", "number"), [("nearest", 77), ("another", NEAREST.number)])
def test_a_second_row_of_a_name_or_number_is_refused(name: str, number: int) -> None:
    with pytest.raises(ValueError, match="names and numbers must differ"):
        Rounding(name, number, lambda u, noise, top: u)
    assert Rounding.rows["nearest"] is NEAREST and "another" not in Rounding.rows


@pytest.mark.parametrize("row", ROWS, ids=stage_name)
def test_copies_and_pickles_of_a_row_are_the_row(row: Stage) -> None:
    assert copy.deepcopy(row) is pickle.loads(pickle.dumps(row)) is row


def test_text_and_pickle_of_a_quantizer_keep_its_rows() -> None:
    spec = BucketQuantSpec(4, 64, MAX, NARROW, NEAREST)
    for other in (BucketQuantSpec.from_text(spec.to_text()), pickle.loads(pickle.dumps(spec))):
        assert other == spec and other.scale_rule is MAX and other.transform is NO_TRANSFORM


def test_an_unknown_row_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'stochastic'"):
        Rounding.named("stohcastic")


def test_a_name_in_place_of_a_row_is_refused() -> None:
    with pytest.raises(TypeError, match="scale_rule must be a row of ScaleRule"):
        replace(BucketQuantSpec(), scale_rule="max")


@pytest.mark.parametrize("numel", [1, 300, 70_000])
def test_what_no_kernel_knows_goes_to_the_reference(upwards: Rounding, numel: int) -> None:
    for size in (256, None):
        spec = BucketQuantSpec(3, size, rounding=upwards)
        assert dispatch.backend(CPU, spec, numel, torch.float32) is reference
        x = torch.linspace(-3, 4, numel)
        decoded = dispatch.decode(dispatch.encode(x, spec, 5), spec, 5, numel, x.dtype)
        assert bool((decoded >= x - 1e-5).all())


def test_kernels_serve_all_rows_that_ship() -> None:
    """Positive control of the test above."""
    pytest.importorskip("numba")
    for rounding in (NEAREST, STOCHASTIC):
        for size in (256, None):
            spec = BucketQuantSpec(3, size, rounding=rounding)
            assert dispatch.backend(CPU, spec, 300, torch.float32) is not reference


@pytest.mark.parametrize(
    ("numel", "size", "row_size"), [(1000, 64, None), (300_000, None, None), (490, 56, 49)])
def test_dither_is_restored_with_the_noise_that_it_was_rounded_with(
        dither: Rounding, numel: int, size: int | None, row_size: int | None) -> None:
    spec = BucketQuantSpec(2, size, rounding=dither, row_size=row_size)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    encoded = dispatch.encode(x, spec, 3)
    right, wrong = (
        dispatch.decode(encoded, spec, seed, numel, x.dtype) for seed in (3, 4))
    step = float(encoded.scale.max())
    assert float((right - x).abs().max()) <= step / 2 * (1 + 1e-5)
    # Positive control: other noise.
    assert float((wrong - x).abs().max()) > step / 2 * 1.1
    assert spec.decoding_draws and not BucketQuantSpec(2, size).decoding_draws


@pytest.mark.parametrize("row_size", [None, 49])
def test_a_transform_is_undone_with_the_seed_of_its_encode(
        reversal: Transform, row_size: int | None) -> None:
    spec = BucketQuantSpec(8, 56, rounding=NEAREST, transform=reversal, row_size=row_size)
    x = torch.arange(490.0)
    encoded = dispatch.encode(x, spec, 3)
    assert torch.allclose(dispatch.decode(encoded, spec, 3, 490, x.dtype), x, atol=2)
    # Positive control: another seed.
    assert not torch.allclose(dispatch.decode(encoded, spec, 4, 490, x.dtype), x, atol=2)


def test_a_transform_of_a_whole_tensor_is_refused(reversal: Transform) -> None:
    with pytest.raises(ValueError, match="need a bucket_size"):
        BucketQuantSpec(2, None, transform=reversal)


def test_a_user_can_force_the_reference() -> None:
    pytest.importorskip("numba")
    spec = BucketQuantSpec()

    def served_by() -> str:
        return dispatch.backend(CPU, spec, 256, torch.float32).__name__

    assert served_by() != "brevitas_bp.format.reference"
    try:
        use("reference")
        assert served_by() == "brevitas_bp.format.reference"
        with use("fastest"):
            assert served_by() != "brevitas_bp.format.reference"
        assert served_by() == "brevitas_bp.format.reference"
    finally:
        use("fastest")


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="preference must be 'fastest' or 'reference'"):
        use("triton")
    assert MIN_MAX.affine
