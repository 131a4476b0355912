"""One forward and backward of a case, and every result that two runs can be compared on."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.referee.cases import Case
from tests.support import same_bits

#: Prepares a module before it runs: wraps it, or returns it unchanged.
Wrap = Callable[[nn.Module], nn.Module]


@dataclass
class Outcome:
    """Results of a run.

    Attributes:
        outputs: tensors of the output.
        grads: gradients of every input and parameter that requires one; None if it got none.
        state: inputs, parameters and buffers after the forward pass.
        rng: state of torch's generator after the forward pass.
        error: the exception that was raised instead, if any.
        backward: whether there was something to differentiate.
    """

    outputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    rng: Tensor | None = None
    error: Exception | None = None
    backward: bool = False


def outcome_of(case: Case, wrap: Wrap = lambda module: module) -> Outcome:
    """Runs the case once, always with the same random numbers."""
    module, args, kwargs = case.build()
    module = wrap(module)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    leaves = [x for x in (*tensors, *module.parameters()) if x.requires_grad]
    outcome = Outcome()
    # torch.manual_seed records the stack for each kind of device: slower than many samples.
    torch.default_generator.manual_seed(0)
    try:
        with warnings.catch_warnings():
            # Warnings of PyTorch about old functions. A warning of the library would be a failure.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="brevitas_bp")
            _run(case, module, args, kwargs, leaves, outcome)
    except Exception as error:  # any error: plain autograd has to raise the same one
        outcome.error = error
    outcome.state = _plain([*tensors, *module.parameters(), *module.buffers()])
    return outcome


def _run(
        case: Case, module: nn.Module, args: Any, kwargs: Any, leaves: list[Tensor],
        outcome: Outcome) -> None:
    output = module(*args, **kwargs)
    outcome.rng = torch.get_rng_state()
    outcome.outputs = _plain(tree_leaves(output))
    beside = output[1:] if case.variant == "in place after it was saved" else ()
    head = case.differentiable(output[0] if beside else output)
    wanted = [
        part for x in tree_leaves((head, beside)) if isinstance(x, Tensor) and x.requires_grad
        for part in strided(x) if part.requires_grad]
    if not wanted or not leaves:
        return
    outcome.backward = True
    outcome.grads = list(torch.autograd.grad(
        wanted, leaves, [_cotangent(x) for x in wanted], allow_unused=True))


def _cotangent(x: Tensor) -> Tensor:
    """Returns a gradient whose elements all differ."""
    angle = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)
    return (torch.polar(angle.cos(), angle) if x.is_complex() else angle.cos()).to(x.dtype)


def strided(x: Tensor) -> Iterator[Tensor]:
    """Yields strided tensors with the values of ``x``."""
    if x.is_nested:
        yield from x.unbind()
    else:
        yield x if x.layout == torch.strided else x.to_dense()


def _plain(values: Sequence[Any]) -> list[Tensor]:
    """Returns copies that later runs cannot change."""
    with torch.no_grad():
        return [
            part.detach().clone() for x in values if isinstance(x, Tensor) for part in strided(x)]


def difference(actual: Outcome, expected: Outcome, grads: bool = True) -> str | None:
    """Describes the first difference in any bit between two outcomes; None if they are equal.

    Args:
        actual: outcome with the wrapper.
        expected: outcome of plain autograd.
        grads: whether to compare the gradients.
    """
    if expected.error is not None or actual.error is not None:
        return _other_error(actual.error, expected.error)
    if not _all_same(actual.outputs, expected.outputs):
        return "outputs differ"
    if not _all_same(actual.state, expected.state):
        return "inputs or buffers differ after the forward pass"
    if actual.rng is None or expected.rng is None or not torch.equal(actual.rng, expected.rng):
        return "another number of random numbers was drawn"
    if actual.backward != expected.backward:
        return "differentiable outputs differ"
    return "gradients differ" if grads and not _all_same(actual.grads, expected.grads) else None


def misfit(
        actual: Sequence[Tensor | None], expected: Sequence[Tensor | None],
        finite: bool) -> str | None:
    """Describes how the kind of quantized gradients differs from the exact gradients' kind.

    Args:
        actual: gradients with the wrapper.
        expected: gradients of plain autograd.
        finite: whether gradients have to be finite if the exact ones are.
    """
    for ours, theirs in zip(actual, expected, strict=True):
        if (ours is None) != (theirs is None):
            return "a gradient is missing, or there where none was"
        if ours is None or theirs is None:
            continue
        if (ours.shape, ours.dtype, ours.layout) != (theirs.shape, theirs.dtype, theirs.layout):
            return "a gradient has another shape, dtype or layout"
        if finite and all(p.isfinite().all() for p in strided(theirs)) and not all(
                p.isfinite().all() for p in strided(ours)):
            return "a gradient is no longer finite"
    return None


def _all_same(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return len(actual) == len(expected) and all(map(_same, actual, expected))


def _same(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if actual.layout != expected.layout or actual.is_nested != expected.is_nested:
        return False
    return all(
        same_bits(a, b) for a, b in zip(strided(actual), strided(expected), strict=True))


def _other_error(actual: Exception | None, expected: Exception | None) -> str | None:
    """Says how errors differ; ours may be a subclass with another text if a tensor was overwritten."""
    if actual is None or expected is None:
        return f"plain autograd gave {_shown(expected)}, ours {_shown(actual)}"
    overwritten = "modified by an inplace operation"
    same = str(actual) == str(expected) or (overwritten in str(actual) and overwritten in str(expected))
    return None if same and isinstance(actual, type(expected)) else (
        f"plain autograd raised {_shown(expected)}, ours {_shown(actual)}")


def _shown(error: Exception | None) -> str:
    return "a result" if error is None else f"{type(error).__name__}: {str(error)[:300]}"
