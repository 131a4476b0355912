"""Gradients of whole networks over many seeds are right on average; rounding every tensor alike is not.

``examples/studies/gradient_quality.py`` measures networks of usual size.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper
from tests.backward.support import Apply, cotangent

SEEDS = 500
# |mean - exact|^2, in units of its expectation, most probably exceeds a bound if all variance lies in
# one direction: P(chi^2_1 > 40) = 3e-10, for each of some twenty parameters.
LIMIT = 40


class Attention(nn.Module):
    """Two heads behind one projection, a GELU network, and optionally layer norms."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(4, 16, 2, 16).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 16, 32)
        return x + self.down(F.gelu(self.up(self.norm(y + x))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(128, 10), nn.LogSoftmax(1))


#: name -> (network, input, largest relative bias of a parameter). The bias is 0 except for norms over
#: M = 32 elements: two norms, with a variance below 1 each.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "convolutions": (convolutions, (4, 3, 16, 16), 0.0),
    "transformer": (lambda: nn.Sequential(Attention(False), Attention(False)), (4, 16, 32), 0.0),
    "transformer with norms": (
        lambda: nn.Sequential(Attention(True), Attention(True)), (4, 16, 32), 4 / 32),
    "gates": (lambda: nn.Sequential(
        nn.Linear(32, 32), Apply(lambda x: x * torch.sigmoid(x[:, :1].expand_as(x)) * x.tanh()),
        nn.Linear(32, 8)), (64, 32), 0.0),
}


def excess(name: str, **options: Any) -> float:
    """Returns the largest ratio of |mean - exact| to what chance and the norms' bias explain."""
    build, shape, bias = NETWORKS[name]
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape)
    wrapped = QuantBackwardWrapper(module, bucket_size=64, seed=0, **options)

    def gradients(model: nn.Module) -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(1)
        output = model(x)
        output.backward(cotangent(output))
        return [p.grad.double() for p in module.parameters() if p.grad is not None]

    exact = gradients(module)
    mean = [torch.zeros_like(g) for g in exact]
    square = [0.0] * len(exact)
    for _ in range(SEEDS):
        for i, (g, e) in enumerate(zip(gradients(wrapped), exact)):
            mean[i] += (g - e) / SEEDS
            square[i] += float((g - e).square().sum()) / SEEDS
    ratios = []
    for m, s, e in zip(mean, square, exact):
        # The last term is for parameters that no rounding reaches: they differ by float32 rounding only.
        chance = math.sqrt(LIMIT * s / SEEDS) + bias * float(e.norm()) + 1e-6 * float(e.norm())
        ratios.append(float(m.norm()) / chance if chance else 0.0)
    return max(ratios)


@pytest.mark.parametrize("name", NETWORKS)
def test_mean_gradient_of_every_parameter_is_the_exact_one(name: str) -> None:
    assert excess(name) <= 1


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_rounding_everything_alike_is_biased(name: str) -> None:
    assert excess(name, policy="all") > 1.5
