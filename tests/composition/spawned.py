"""Code for a separate process: one backward of a model received by pickle."""

from typing import Any

import torch
from torch import Tensor, nn


def train(model: nn.Module, x: Tensor, queue: Any, release: Any) -> None:
    """Sends the gradients, and doubles the first parameter in shared memory."""
    torch.set_num_threads(1)
    model(x).square().sum().backward()
    grads = [p.grad.numpy().tolist() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    queue.put((repr(model), grads))
    release.wait()
