"""If backward is linear in the saved tensors, quantized gradients are right on average."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from brevitas_bp import Codec, QuantBackwardWrapper, SavedTensor
from brevitas_bp.quant import (
    ShiftedUint1DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import QUANTIZING, cotangent, run, wrapped_run

Nearest2 = ShiftedUint2DynamicActPerBucketFloat
Stochastic2 = ShiftedUint2DynamicActPerBucketFloatStochastic
Uint2Mix4 = ShiftedUint2Mix4DynamicActPerBucketFloatStochastic
BUCKET = 64
DRAWS = 400
ALPHA = 1e-9


def z_bound(entries: int) -> float:
    """Returns a bound that |z| exceeds in any of ``entries`` with probability at most ALPHA.

    P(|z| > t) <= 2 exp(-t^2 / 2). Every mean tested here is a sum of more than a thousand independent
    bounded terms, so it is normal.
    """
    return math.sqrt(2 * math.log(2 * entries / ALPHA))


def rounding_variance(x: Tensor, levels: int, bucket: int) -> Tensor:
    """Returns each decoded element's variance: step^2 a (1 - a), a the distance to the level below."""
    flat = F.pad(x.flatten(), (0, -x.numel() % bucket), mode="constant", value=float(x.flatten()[-1]))
    buckets = flat.double().view(-1, bucket)
    lo, hi = buckets.aminmax(dim=1, keepdim=True)
    step = (hi - lo) / levels
    a = ((buckets - lo) / step).frac()
    return (step**2 * a * (1 - a)).flatten()[:x.numel()].view(x.shape)


class Affine(nn.Module):
    """A scale and a shift for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class LinearStack(nn.Module):
    """Convolutions, an affine layer and a linear layer: the output is affine in every saved tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.affine = nn.Conv2d(3, 6, 3, padding=1), Affine(6)
        self.second, self.last = nn.Conv2d(6, 4, 3, stride=2), nn.Linear(4 * 25, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.affine(self.first(x))).flatten(1))

    def variances(self, x: Tensor, levels: int) -> dict[str, Tensor]:
        """Returns the variance of every weight gradient: its formula with squared factors."""
        first = self.first(x)
        affine = self.affine(first)
        second = self.second(affine)
        output = self.last(second.flatten(1))
        seen = torch.autograd.grad(
            output, (first, affine, second, output), cotangent(output))
        of_first, of_affine, of_second, of_output = (delta.double().square() for delta in seen)
        at_input, at_affine, at_second, at_last = (
            rounding_variance(saved.detach(), levels, BUCKET)
            for saved in (x, first, affine, second.flatten(1)))
        return {
            "first.weight": conv2d_weight(at_input, self.first.weight.shape, of_first, padding=1),
            "affine.scale": (at_affine * of_affine).sum((0, 2, 3)).view(6, 1, 1),
            "second.weight": conv2d_weight(at_second, self.second.weight.shape, of_second, stride=2),
            "last.weight": of_output.t() @ at_last}


@pytest.fixture(scope="module")
def stack() -> tuple[LinearStack, Tensor]:
    torch.manual_seed(0)
    return LinearStack(), torch.randn(4, 3, 11, 11)


def z_scores(stack: tuple[LinearStack, Tensor], quantizer: type, policy: str) -> Tensor:
    """Returns (mean - exact) / (theoretical deviation of the mean) for every entry of every weight."""
    module, x = stack
    exact = run(module, x).grads
    variances = module.variances(x, levels=3)
    model = QuantBackwardWrapper(module, quantizer, policy=policy, bucket_size=BUCKET, seed=0)
    totals = {name: torch.zeros_like(v) for name, v in variances.items()}
    for _ in range(DRAWS):
        module.zero_grad()
        output = model(x)
        output.backward(cotangent(output))
        for name, total in totals.items():
            total += module.get_parameter(name).grad  # pyright: ignore[reportOperatorIssue]
    return torch.cat([
        ((totals[name] / DRAWS - exact[name]) * (DRAWS / variance).sqrt()).flatten()
        for name, variance in variances.items()])


@pytest.mark.parametrize("policy", QUANTIZING)
def test_stochastic_rounding_is_unbiased_end_to_end(
        stack: tuple[LinearStack, Tensor], policy: str) -> None:
    z = z_scores(stack, Stochastic2, policy)
    assert z.abs().max() <= z_bound(z.numel())


@pytest.mark.parametrize("policy", QUANTIZING)
def test_nearest_rounding_is_biased_end_to_end(
        stack: tuple[LinearStack, Tensor], policy: str) -> None:
    z = z_scores(stack, Nearest2, policy)
    assert z.abs().max() > 2 * z_bound(z.numel())


