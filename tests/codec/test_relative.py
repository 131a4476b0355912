"""Each element has an error relative to itself, whatever else is in its bucket."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.activations.forms import OF_INPUT, OF_OUTPUT, Form, of_power
from brevitas_bp.codec import Copy
from brevitas_bp.codec.formed import FormCodec
from brevitas_bp.codec.relative import RelativeCodec
from brevitas_bp.format.relative import BUCKET
from brevitas_bp.testing import check_codec
from tests.stats import bernstein

COPIES = 1 << 12
LEVELS = 125


def spread(octaves: float) -> Tensor:
    """Returns a bucket of values of both signs whose magnitudes differ by ``2**octaves``."""
    x = torch.exp2(torch.linspace(-octaves / 2, octaves / 2, BUCKET))
    return x * torch.where(torch.arange(BUCKET) % 3 == 0, -1, 1)


def ratio_of(octaves: float) -> float:
    """Returns the ratio of neighbouring levels; both ends of the range are rounded to 1/4."""
    return 2**((octaves + 0.5) / (LEVELS - 1))


def test_it_keeps_what_codecs_must_keep() -> None:
    check_codec(RelativeCodec(), stochastic=True, largest_error=0.1)


@pytest.mark.parametrize("octaves", [0, 1, 10, 35, 127, 250])
def test_unbiased_with_the_stated_error(octaves: float) -> None:
    x = spread(octaves)
    decoded = RelativeCodec().encode(x.repeat(COPIES), seed=1).decode().view(COPIES, BUCKET)
    error = (decoded / x).double() - 1
    ratio = ratio_of(octaves)
    # The two levels around 1 are at most this far from it.
    assert float(error.abs().max()) <= ratio - 1 + 1e-4
    limit = (ratio - 1) / (2 * math.sqrt(ratio))
    # Errors in units of (ratio - 1); 1e-5 for the arithmetic of levels in float32.
    off = bernstein(limit**2 / (ratio - 1)**2, COPIES, BUCKET) * (ratio - 1) + 1e-5
    assert bool((error.mean(0).abs() <= off).all())
    # A sample variance of COPIES draws in an interval of (ratio - 1).
    more = float(bernstein(0.25, COPIES, BUCKET)) * (ratio - 1)**2
    assert bool((error.square().mean(0) <= limit**2 + more + 1e-9).all())


def test_equal_steps_have_no_such_error() -> None:
    """The control: 8 bits with equal steps give small elements errors of any size."""
    x = spread(40).abs()
    step = float(x.max()) / 255
    rounded = (x / step + torch.rand(COPIES, BUCKET, generator=torch.Generator().manual_seed(0))).floor()
    assert float((rounded * step / x - 1).square().mean(0).max()) > 1000


def test_zeros_infinities_and_nan_are_exact_and_change_no_other_element() -> None:
    x = spread(10)
    alone = RelativeCodec().encode(x, seed=0).decode()
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    mixed = x.clone()
    mixed[10:14] = special
    decoded = RelativeCodec().encode(mixed, seed=0).decode()
    assert torch.equal(decoded[10:14].nan_to_num(7), special.nan_to_num(7))
    assert torch.equal(decoded[14:], alone[14:]) and torch.equal(decoded[:10], alone[:10])


def test_bytes() -> None:
    packed = RelativeCodec().encode(torch.randn(1000), seed=0)
    assert packed.nbytes == 1000 + 4 * 4
    assert RelativeCodec().encode(torch.randn(1000).double(), seed=0).nbytes == 1000 + 4 * 8


_ROOT = torch.linspace(1e-3, 0.999, 64).double()
_FORMS: dict[str, tuple[Form, Tensor]] = {
    **{f"input of {name}": (form, 1 + 50 * _ROOT if "cosh" in name and name[0] == "a" else _ROOT)
       for name, form in OF_INPUT.items()},
    **{f"output of {name}": (form, 100 * _ROOT) for name, form in OF_OUTPUT.items()},
    **{f"power {e}": (form, 3 * _ROOT) for e in (-3, -1, -0.5, 0.5, 1.5, 2.5, 3)
       if (form := of_power(e)) is not None}}


@pytest.mark.parametrize("name", _FORMS)
def test_the_way_back_undoes_the_way_forth(name: str) -> None:
    form, x = _FORMS[name]
    for values in (x, torch.cat((x, x.flip(0))).view(2, 64).T, x[:1].expand(9), x[:0], x[0]):
        restored = FormCodec(Copy(), form).encode(values, seed=0).decode()
        assert restored.stride() == values.stride()
        torch.testing.assert_close(restored, values, rtol=1e-9, atol=1e-12)
    stored = form.forth(x.float())
    torch.testing.assert_close(form.forth(form.back(stored)), stored, rtol=1e-3, atol=1e-6)


def test_exponents_near_one_have_no_form() -> None:
    assert of_power(1.0) is None and of_power(1.1) is None and of_power(100.0) is None
    assert of_power(0.75) is not None
