"""Shared by the tests of the trainers."""

import torch
from torch import nn


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have equal names, parameters and buffers, bit for bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
