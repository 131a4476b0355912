"""Gradients through a codec that stores one of an operation's saved tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp.codec import Codec, Packed

Op = Callable[[Tensor], Tensor]


@dataclass
class Tape:
    """The tensors that one operation saved, and the gradient of its input.

    Attributes:
        saved: tensors as the pack hook sees them, detached.
        packed: the payloads of the tensors that a codec stored.
        grad: gradient of the input.
        output: output of the operation.
    """

    grad: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    saved: list[Tensor] = field(default_factory=list)
    packed: list[Packed] = field(default_factory=list)


def run(op: Op, x: Tensor, codecs: dict[int, Codec] | None = None) -> Tape:
    """Runs forward and backward of ``op``; ``codecs[i]``, if given, stores saved tensor ``i``.

    ``op`` gets a tensor that is not a leaf, so it may work in place. Random numbers are the same in
    every run.
    """
    tape = Tape()

    def pack(t: Tensor) -> Tensor | Packed:
        tape.saved.append(t.detach().clone())
        codec = (codecs or {}).get(len(tape.saved) - 1)
        if codec is None:
            return t
        tape.packed.append(codec.encode(t, seed=0, where="test"))
        return tape.packed[-1]

    def unpack(stored: Tensor | Packed) -> Tensor:
        return stored.decode() if isinstance(stored, Packed) else stored

    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with saved_tensors_hooks(pack, unpack):
            # Adding 0 saves nothing, and keeps the strides.
            tape.output = op(leaf.add(0.0) if leaf.is_floating_point() else leaf)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(tape.output.shape, generator=generator, dtype=torch.float64)
        # The upstream gradient has the strides of the output, as from a following layer.
        upstream = torch.empty_like(tape.output).copy_(upstream)
        (tape.grad,) = torch.autograd.grad(tape.output, leaf, upstream)
    return tape
