"""Tells how the installed torch behaves where releases differ: by trial, not by version number."""

import re
from collections.abc import Callable
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch import Tensor

#: The oldest release of torch that supports all features.
OLDEST_TORCH = (2, 10)


def refuse_old_torch(version: str) -> None:
    """Refuses a release of torch that lacks what the library needs.

    Raises:
        ImportError: the release is too old; the message names the one that is needed.
    """
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < OLDEST_TORCH:
        raise ImportError(
            f"brevitas_bp needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and {version} is "
            "installed: pip install --upgrade torch")


refuse_old_torch(torch.__version__)


def undisturbed(function: Callable[[], Any]) -> Any:
    """Returns the result of a function, run without the caller's modes, hooks and default device.

    In torch these belong to a thread, so the function runs in a thread of its own.

    Raises:
        Exception: whatever the function raises.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = Thread(target=run, name="brevitas_bp probe")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def slope(function: Callable[[Tensor], Tensor], at: float) -> float:
    """Returns autograd's gradient of a function of a CPU tensor at one point."""
    def differentiate() -> float:
        x = torch.tensor([at], requires_grad=True)
        return float(torch.autograd.grad(function(x).sum(), x)[0])

    return undisturbed(differentiate)


@cache
def clamp_keeps_borders() -> bool | None:
    """Whether ``clamp`` with numbers passes the gradient at a bound: up to torch 2.13 it does.

    None: it passes only a part of the gradient, or treats the bounds differently.
    """
    slopes = {
        slope(lambda x: x.clamp(0.0, 1.0), 0.0), slope(lambda x: x.clamp(0.0, 1.0), 1.0),
        slope(lambda x: x.clamp_min(0.0), 0.0), slope(lambda x: x.clamp_max(0.0), 0.0)}
    return {1.0: True, 0.0: False}.get(slopes.pop()) if len(slopes) == 1 else None
