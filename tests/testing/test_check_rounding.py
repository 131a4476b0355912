"""``check_rounding``: each check finds its defect, and the roundings of the library pass."""

from typing import Any

import pytest
import torch
from brevitas.core.function_wrapper import RoundSte
from torch import Tensor, nn

from brevitas_bp import StochasticRound
from brevitas_bp.core.rounding import DitheredRound
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.format.stages import NEAREST, Rounding
from brevitas_bp.testing import ROUNDING_CHECKS, check_rounding


def noise(u: Tensor) -> Tensor:
    return torch.ops.brevitas_bp.noise_like(u)


def rounded(u: Tensor, noise: Tensor) -> Tensor:
    return u.floor() + (noise < u - u.floor()).to(u.dtype)


class Sound(nn.Module):
    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, noise(u))


class WidensDtypes(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return torch.floor(u + noise(u))


class Halves(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(2 * u, noise(u)) / 2


class OneTooMany(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + 1


class Far(Sound):
    """Unbiased, with a step on both sides more."""

    def forward(self, u: Tensor) -> Tensor:
        far = (noise(u) * 8).floor()
        return torch.where(u == u.floor(), u, rounded(u, noise(u)) + (far == 0).to(u.dtype)
                           - (far == 1).to(u.dtype))


class HidesNaN(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u.nan_to_num(0))


class SpreadsNaN(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + 0 * u.sum(-1, keepdim=True)


class OneDraw(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, noise(u.new_zeros(1)))


class OneDrawPerElement(Sound):
    """The same noise in all buckets."""

    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, noise(u[:1]))


class OneDrawPerBucket(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, noise(u[..., :1]))


class FourBits(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, (noise(u) * 16).floor() / 16)


class Falls(Sound):
    """Rounds down the more often, the nearer the next integer is."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.where(u == u.floor(), u, u.floor() + (noise(u) > u - u.floor()).to(u.dtype))


class Global(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, torch.rand_like(u, dtype=torch.float32))


class Secret(Sound):
    def forward(self, u: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return rounded(u, torch.rand_like(u, dtype=torch.float32))


class Constant(Sound):
    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, torch.rand(u.shape, generator=torch.Generator().manual_seed(0)))


class Across(Sound):
    """Says that it works bucket by bucket, and looks at all buckets."""

    def forward(self, u: Tensor) -> Tensor:
        return rounded(u, (noise(u) + u.mean()) % 1)


class OtherRow(Sound):
    """Names a row of the stage table that computes something else."""

    def bucket_stage(self, slot: str) -> Rounding | None:
        return NEAREST if slot == "float_to_int_impl" else None


#: check -> (broken rounding, settings, what the message says).
BROKEN: list[tuple[str, type[nn.Module], dict[str, Any], str]] = [
    ("integers", WidensDtypes, {}, "expected codes of float16, got float32"),
    ("integers", Halves, {}, r"expected integers, got \d+\.5"),
    ("fixed points", OneTooMany, {}, "expected the same integers, got -255.0 in place of -256.0"),
    ("neighbours", Far, {}, "expected the integer below or above"),
    ("non-finite", HidesNaN, {}, "expected NaN or Inf in its place, got"),
    ("non-finite", SpreadsNaN, {}, "expected 15 finite codes beside it, got 8"),
    ("independence", OneDraw, {}, "expected a correlation within .* of 0, got 1"),
    ("independence", OneDrawPerBucket, {}, "expected a correlation within"),
    ("independence", OneDrawPerElement, {}, "in the same place of two buckets"),
    ("mean", FourBits, {}, r"expected E\[q\] = u, got .*rounding is biased"),
    ("mean", RoundSte, {}, r"expected E\[q\] = u, got .*all draws are alike"),
    ("monotone", Falls, {"unbiased": False}, "expected a mean of at least .*, as of a position"),
    ("seed", Global, {}, "expected torch's global generator as it was"),
    ("seed", Secret, {}, r"torch.manual_seed\(1\) and \(2\): expected the same codes"),
    ("seed", Constant, {}, "expected other codes, because unbiased is True, got the same codes"),
    ("buckets", Across, {}, "buckets 2 to 4 of 8, rounded alone: expected the codes that they have"),
    ("quantizer", Halves, {}, "Expected no error, got UnsupportedQuantizerError: .*must give integers"),
    ("quantizer", OtherRow, {}, "as codec and as module: expected the same values"),
    ("gradient", Sound, {"straight_through": True}, "expected ones, because straight_through is True")]


@pytest.mark.parametrize(("check", "broken", "settings", "told"), BROKEN)
def test_a_broken_rounding_is_found(
        check: str, broken: type[nn.Module], settings: dict[str, Any], told: str) -> None:
    without = [name for name in ROUNDING_CHECKS if name != check]
    with pytest.raises(AssertionError, match=told) as caught:
        check_rounding(broken, without=without, **settings)
    text = str(caught.value)
    assert f"{broken.__name__} fails the check {check!r}" in text
    assert ROUNDING_CHECKS[check].invariant in text


def test_every_check_has_a_broken_rounding() -> None:
    assert {check for check, *_ in BROKEN} == set(ROUNDING_CHECKS)


def test_sound_roundings_pass() -> None:
    everything = set(ROUNDING_CHECKS)
    assert set(check_rounding(StochasticRound, straight_through=True)) == everything
    assert set(check_rounding(Sound())) == everything - {"gradient"}
    nearest = check_rounding(RoundSte(), unbiased=False, straight_through=True)
    assert set(nearest) == everything - {"mean", "independence", "buckets"}
    # With 16-bit noise, sums are themselves rounded. Bucket quantizers compute in 32 and 64 bits.
    dithered = check_rounding(
        DitheredRound, straight_through=True, dtypes=(torch.float32, torch.float64))
    assert set(dithered) == everything - {"fixed points", "neighbours", "monotone"}


def test_generators_are_afterwards_as_they_were() -> None:
    state = torch.get_rng_state()
    check_rounding(Sound(), draws=128)
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match="expected a module that rounds, or its class, got 3"):
        check_rounding(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownNameError, match="no check 'neighbour' to leave out; did you mean 'neigh"):
        check_rounding(Sound(), without=["neighbour"])
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        check_rounding(Sound(), draws=0)
    with pytest.raises(ValueError, match="draws see a bias of"):
        check_rounding(Sound(), draws=4)
