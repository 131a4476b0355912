"""Scaled dot-product attention, run again in backward from query, key and value.

See NOTE [ Rewritten operations ] in :mod:`brevitas_bp.backward.rewrites`.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from brevitas_bp.backward.computable import Computed
from brevitas_bp.backward.rewrites import RunningPass, Substitution, refuse_second_derivative
from brevitas_bp.backward.rows import last_dimension
from brevitas_bp.backward.saved import (
    ATTENTION_INPUT,
    ATTENTION_MASK,
    ATTENTION_VALUE,
    REPLAYED,
    Call,
    Decision,
    SavedTensor,
    without_class,
)
from brevitas_bp.codec.base import FLOATS, is_plain
from brevitas_bp.codec.computed import constant
from brevitas_bp.codec.two_valued import two_valued
from brevitas_bp.private import in_forward_ad

_ATTENTION_TENSORS = ("query", "key", "value", "attn_mask")
_MASK = 3
# With so many bits for query and key, attention that runs again gives an output that is biased little.
_WIDE = 8

#: The decision for the value. It has the configured width: by measurement, four bits do not lower the
#: noise of whole transformers.
VALUE = Decision(
    None, "value: backward is linear in it", shared=False, reach="sum", rows=last_dimension)
#: The decision for query and key.
QUERY = Decision(
    None, "query and key: attention runs again from them, slightly biased", shared=False, reach="all",
    rows=last_dimension)
#: The decision for a float mask.
FLOAT_MASK = Decision(two_valued(), "mask: 1 bit if it has two values, else exact")
_EXACT = Decision(None, "attention: the weights follow from what is saved")


def attention_as_it_is(saved: SavedTensor) -> Decision:
    """Decides for attention that is not rewritten: all is exact, and a mask of two values has 1 bit.

    Autocast casts the mask, and kernels may expand it. So its last two sizes tell it; another tensor of
    these sizes has more than two values.
    """
    mask, x = saved.call.argument(_MASK, _ATTENTION_TENSORS[_MASK]), saved.tensor
    is_mask = isinstance(mask, Tensor) and x.dtype in FLOATS and x.shape[-2:] == mask.shape[-2:]
    return FLOAT_MASK if is_mask else _EXACT


@dataclass(frozen=True)
class ReplayAttention:
    """Rewrites scaled dot-product attention: backward runs it again, from query, key and value.

    For given attention weights, the gradient is linear in the value. The weights depend only on query
    and key. So query and key are kept as they are, and the value is quantized. The output, its
    log-sum-exp and the weights are not kept. Backward uses the random numbers, the autocast settings and
    the choice of kernels of the forward pass.
    """

    def __call__(self, running: RunningPass, call: Call) -> Any:
        given = [call.argument(i, name) for i, name in enumerate(_ATTENTION_TENSORS)]
        tensors = [t for t in given if t is not None]
        if not torch.is_grad_enabled() or in_forward_ad() or not (
                all(is_plain(without_class(t)) for t in tensors)
                and any(t.requires_grad for t in tensors)):
            return NotImplemented
        # A mask is cast again in backward: all layers then keep one mask, not a cast copy each.
        given = [
            t if t is None or (i == _MASK and not t.requires_grad) else cast_by_autocast(t)
            for i, t in enumerate(given)]
        roles = [ATTENTION_INPUT, ATTENTION_INPUT, ATTENTION_VALUE, ATTENTION_MASK][:len(tensors)]
        with running.saving(*roles, REPLAYED) as substitution:
            output = _ReplayAttention.apply(_Replay(call), substitution, *given)
        widths = substitution.widths
        if widths.get(ATTENTION_INPUT, math.inf) >= _WIDE:
            # The node must not live as long as the pass.
            node, width = weakref.ref(output.grad_fn), widths.get(ATTENTION_VALUE, math.inf)
            running.note_computed(output, partial(_computed, node, width))
        return output


def cast_by_autocast(x: Tensor) -> Tensor:
    """Casts ``x`` as autocast will anyway, so that the cast is kept, not the larger original."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


