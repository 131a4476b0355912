"""The digits of scikit-learn as tensors, and a small network for them, wrapped."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from brevitas_bp import QuantBackwardWrapper

TRAINING = 1500


def digits(training: bool, limit: int | None = None) -> TensorDataset:
    """Returns images [n, 1, 8, 8] with values in 0 .. 1, and labels."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 1, 8, 8) / 16
    part = slice(None, TRAINING) if training else slice(TRAINING, None)
    return TensorDataset(images[part][:limit], labels[part][:limit])


def network() -> QuantBackwardWrapper:
    """Builds three convolutions with norms, wrapped to store their saved tensors in 2 bits."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
    return QuantBackwardWrapper(
        nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)), seed=0)
