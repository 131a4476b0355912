"""Small networks to plan bits for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat


class Residual(nn.Module):
    """Convolutions, norms, a gate, dropout, a tensor saved by two layers, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = F.silu(self.norm(self.left(x))) * self.right(x).sigmoid()
        x = self.twice(self.twice(x).relu())
        return self.head(F.dropout(x, 0.1, self.training).mean((2, 3)))


class Checkpointed(nn.Module):
    """A network with a checkpointed part that contains a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.part = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        part: Any = checkpoint(self.part, self.stem(x).tanh(), use_reentrant=False)
        return self.head(part)


def images() -> tuple[Tensor, Tensor]:
    """A batch with labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 10


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def residual(**options: Any) -> QuantBackwardWrapper:
    """Returns the wrapped residual network, rounded to nearest, so that seeds do not matter."""
    torch.manual_seed(2)
    return QuantBackwardWrapper(
        Residual(), ShiftedUint2DynamicActPerBucketFloat, bucket_size=64, **options)
