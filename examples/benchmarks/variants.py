"""Ways to keep the saved tensors of a training step; each makes a module from a task."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from networks import Checkpointed, Task
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory
from brevitas_bp import quant as configs

Variant = Callable[[Task], nn.Module]


def quantizer(bits: int, stochastic: bool = False) -> Any:
    """Returns the quantizer of a width, with bfloat16 metadata: rotated, or affine and stochastic."""
    name = (
        f"ShiftedUint{bits}DynamicActPerBucketFloatStochastic" if stochastic else
        f"RotatedNormal{bits}DynamicActPerBucketFloat")
    return getattr(configs, name).let(metadata_dtype=torch.bfloat16)


class Offloaded(nn.Module):
    """Keeps saved tensors in host memory, exact."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        with save_on_cpu():
            return self.module(inputs)


def plain(task: Task) -> nn.Module:
    return task.model


def ours(
        task: Task, bits: int, policy: str | OpAware = "op_aware",
        stochastic: bool = False) -> nn.Module:
    return QuantBackwardWrapper(task.model, quantizer(bits, stochastic), policy=policy)


def offloaded(task: Task) -> nn.Module:
    return Offloaded(task.model)


def rounded_inputs(task: Task) -> nn.Module:
    """Recomputes each part from an input stored in 2 bits; other saved tensors take 2 bits too."""
    return QuantBackwardWrapper(
        Checkpointed(task), quantizer(2), policy=OpAware(checkpoint_quant=quantizer(2)))


def compiled(task: Task, backend: str) -> nn.Module:
    module = torch.compile(task.model, backend=backend)
    assert isinstance(module, nn.Module)
    return module


def ours_compiled(task: Task, backend: str, bits: int, policy: str = "op_aware") -> nn.Module:
    return QuantBackwardWrapper(compiled(task, backend), quantizer(bits), policy=policy)


EAGER: dict[str, Variant] = {
    "plain": plain,
    **{f"ours, {bits} bits": partial(ours, bits=bits) for bits in (2, 4, 8)},
    "ours, 1 bit": partial(ours, bits=1),
    "ours, 2 bits, no hints": partial(ours, bits=2, policy=OpAware(hints=False)),
    "ours, 2 bits, stochastic": partial(ours, bits=2, stochastic=True),
    "ours, 2 bits, policy all": partial(ours, bits=2, policy="all"),
    "checkpoint, each block": Checkpointed,
    "checkpoint, 2-bit inputs": rounded_inputs,
    "save_on_cpu": offloaded}


def compiled_variants(backend: str) -> dict[str, Variant]:
    """Returns the plain compiled network first, then the compiled network inside wrappers."""
    inside = partial(ours_compiled, backend=backend)
    return {
        "plain": partial(compiled, backend=backend),
        **{f"ours, {bits} bits": partial(inside, bits=bits) for bits in (2, 4, 8)},
        "ours, 2 bits, policy all": partial(inside, bits=2, policy="all")}


def saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Returns the bytes that a variant's forward pass keeps for backward, on any device."""
    if isinstance(model, Offloaded):
        model = model.module
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = QuantBackwardWrapper(model, policy="exact")
    with track_saved_memory(model) as report:
        loss = model(inputs).sum()
    del loss
    return report.stored_bytes
