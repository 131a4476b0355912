"""Small networks and data for learned quantization."""

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp.nn.learned import adam, learn_quantization

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
#: The example of the thesis' formulas: P, s.
P = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
S = 0.25


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def learned_mlp(lam: float | None = 1e-3, scale_init: float = 0.02, **options: Any) -> nn.Sequential:
    net = mlp()
    learn_quantization(
        net, **{"granularity": "row", "lam": lam, "scale_init": scale_init, **options})
    return net


def gradients(model: nn.Module, net: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """Returns the gradients of ``net`` after a backward pass through ``model``, which contains it."""
    net.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's digits, [1797, 64] in 0..16, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels)


def train_on_digits(lam: float, epochs: int = 6) -> nn.Module:
    """Trains a small network with the gradient-ratio rule."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    learn_quantization(net, granularity="row", lam=lam)
    optimizer = adam(net, lr=1e-3)
    x, labels = digits()
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
    return net