class _Replay:
    """Runs attention, and runs it again later with the same settings."""

    def __init__(self, call: Call) -> None:
        self.function = call.function
        self.rest = call.args[len(_ATTENTION_TENSORS):]
        self.options = {k: v for k, v in call.kwargs.items() if k not in _ATTENTION_TENSORS}
        self.device: str = call.argument(0, "query").device.type
        self.autocast = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)
        self.backends = _attention_backends()

    def run(self, given: Sequence[Tensor | None]) -> Tensor:
        return self.function(*given, *self.rest, **self.options)

    def generator_state(self) -> Tensor | None:
        """Returns the state of the generator that dropout draws from; None without dropout."""
        dropout = self.rest[0] if self.rest else self.options.get("dropout_p", 0.0)
        return _generator(self.device).get_rng_state() if dropout > 0 else None

    def again(self, given: Sequence[Tensor | None], generator_state: Tensor | None) -> Tensor:
        dtype, enabled = self.autocast
        with torch.autocast(self.device, dtype=dtype, enabled=enabled), _only(
                self.backends), _drawing_from(_generator(self.device), generator_state):
            return self.run(given)


def _computed(found: "weakref.ref[Any]", width: float) -> Computed | None:
    return None if found() is None else Computed(
        _Output(found), width, "attention, run again")


class _Output:
    """Runs attention again for the layer after it, whose backward comes first.

    A copy or a pickle holds the output itself, because it cannot hold the graph.

    Args:
        node: the node of the attention, which the layer's node holds.
    """

    def __init__(self, node: "weakref.ref[Any]") -> None:
        self._node = node

    def __call__(self) -> Tensor:
        node = self._node()
        if node is None:
            raise RuntimeError(
                "brevitas_bp: a layer needs the output of attention, but the graph of the attention was "
                "freed; call backward once for all losses, or with retain_graph=True")
        return _ReplayAttention.rerun(node)[1].detach()

    def __reduce__(self) -> Any:
        return constant, (self().clone(),)


class _ReplayAttention(torch.autograd.Function):

    @staticmethod
    def rerun(ctx: Any) -> tuple[list[Tensor | None], Tensor]:
        """Runs attention again, and keeps the result until its own backward."""
        if ctx.again is None:
            *saved, generator_state = ctx.saved_tensors
            given = _leaves(saved, ctx.needs_input_grad[2:])
            with torch.enable_grad():
                ctx.again = given, ctx.replay.again(given, generator_state)
        return ctx.again

    @staticmethod
    def forward(
            ctx: Any, replay: _Replay, substitution: Substitution,
            *given: Tensor | None) -> Tensor:
        ctx.replay, ctx.again = replay, None
        ctx.save_for_backward(*given, replay.generator_state())
        if not substitution.recorded:
            return replay.run(given)
        with torch.enable_grad(), saved_tensors_hooks(substitution.note, lambda saved: saved):
            return replay.run(_leaves(given, ctx.needs_input_grad[2:])).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative("scaled_dot_product_attention")
        (given, output), ctx.again = _ReplayAttention.rerun(ctx), None
        wanted = [t for t in given if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grads[0]))
        return None, None, *(
            next(found) if t is not None and t.requires_grad else None for t in given)


def _leaves(given: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(given, needed)]


def _attention_backends() -> list[SDPBackend]:
    """Returns the kernels that attention may currently choose from."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled()}
    return [backend for backend, on in enabled.items() if on]


def _only(backends: list[SDPBackend]) -> AbstractContextManager[Any]:
    return nullcontext() if backends == _attention_backends() else sdpa_kernel(backends)


def _generator(device: str) -> Any:
    return torch if device == "cpu" else torch.get_device_module(device)


@contextmanager
def _drawing_from(generator: Any, state: Tensor | None) -> Iterator[None]:
    """Draws from ``state`` within the block, and restores the generator afterwards."""
    if state is None:
        yield
        return
    before = generator.get_rng_state()
    try:
        generator.set_rng_state(state)
        yield
    finally:
        generator.set_rng_state(before)
