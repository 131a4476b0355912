"""Measures on a user's model: takes every gradient at one point, and restores the model afterwards."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.sources import Roundings, layers_at, seeded_gradients
from brevitas_bp.backward.policy import keep_all
from brevitas_bp.backward.seam import restored, using_policy
from brevitas_bp.backward.transparent import all_modules
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.format.random import derive

# Wrappers of gradients draw from streams behind those of all wrappers of saved tensors.
_GRADIENTS = 1 << 20


@contextmanager
def unchanged(
        model: nn.Module, wrappers: list[QuantBackwardWrapper], seed: int, *,
        rounded_gradients: bool = False) -> Iterator[Callable[[], None]]:
    """Leaves model and generators unchanged; yields a function that returns to the current state.

    Args:
        model: the model.
        wrappers: wrappers of saved tensors in the model.
        seed: of the roundings within the block.
        rounded_gradients: whether wrappers of gradients round within the block.
    """
    restore, gradients = point(model), Roundings(model).gradients
    try:
        with ExitStack() as stack:
            for i, wrapper in enumerate(wrappers):
                stack.enter_context(restored(wrapper, derive(seed, i)))
            for i, wrapper in enumerate(gradients):
                stack.enter_context(seeded_gradients(wrapper, derive(seed, _GRADIENTS + i)))
                if not rounded_gradients:
                    stack.enter_context(layers_at(wrapper, None))
            yield restore
    finally:
        restore()


def point(model: nn.Module) -> Callable[[], None]:
    """Returns a function that restores torch's generators, modes and buffers to their current state."""
    generators = _generators()
    modes = [(module, module.training) for module in all_modules(model)]
    buffers = [
        (module, name, buffer, buffer.detach().clone()) for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)]

    def restore() -> None:
        _set_generators(generators)
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            # Write through .data, because graphs that hold the buffer saved this very value.
            buffer.data.copy_(value)

    return restore


@contextmanager
def exact_policy(wrappers: list[QuantBackwardWrapper]) -> Iterator[None]:
    """Makes wrappers keep everything within the block."""
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(using_policy(wrapper, keep_all))
        yield


def apart(items: Iterable[Any]) -> Iterator[Any]:
    """Yields ``items``, which may be drawn at random, with a separate state of torch's generators.

    Without it, batches drawn after the generators went back to one point would all be the same.
    """
    iterator, inside = iter(items), _generators()
    while True:
        outside = _generators()
        _set_generators(inside)
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _generators()
            _set_generators(outside)
        yield item


def _generators() -> tuple[Tensor, list[Tensor]]:
    """Returns the states of torch's generators: the CPU's, and the GPUs' if any GPU was used."""
    used = torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if used else []


def _set_generators(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
