"""What this release of torch does where releases differ: found out by trying, not by its number."""

import re
from collections.abc import Callable
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch import Tensor

#: The oldest release of torch in which everything works.
OLDEST_TORCH = (2, 10)


def refuse_old_torch(version: str) -> None:
    """Refuses a release that lacks what the library is built on.

    Raises:
        ImportError: says which is needed.
    """
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < OLDEST_TORCH:
        raise ImportError(
            f"brevitas_bp needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and {version} is "
            "installed: pip install --upgrade torch")


refuse_old_torch(torch.__version__)


def undisturbed(function: Callable[[], Any]) -> Any:
    """The result of a function that knows nothing of the caller's modes, hooks and devices.

    Those of torch belong to a thread, so it runs in one of its own.

    Raises:
        Exception: what the function raises.
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
    """The gradient that autograd gives of a function of a CPU tensor at one point."""
    def differentiate() -> float:
        x = torch.tensor([at], requires_grad=True)
        return float(torch.autograd.grad(function(x).sum(), x)[0])

    return undisturbed(differentiate)


@cache
def clamp_keeps_borders() -> bool | None:
    """Whether ``clamp`` with numbers passes the gradient at a bound: up to torch 2.13 it does.

    None: it passes a part of it, or not the same at every bound.
    """
    slopes = {
        slope(lambda x: x.clamp(0.0, 1.0), 0.0), slope(lambda x: x.clamp(0.0, 1.0), 1.0),
        slope(lambda x: x.clamp_min(0.0), 0.0), slope(lambda x: x.clamp_max(0.0), 0.0)}
    return {1.0: True, 0.0: False}.get(slopes.pop()) if len(slopes) == 1 else None
