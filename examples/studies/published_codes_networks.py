"""The networks of ``published_codes.py``, untrained and trained for a moment."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gradient_quality import gpt, import_torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp.models import efficientnet_v2_tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from readers import read_cifar

Task = tuple[nn.Module, Tensor, Tensor | None]


def images(count: int) -> Tensor:
    """Returns images of 32 x 32 pixels without sharp edges."""
    return F.interpolate(torch.randn(count, 3, 8, 8), scale_factor=4, mode="bicubic")


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns ResNet-18 with the first layer that 32 x 32 images need."""
    import_torchvision()
    net = import_torchvision("torchvision.models").resnet18(weights=None, num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net, images(16), torch.randint(10, (16,))


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a ViT of four blocks, images and labels."""
    import_torchvision()
    net = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        32, 4, 4, 4, 128, 512, num_classes=10)
    # The head starts at zero, which would make every other gradient zero.
    nn.init.normal_(net.heads.head.weight, std=0.1)
    return net, images(8), torch.randint(10, (8,))


MODELS: dict[str, Callable[[], Task]] = {
    "efficientnet_v2_tiny": lambda: (efficientnet_v2_tiny(), images(16), torch.randint(10, (16,))),
    "resnet18": resnet18, "vit": vit, "gpt": gpt}

#: Network -> steps of training, batch 32.
TRAINED = {"efficientnet_v2_tiny": 150, "resnet18": 60}


def trained_models(data: Path, weights: Path) -> dict[str, Callable[[], Task]]:
    """Returns networks that are trained for a moment on CIFAR-10, with a batch of other images.

    Args:
        data: folder of the binary version of CIFAR-10.
        weights: folder in which trained weights are kept.
    """
    split = read_cifar(data, ["data_batch_1.bin"], 10, 1, 10_000)
    images = (split.images.float() / 255 - 0.47) / 0.25
    return {
        f"{name}, trained": partial(_trained, name, images, split.labels, weights / f"{name}.pt")
        for name in TRAINED}


def _trained(name: str, images: Tensor, labels: Tensor, path: Path) -> Task:
    net = MODELS[name]()[0]
    if not path.exists():
        torch.save(_train(net, images, labels, TRAINED[name]), path)
    net.load_state_dict(torch.load(path))
    return net, images[-16:], labels[-16:]


def _train(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
    """Trains without rounding, and returns the weights."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        batch = slice(32 * step, 32 * (step + 1))
        loss = F.cross_entropy(net.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()
