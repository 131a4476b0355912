"""Outputs of a network's stages: shapes, elements, and the megabytes of nominal accounting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from brevitas_bp.models.blocks import require
from brevitas_bp.models.efficientnet_v2 import EfficientNetV2

_BYTES_PER_MEGABYTE = 2**20


def stage_output_shapes(
    model: EfficientNetV2, input_shape: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each stage's output, read by forward hooks in a run on `meta` tensors.

    It computes nothing and changes nothing of the model: weights, statistics, modes, hooks and random
    state are the same afterwards.

    Args:
        model: On any device, in any mode.
        input_shape: `(N, C, H, W)`.

    Returns:
        `stem`, `stage1`, ..., `head`, `pool`, in the order of the forward pass.

    Raises:
        ValueError: `input_shape` does not have four positive entries.
    """
    valid = len(input_shape) == 4 and all(size >= 1 for size in input_shape)
    require(valid, "input_shape", "(N, C, H, W), all positive", tuple(input_shape))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    dtype = next(model.parameters()).dtype
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        shapes[name] = tuple(output.shape)

    modes = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_stages().items()
    ]
    try:
        model.eval()  # in training, batch norm refuses a batch with one value per channel
        with torch.no_grad():
            functional_call(model, meta, torch.empty(*input_shape, dtype=dtype, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def stage_output_elements(model: EfficientNetV2, input_shape: Sequence[int]) -> dict[str, int]:
    """Returns the number of elements of each stage's output.

    Arguments and keys are those of `stage_output_shapes`.
    """
    return {name: prod(shape) for name, shape in stage_output_shapes(model, input_shape).items()}


def nominal_megabytes(elements: int, bits: float) -> float:
    """Returns `elements * bits / 8` bytes in megabytes of 2**20 bytes, without scales and padding.

    Args:
        elements: Number of elements, at least 0.
        bits: Bits per element, positive. A fraction is a mean over mixed widths.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> nominal_megabytes(2**20, bits=4)
        0.5
    """
    require(elements >= 0, "elements", "at least 0", elements)
    require(bits > 0, "bits", "positive", bits)
    return elements * bits / 8 / _BYTES_PER_MEGABYTE
