"""The networks whose training steps are measured."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brevitas_bp.models import efficientnet_v2

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from small_gpt import SmallGPT
from small_llama import SmallLlama
from vision import import_torchvision


@dataclass(frozen=True)
class Task:
    """A network, an input, and the parts of the network that checkpointing recomputes."""

    model: nn.Module
    inputs: Tensor
    parts: list[nn.Module]


def efficientnet(batch: int, size: int) -> Task:
    """EfficientNetV2-S with a stem for small images."""
    model: Any = efficientnet_v2.efficientnet_v2_s(num_classes=10, stem_stride=1)
    return Task(
        model, torch.randn(batch, 3, size, size), [layer for part in model.features for layer in part])


def resnet(batch: int, size: int) -> Task:
    """torchvision's ResNet-50."""
    import_torchvision()
    model = import_torchvision("torchvision.models").resnet50(weights=None)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    return Task(model, torch.randn(batch, 3, size, size), [block for s in stages for block in s])


def small_resnet(batch: int, size: int) -> Task:
    """A ResNet of eight blocks, 16 to 128 channels wide, for 8x8 images of one channel."""
    import_torchvision()
    resnets = import_torchvision("torchvision.models.resnet")
    layers: list[nn.Module] = [
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks, width = [], 16
    for wider, stride in ((16, 1), (16, 1), (32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        shortcut = None if (wider, stride) == (width, 1) else nn.Sequential(
            nn.Conv2d(width, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))
        blocks.append(resnets.BasicBlock(width, wider, stride, shortcut))
        width = wider
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return Task(nn.Sequential(*layers, *blocks, *head), torch.randn(batch, 1, 8, 8), blocks)


def vit(batch: int, size: int) -> Task:
    """torchvision's ViT with four blocks."""
    import_torchvision()
    transformer = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        size, 4, 4, 8, 256, 1024)
    return Task(transformer, torch.randn(batch, 3, size, size), list(transformer.encoder.layers))


def gpt(batch: int, size: int) -> Task:
    """A GPT with four blocks; the sequence is ``size`` times eight tokens."""
    model = SmallGPT(context=8 * size, width=256, heads=8)
    return Task(model, torch.randint(256, (batch, 8 * size)), list(model.blocks))


def llama(batch: int, size: int) -> Task:
    """A Llama with four blocks and its loss; the sequence is ``size`` times eight tokens."""
    model = SmallLlama(vocabulary=1000, width=256, heads=8)
    return Task(model, torch.randint(1000, (batch, 8 * size + 1)), list(model.blocks))


#: Name -> task and default batch.
TASKS: dict[str, tuple[Callable[[int, int], Task], int]] = {
    "efficientnet_v2_s": (efficientnet, 32), "resnet50": (resnet, 32), "vit": (vit, 64),
    "gpt": (gpt, 16)}
#: The tasks whose memory is measured too.
MORE_TASKS = {**TASKS, "small_resnet": (small_resnet, 1000), "llama": (llama, 4)}


def step(model: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
    """Runs forward, loss and backward."""
    model(inputs).logsumexp(-1).mean().backward()


class Checkpointed(nn.Module):
    """Recomputes each part of a network in backward (checkpointing)."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.parts = task.model, task.parts

    def forward(self, inputs: Tensor) -> Tensor:
        forwards = [part.forward for part in self.parts]
        for part, forward in zip(self.parts, forwards):
            part.forward = partial(checkpoint, forward, use_reentrant=False)
        try:
            return self.model(inputs)
        finally:
            for part in self.parts:
                del part.forward
