"""check_gradients reports the true error, finds what spoils the gradient, and leaves no trace."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, SavedTensor, check_gradients
from brevitas_bp.allocate import GradientCheck, GradientMonitor, measure_gradient_error
from brevitas_bp.backward.saved import Decision
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloatStochastic,
)

TWO = ShiftedUint2DynamicActPerBucketFloatStochastic


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 4))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logsumexp(1).mean()


def _batch(rows: int = 64) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


def test_the_error_is_that_of_measure_gradient_error() -> None:
    model, x = QuantBackwardWrapper(_net(), TWO, seed=0), _batch()
    check = check_gradients(model, x, _loss, draws=64, top=0)
    total = measure_gradient_error(model, lambda m: _loss(m, x), draws=64).total
    measured = math.hypot(total.noise, total.bias)
    assert check.error == pytest.approx(measured, rel=0.15)
    assert check.signal == pytest.approx(1, abs=0.1)
    assert check.sites == []


def test_exact_gradients_have_no_error() -> None:
    check = check_gradients(QuantBackwardWrapper(_net(), policy="exact"), _batch(), _loss)
    assert (check.error, check.signal, check.kinds, check.sites) == (0.0, 1.0, [], [])
    assert check.ok and "close" in str(check)


def test_kinds_add_up_to_the_whole() -> None:
    check = check_gradients(QuantBackwardWrapper(_net(), TWO, seed=0), _batch(), _loss, draws=16)
    assert {kind.name for kind in check.kinds} == {
        "inputs of layers", "inputs of norms", "derivatives and factors"}
    # Roundings are independent, so their squared errors add up. Each is measured in one draw.
    total = sum(kind.error ** 2 for kind in check.kinds)
    assert total == pytest.approx(check.error ** 2, rel=0.5)
    assert [kind.error for kind in check.kinds] == sorted(
        (kind.error for kind in check.kinds), reverse=True)


# Large rows beside small rows. The larger a row, the smaller its gradient.
_SIZES = torch.logspace(-4, 4, 64)[torch.arange(64) * 27 % 64].unsqueeze(-1)


class _Grow(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y * _SIZES


class _Flat(OpAware):
    """Rounds the input of one layer in buckets that mix rows of any size."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        return decision._replace(rows=None) if saved.path == "4" else decision


def _spoiled_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) / _SIZES).sum()


def _spoiled() -> nn.Sequential:
    parts = list(_net())
    return nn.Sequential(*parts[:3], _Grow(), *parts[3:])


def test_the_worst_tensor_is_found_with_its_remedy() -> None:
    net, x = _spoiled(), _batch()
    model = QuantBackwardWrapper(net, TWO, policy=_Flat(), seed=0, bucket_size=256)
    check = check_gradients(model, x, _spoiled_loss)
    assert not check.ok and check.error > 2
    assert check.sites[0].name == "4:linear:argument 0"
    text = str(check)
    assert "wrong" in text and "overrides={'4': None}" in text
    assert any(kind.remedy.startswith("bit_width=") for kind in check.kinds)
    repaired = QuantBackwardWrapper(net, TWO, overrides={"4": None}, seed=0, bucket_size=256)
    assert check_gradients(repaired, x, _spoiled_loss).ok


def test_more_bits_are_the_remedy() -> None:
    x = _batch(16)
    model = QuantBackwardWrapper(_net(), TWO, bit_width=1, seed=0)
    before = check_gradients(model, x, _loss, draws=8)
    norms = next(kind for kind in before.kinds if kind.name == "inputs of layers")
    assert norms.remedy == f"bit_width={1 + math.ceil(math.log2(norms.error / 0.5))}"
    eight = QuantBackwardWrapper(_net(), ShiftedUint8DynamicActPerBucketFloatStochastic, seed=0)
    assert check_gradients(eight, x, _loss, draws=8).verdict == "close to the exact one"


def test_it_leaves_no_trace() -> None:
    net = nn.Sequential(_net(), nn.BatchNorm1d(4), nn.Dropout(0.3))
    model, x = QuantBackwardWrapper(net, TWO, seed=5), _batch()
    state = torch.get_rng_state()
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    noise = model.noise_state()
    policy = model._policy
    check_gradients(model, x, _loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers())
    assert model.noise_state() == noise and model._policy is policy
    assert all(p.grad is None for p in net.parameters())


def test_wrappers_inside_of_a_model_are_checked() -> None:
    net = _net()
    model = nn.Sequential(QuantBackwardWrapper(net[:3], TWO), QuantBackwardWrapper(net[3:], TWO))
    check = check_gradients(model, _batch(), _loss)
    assert check.error > 0 and len(check.kinds) == 3


def test_a_gradient_that_is_not_finite_is_called_wrong() -> None:
    check = GradientCheck(math.nan, math.nan, 1)
    assert not check.ok and "not finite" in str(check)


def test_bad_arguments_say_what_to_do() -> None:
    model, x = QuantBackwardWrapper(_net(), TWO), _batch()
    with pytest.raises(TypeError, match=r"check_gradients: model must be a QuantBackwardWrapper"):
        check_gradients(_net(), x, _loss)
    with pytest.raises(ValueError, match="draws must be an integer of 1 or more"):
        check_gradients(model, x, _loss, draws=0)
    with pytest.raises(ValueError, match="top must be an integer of 0 or more"):
        check_gradients(model, x, _loss, top=-1)
    with pytest.raises(ValueError, match="loss must return a scalar tensor"):
        check_gradients(model, x, lambda m, x: m(x))
    with pytest.raises(ValueError, match="must be finite and not zero"):
        check_gradients(model, x, lambda m, x: _loss(m, x) * 0)
    with pytest.raises(ValueError, match="must be finite and not zero"):
        check_gradients(model, x, lambda m, x: _loss(m, x) * math.nan)
    with pytest.raises(ValueError, match="every must be a positive number"):
        GradientMonitor(model, _loss, every=0)


def test_a_monitor_logs_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    model, x = QuantBackwardWrapper(_net(), TWO, seed=0), _batch()
    monitor = GradientMonitor(model, _loss, every=3)
    with caplog.at_level(logging.INFO, logger="brevitas_bp"):
        errors = [monitor.step(x) for _ in range(7)]
    assert [error is not None for error in errors] == [True, False, False] * 2 + [True]
    assert [step for step, _ in monitor.history] == [0, 3, 6]
    assert all(0 < error < 2 for _, error in monitor.history)
    assert [r.levelname for r in caplog.records] == ["INFO"] * 3
    bad = QuantBackwardWrapper(_spoiled(), TWO, policy=_Flat(), seed=0, bucket_size=256)
    with caplog.at_level(logging.INFO, logger="brevitas_bp"):
        GradientMonitor(bad, _spoiled_loss).step(x)
    assert caplog.records[-1].levelname == "WARNING"
