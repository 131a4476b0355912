"""Moving averages of ranges: their values, their clipping, and their bias."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import codec_from
from brevitas_bp.codec import Codec
from brevitas_bp.core.running import RunningStatistic
from brevitas_bp.core.stats import BucketAbsMax, BucketMin, BucketMinMaxRange
from brevitas_bp.quant import (
    ActQuantSolver,
    Int8DynamicActPerTensorFloatStochastic,
    PerTensorL2,
    RunningRange,
    ShiftedUint2DynamicActPerTensorFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloatStochastic,
    StochasticRounding,
    TwoBitWidth,
)
from tests.stats import hoeffding
from tests.strategies import DTYPES, dtype_name, normals
from tests.support import same_bits


class Running2(RunningRange, ShiftedUint2DynamicActPerTensorFloatStochastic):
    """Affine."""


class Running8(RunningRange, Int8DynamicActPerTensorFloatStochastic):
    """Symmetric."""


class RunningL2(RunningRange, StochasticRounding, PerTensorL2, ActQuantSolver):
    """Norm."""


class RunningMix(TwoBitWidth, Running2):
    """Two widths."""


STATISTICS: list[type[nn.Module]] = [BucketMin, BucketMinMaxRange, BucketAbsMax]
X = torch.linspace(-1, 3, 64).view(1, 64)
SCALES = [1.0, 4.0, 0.5, 2.0, 8.0]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_what_comes_out_is_the_average_of_those_before(statistic: type[nn.Module]) -> None:
    running, average = RunningStatistic(statistic(), 0.25), None
    for scale in SCALES:
        own = float(statistic()(X * scale))
        expected = own if average is None else average
        assert float(running(X * scale)) == pytest.approx(expected, rel=1e-7)
        average = own if average is None else 0.75 * average + 0.25 * own


def test_growing_statistics_are_met_in_part() -> None:
    running, growth, momentum = RunningStatistic(BucketAbsMax(), 0.2), 1.1, 0.2
    ratio = 0.0
    for t in range(60):
        own = X * growth**t
        ratio = float(running(own) / own.abs().max())
    # The influence of the start decays with ((1 - m) / g)**t; float32 cannot resolve the rest.
    assert ratio == pytest.approx(momentum / (momentum + growth - 1), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_bad_value_is_seen_and_forgotten(statistic: type[nn.Module], bad: float) -> None:
    running = RunningStatistic(statistic())
    broken = X.clone()
    broken[0, 7] = bad
    assert running(broken).isnan()
    running(X)
    before = running.running_stats.clone()
    assert running(broken).isnan()
    assert torch.equal(running.running_stats, before)
    naive = 0.9 * before + 0.1 * (broken.amax() - broken.amin())
    assert not (0.9 * naive + 0.1).isfinite()  # the control: a naive average never recovers


def test_constants_keep_their_own_statistic_and_leave_the_average_alone() -> None:
    running = RunningStatistic(BucketMinMaxRange())
    assert running(torch.zeros(1, 8)) == 0
    assert running(X) == 4  # not the range of the zeros, which would clip everything
    assert running(torch.ones(1, 8)) == 0
    assert running(X * 2) == 4


def test_the_average_stands_still_in_evaluation() -> None:
    running = RunningStatistic(BucketAbsMax()).eval()
    assert running(X) == 3
    running.train()(X)
    running.eval()
    assert running(X * 5) == running(X * 7) == 3


def test_averages_of_the_largest_floats_are_finite() -> None:
    running = RunningStatistic(BucketMin(), 0.5)
    for sign in (1, -1, 1, -1):
        running(X * sign * 1e38)
    assert running.running_stats.isfinite()
    running = RunningStatistic(BucketMin(), 0.5)
    for sign in (1, -1, 1, -1):
        running(X.double() * sign * 5e307)
    assert running.running_stats.isfinite()


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="range_momentum must be in"):
        codec_from(Running2, range_momentum=momentum)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Running2, {"bucket_size": 256}, "one bucket per tensor, got bucket_size=256"),
    (Running2, {"range_momentun": 0.1}, "did you mean 'range_momentum'"),
    (type("Wrong", (RunningRange, ShiftedUint8DynamicActPerBucketFloatStochastic), {}), {},
     "got bucket_size=256")]


@pytest.mark.parametrize(("config", "settings", "message"), REFUSED)
def test_what_has_no_range_of_its_own_is_refused(
        config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_from(config, **settings)


@pytest.mark.parametrize("config", [Running2, Running8, RunningL2, RunningMix])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_first_tensor_is_stored_as_without(config: Any, dtype: torch.dtype) -> None:
    x = normals((3, 50)).to(dtype)
    plain: Any = type("Plain", (config,), {})
    first, again = codec_from(config), codec_from(plain)
    packed = first.encode(x, seed=1)
    assert same_bits(packed.decode(), again.encode(x, seed=1).decode())
    assert packed.decode().dtype == dtype
    # The range is four times as wide as the next tensor's: the error is that of the old range.
    second = first.encode(x / 4, seed=1)
    assert torch.equal(second.tensors[1], packed.tensors[1])


def mean_error(codec: Codec, x: Tensor, draws: int) -> Tensor:
    return sum(codec.encode(x, seed=seed).decode() for seed in range(draws)) / draws - x


def test_the_bias_is_what_is_clipped() -> None:
    lo, hi, draws = -1.0, 2.0, 300
    codec = codec_from(Running2, range_momentum=1e-12)  # so that the range stays constant
    codec.encode(torch.linspace(lo, hi, 64), seed=0)
    x = torch.linspace(-1.5, 4, 64)
    bias = x.clamp(lo, hi) - x
    outside = bias != 0
    limit = hoeffding(draws, tests=64) * (hi - lo) / 3
    error = mean_error(codec, x, draws)
    # The error is exactly the clipped part, and only noise inside the range. Slack: a few float steps.
    assert torch.allclose(error[outside], bias[outside], atol=1e-5)
    assert (error[~outside].abs() <= limit).all()
    assert bias.abs().max() > 5 * limit
    # The control: the range of the tensor itself clips nothing.
    own = codec_from(ShiftedUint2DynamicActPerTensorFloatStochastic)
    assert (mean_error(own, x, draws).abs() <= hoeffding(draws, tests=64) * 5.5 / 3).all()