@pytest.mark.parametrize("policy", QUANTIZING)
def test_mixed_widths_are_unbiased_end_to_end(
        stack: tuple[LinearStack, Tensor], policy: str) -> None:
    # The 4-bit grid contains the 2-bit one (15 = 5 * 3), so no element varies more than at 2 bits.
    z = z_scores(stack, Uint2Mix4, policy)
    assert z.abs().max() <= z_bound(z.numel())


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("quantizer", [Stochastic2, Nearest2, Uint2Mix4], ids=lambda q: q.__name__)
def test_gradients_of_inputs_and_biases_are_exact(
        stack: tuple[LinearStack, Tensor], quantizer: type, policy: str) -> None:
    module, x = stack
    plain = run(module, x).grads
    wrapped = wrapped_run(module, x, act_quant=quantizer, policy=policy).grads
    for name in ("input 0", "first.bias", "affine.shift", "second.bias", "last.bias"):
        assert torch.equal(wrapped[name], plain[name])
    for name in ("first.weight", "affine.scale", "second.weight", "last.weight"):
        assert not torch.equal(wrapped[name], plain[name])


@pytest.mark.parametrize("policy", QUANTIZING)
def test_variance_of_a_linear_layer(policy: str) -> None:
    # Sum of the variances of all entries = sum_n |delta_n|^2 sum_d Var(x~_nd).
    torch.manual_seed(0)
    module, x = nn.Linear(64, 16, bias=False), torch.randn(32, 64)
    delta = cotangent(module(x)).double()
    predicted = (delta.square().sum(1) * rounding_variance(x, 3, BUCKET).sum(1)).sum()
    exact = run(module, x).grads["weight"]
    model = QuantBackwardWrapper(module, Stochastic2, policy=policy, bucket_size=BUCKET, seed=0)
    squares = []
    for _ in range(DRAWS):
        module.zero_grad()
        squares.append((run(model, x, copied=False).grads["weight"] - exact).square().sum())
    # The squared length of a Gaussian vector has a variance of at most 2 * (its mean)^2.
    tolerance = z_bound(1) * math.sqrt(2 / DRAWS)
    assert abs(torch.stack(squares).mean() / predicted - 1) <= tolerance


# Batch norm: the normalized input enters twice, so a bias of order 1 / M remains.

M, CHANNELS, COPIES = 4, 32, 4000


def batch_norm_gradients() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns exact input gradient, mean over draws, predicted bias, and a bound on that mean.

    Copies of the channels lie side by side, and each copy is a bucket in every row. So one backward
    draws all copies.
    """
    torch.manual_seed(0)
    x, dy = torch.randn(M, CHANNELS), torch.randn(M, CHANNELS)
    module = nn.BatchNorm1d(CHANNELS * COPIES)

    def only_input(saved: SavedTensor) -> Codec | None:
        return saved.codec if saved.tensor.dim() == 2 else None

    model = QuantBackwardWrapper(
        module, ShiftedUint1DynamicActPerBucketFloatStochastic, policy=only_input,
        bucket_size=CHANNELS, seed=0)
    leaf = x.repeat(1, COPIES).requires_grad_()
    model(leaf).backward(dy.repeat(1, COPIES))
    assert leaf.grad is not None
    mean = leaf.grad.double().view(M, COPIES, CHANNELS).mean(1)

    x, dy = x.double(), dy.double()
    inv_std = 1 / (x.var(0, unbiased=False) + module.eps).sqrt()
    xhat = (x - x.mean(0)) * inv_std
    variance = rounding_variance(x, 1, CHANNELS) * inv_std**2
    product = (dy * xhat).mean(0)
    exact = inv_std * (dy - dy.mean(0) - xhat * product)
    bias = -inv_std * dy * variance / M
    # xhat~ = xhat + e, product~ = product + f. Minkowski, with |e| below the step:
    # |xhat~ product~ - mean| <= |xhat| sd(f) + |product| sd(e) + step sd(f).
    sd_f = (dy.square() * variance).sum(0).sqrt() / M
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) * inv_std
    deviation = inv_std * ((xhat.abs() + step) * sd_f + product.abs() * variance.sqrt())
    return exact, mean, bias, deviation / math.sqrt(COPIES)


def test_batch_norm_has_the_predicted_bias() -> None:
    exact, mean, bias, deviation = batch_norm_gradients()
    tolerance = z_bound(bias.numel()) * deviation
    assert ((mean - exact).abs() > tolerance).any()  # the control: it is biased
    assert ((mean - exact - bias).abs() <= tolerance).all()
