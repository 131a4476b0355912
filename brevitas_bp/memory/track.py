"""Measures what autograd keeps for backward, around one forward pass or a whole training loop."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from brevitas_bp.backward.hooks import ForwardPass
from brevitas_bp.backward.policy import keep_all
from brevitas_bp.backward.seam import listening, wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.memory.report import SavedMemoryReport
from brevitas_bp.private import running_backward

_WHERE = "brevitas_bp.track_saved_memory"

#: Called with the report after each training step.
OnStep = Callable[[SavedMemoryReport], object]


@contextmanager
def track_saved_memory(
        model: nn.Module, *, on_step: OnStep | None = None) -> Iterator[SavedMemoryReport]:
    """Measures what autograd keeps for backward, of a wrapped or an unwrapped model.

    The block may hold one forward pass or a whole training loop. In a loop the report counts on, and its
    memory does not grow with the number of steps. Gradients, outputs and random state are the same as
    without it. Operations in the block but outside the model (for instance the loss) are counted under
    the root's name. Of other threads, only what runs in wrappers is counted.

    Args:
        model: the model that runs in the block; may contain wrappers.
        on_step: called with the report, once after each step, without gradients. This happens as soon as
            an operation of torch outside of wrappers ends after the step's tensors were freed (in most
            loops, ``loss.backward()`` itself); at the latest when the next step saves its first tensor,
            or when the block ends without an exception.

    Yields:
        The report. Around one forward pass, it is complete when the block ends, before backward runs.

    Raises:
        TypeError: ``model`` is not a module, or ``on_step`` cannot be called.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        >>> with track_saved_memory(net) as report:
        ...     loss = net(torch.randn(512, 64)).sum()
        >>> report.exact_bytes  # the input and the output of tanh
        262144
        >>> with track_saved_memory(net, on_step=lambda report: print(report.summary())) as report:
        ...     for _ in range(2):
        ...         net(torch.randn(512, 64)).sum().backward()
        saved 0.25 MiB of 0.25 MiB (1.0x), peak 0.25 MiB
        saved 0.25 MiB of 0.25 MiB (1.0x), peak 0.25 MiB
        >>> report.steps, report.live_bytes
        (2, 0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHERE}: expected a torch.nn.Module, got {type(model).__name__}")
    if on_step is not None and not callable(on_step):
        raise TypeError(
            f"{_WHERE}: on_step must be a function of the report, got {type(on_step).__name__}")
    report = SavedMemoryReport()
    root = model.module if isinstance(model, QuantBackwardWrapper) else model
    with ExitStack() as stack:
        for _, wrapper in list(wrappers_in(model)):
            stack.enter_context(listening(wrapper, report._record, report._record_graph))
        forward_pass = ForwardPass(
            root, lambda name: None, keep_all, lambda: 0, listeners=(report._record,))
        forward_pass.location.counts_only = True
        forward_pass.location.names[id(model)] = ""
        steps = _Steps(report, on_step)
        report._ledger.ends = partial(_next_step, forward_pass, root, model, steps)
        if on_step is not None:
            forward_pass.location.observer = steps.observe
        stack.callback(forward_pass.close)
        stack.enter_context(forward_pass)
        location, enabled = forward_pass.location, torch.is_grad_enabled()
        try:
            yield report
            steps.end()
        finally:
            report._finish(location.entered, enabled)


class _Steps:
    """Calls ``on_step`` once for each step."""

    def __init__(self, report: SavedMemoryReport, on_step: OnStep | None) -> None:
        self.report = report
        self.on_step = on_step
        self.told = 0

    def observe(self, call: Any, output: Any) -> None:
        """Called after each operation of torch outside of wrappers."""
        report = self.report
        if self.told < report.steps and report._ledger.step_is_over() and running_backward() == -1:
            self._tell()

    def end(self) -> None:
        """Called when the block ends, or the next step begins."""
        if self.told < self.report.steps:
            self._tell()

    def _tell(self) -> None:
        self.told = self.report.steps
        if self.on_step is not None:
            # Its operations must save nothing, or they would be counted.
            with torch.no_grad():
                self.on_step(self.report)


def _next_step(
        forward_pass: ForwardPass, root: nn.Module, model: nn.Module, steps: _Steps) -> None:
    """Reports a step that has ended, and lets the pass forget its tensors."""
    steps.end()
    forward_pass.renew(root)
    forward_pass.location.names[id(model)] = ""
