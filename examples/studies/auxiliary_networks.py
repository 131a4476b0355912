"""Networks for the study of auxiliary activations: ResNets, and a transformer that normalizes last."""

import sys
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from vision import import_torchvision


def resnet18() -> nn.Module:
    """torchvision's ResNet-18."""
    import_torchvision()
    return import_torchvision("torchvision.models").resnet18(weights=None)


def narrow_resnet(widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> nn.Module:
    """A ResNet for CIFAR of torchvision's blocks; its stem halves the size of the images."""
    import_torchvision()
    make = import_torchvision("torchvision.models.resnet").BasicBlock
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    width = widths[0]
    for wider in widths:
        for i in range(blocks):
            shrinks = i == 0 and wider != width
            shortcut = nn.Sequential(
                nn.Conv2d(width, wider, 1, 2, bias=False), nn.BatchNorm2d(wider)) if shrinks else None
            layers.append(make(width, wider, 2 if shrinks else 1, shortcut))
            width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Attention(nn.Module):
    """Self-attention, whose sum with its input is normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.norm(x + self.out(y.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """Two linear layers with GELU, whose sum with their input is normalized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def transformer(width: int = 256, heads: int = 8, layers: int = 4) -> nn.Module:
    """An encoder: the blocks alternate between attention and feed-forward network."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [Attention(width, heads), FeedForward(width)]
    return nn.Sequential(*parts)


def transformer_runs(network: nn.Module, blocks_per_run: int) -> list[list[str]]:
    """Returns runs of neighbouring blocks."""
    names = [name for name, _ in network.named_children()]
    return [names[i:i + blocks_per_run] for i in range(0, len(names), blocks_per_run)]


#: Layers that read the input of their block.
READ_INPUT = ("query", "key", "value", "up")
