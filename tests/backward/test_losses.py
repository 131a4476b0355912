"""Losses of input and target store their derivative by the input, or its sign."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SecondDerivativeError, track_saved_memory
from tests.backward.support import Apply

SHAPE = (16, 48)
TARGET = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
LABELS = (TARGET > 0).float()
Loss = Callable[[Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "mse": lambda z: F.mse_loss(z, TARGET.to(z.dtype)),
    "mse, sum": lambda z: F.mse_loss(z, TARGET.to(z.dtype), reduction="sum"),
    "mse, none": lambda z: F.mse_loss(z, TARGET.to(z.dtype), reduction="none").square().sum(),
    "mse, keywords": lambda z: F.mse_loss(target=TARGET.to(z.dtype), input=z),
    "module": lambda z: nn.MSELoss()(z, TARGET.to(z.dtype)),
    "smooth l1": lambda z: F.smooth_l1_loss(z, TARGET.to(z.dtype), beta=0.5),
    "huber": lambda z: F.huber_loss(z, TARGET.to(z.dtype), delta=0.7),
    "with logits": lambda z: F.binary_cross_entropy_with_logits(z, LABELS.to(z.dtype)),
    "with logits and weights": lambda z: F.binary_cross_entropy_with_logits(
        z, LABELS.to(z.dtype), torch.linspace(0.5, 2, 48, dtype=z.dtype),
        pos_weight=torch.linspace(1, 3, 48, dtype=z.dtype)),
    "of probabilities": lambda z: F.binary_cross_entropy(z.sigmoid(), LABELS.to(z.dtype)),
    "soft margin": lambda z: F.soft_margin_loss(z, 2 * LABELS.to(z.dtype) - 1),
}
SIGNS: dict[str, Loss] = {
    "l1": lambda z: F.l1_loss(z, TARGET.to(z.dtype)),
    "l1, none": lambda z: (F.l1_loss(z, TARGET.to(z.dtype), reduction="none") * 3).sum(),
}
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def at(dtype: torch.dtype = torch.float32) -> Tensor:
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    return z.requires_grad_()


def gradient(loss: Loss, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor]:
    z = at(dtype)
    value = QuantBackwardWrapper(Apply(loss), bucket_size=64, **options)(z)
    return value, torch.autograd.grad(value, z)[0]


@each_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_value_keeps_its_bits_and_the_gradient_is_near(name: str, dtype: torch.dtype) -> None:
    value, exact = gradient(LOSSES[name], dtype, policy="exact")
    again, rounded = gradient(LOSSES[name], dtype, seed=1)
    assert torch.equal(value, again) and rounded.dtype == dtype
    error = float((rounded - exact).double().norm() / exact.double().norm())
    assert 1e-3 < error < 0.15


@each_dtype
@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_exact(name: str, dtype: torch.dtype) -> None:
    value, exact = gradient(SIGNS[name], dtype, policy="exact")
    again, rounded = gradient(SIGNS[name], dtype)
    assert torch.equal(value, again)
    torch.testing.assert_close(rounded, exact)


@pytest.mark.parametrize("name", LOSSES)
def test_unbiased(name: str) -> None:
    """The mean of 200 gradients is near the exact one: sqrt(200) times nearer than one of them."""
    _, exact = gradient(LOSSES[name], policy="exact")
    draws = torch.stack([gradient(LOSSES[name], seed=seed)[1] for seed in range(200)])
    one = float((draws - exact).square().sum(dim=(1, 2)).mean())
    # The mean square of a mean of n draws is 1 / n of that of one draw; it varies little here.
    assert float((draws.mean(0) - exact).square().sum()) < 1.5 * one / 200


@pytest.mark.parametrize(("name", "tensors", "least"), [
    ("mse", 2, 13), ("with logits", 2, 13), ("l1", 1, 15)])
def test_one_tensor_is_stored_in_place_of_two(name: str, tensors: int, least: float) -> None:
    loss = {**LOSSES, **SIGNS}[name]
    model = QuantBackwardWrapper(Apply(loss), bucket_size=256, metadata_dtype=torch.bfloat16)
    with track_saved_memory(model) as report:
        value = model(at())
    value.backward()
    # Input and target; torch itself saves only their difference for l1.
    assert report.exact_bytes == tensors * 4 * TARGET.numel()
    assert report.exact_bytes / report.stored_bytes > least


def test_what_cannot_be_stored_so_runs_as_it_is() -> None:
    weight = torch.rand(SHAPE)
    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "target with a gradient": lambda z: F.mse_loss(z, z.detach().requires_grad_() * 2),
        "weighted mean": lambda z: F.mse_loss(z, TARGET, weight=weight),
        "small": lambda z: F.mse_loss(z[:2, :3], TARGET[:2, :3])}
    for loss in cases.values():
        _, exact = gradient(loss, policy="exact")
        _, same = gradient(loss)
        assert torch.equal(exact, same)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting_runs_as_it_is() -> None:
    _, exact = gradient(lambda z: F.mse_loss(z, TARGET[:1]), policy="exact")
    assert torch.equal(gradient(lambda z: F.mse_loss(z, TARGET[:1]))[1], exact)


def test_a_second_derivative_is_refused() -> None:
    z = at()
    value = QuantBackwardWrapper(Apply(LOSSES["mse"]))(z)
    with pytest.raises(SecondDerivativeError, match="mse_loss"):
        torch.autograd.grad(value, z, create_graph=True)
