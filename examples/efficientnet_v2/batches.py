"""Shuffled, augmented batches whose state can be saved in the middle of an epoch.

A separate generator decides order and augmentation, so every quantizer sees the same batches at one
seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from readers import Split
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Random crop out of a zero-padded image, then a random mirror image."""

    padding: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented copies of `images`, uint8 `(N, C, H, W)`."""
        if self.padding:
            images = random_crop(images, self.padding, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions, filling with zeros."""
    count, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows = (shifts[0] + torch.arange(height))[:, :, None]
    columns = (shifts[1] + torch.arange(width))[:, None, :]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    picked = padded[torch.arange(count)[:, None, None], rows, columns]
    # Copy, since .contiguous() keeps channels-last strides if the images have a single channel.
    return torch.empty_like(images).copy_(picked.permute(0, 3, 1, 2))


@dataclass
class Batches:
    """Training batches in shuffled order; an incomplete last batch is dropped.

    The state (order, position, generator) is small and complete. A copy that restores `state_dict()` in
    the middle of an epoch gives the remaining batches bit for bit.
    """

    split: Split
    batch_size: int
    augmentation: Augmentation
    generator: torch.Generator
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    position: int = 0

    def __len__(self) -> int:
        """Return the number of batches in one epoch."""
        return len(self.split) // self.batch_size

    def start_epoch(self) -> None:
        """Draw a new order."""
        self.order = torch.randperm(len(self.split), generator=self.generator)
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next images, uint8 `(batch_size, C, H, W)`, and labels."""
        start = self.position * self.batch_size
        batch = self.split.subset(self.order[start : start + self.batch_size])
        self.position += 1
        return self.augmentation(batch.images, self.generator), batch.labels

    def state_dict(self) -> dict[str, Any]:
        """Return order, position and generator."""
        return {
            "order": self.order,
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was saved."""
        self.order, self.position = state["order"], state["position"]
        self.generator.set_state(state["generator"])
