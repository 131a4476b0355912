"""A small Llama, written out: RMS norms, rotary embeddings, attention, SwiGLU, and the loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Divides each token by its root mean square, in elementary operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of features by angles that grow with the position."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    """Causal attention and a gated network, each behind an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = RMSNorm(width), RMSNorm(width)
        self.query, self.key, self.value, self.projection = (
            nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, time, width = x.shape
        normed = self.first_norm(x)
        q, k, v = (
            layer(normed).view(batch, time, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value))
        scores = rotated(q, cos, sin) @ rotated(k, cos, sin).mT * q.shape[-1] ** -0.5
        y = F.softmax(scores + mask, -1) @ v
        x = x + self.projection(y.transpose(1, 2).reshape(batch, time, width))
        normed = self.second_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class SmallLlama(nn.Module):
    """Maps tokens [batch, time + 1] to the loss of predicting each from those before it."""

    def __init__(
            self, vocabulary: int = 256, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.features = width // heads

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1] - 1
        speeds = 1e4 ** (-torch.arange(0, self.features, 2) / self.features)
        angles = torch.outer(torch.arange(time), speeds).repeat(1, 2)
        mask = torch.full((time, time), -torch.inf).triu(1)
        x = self.tokens(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin(), mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())
