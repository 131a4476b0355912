"""The report of saved tensors: what is kept now, the peak, the newest step."""

from collections.abc import Sequence

from torch import Tensor

from brevitas_bp.backward.compiled.hooks import CompiledSite
from brevitas_bp.backward.explain import unknown_note
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.codec.base import Packed
from brevitas_bp.memory.counts import SavedMemory, SavedMemoryStep
from brevitas_bp.memory.ledger import Ledger, nothing
from brevitas_bp.memory_tables import Counted
from brevitas_bp.private import running_backward
from brevitas_bp.text import short_mib


class SavedMemoryReport(SavedMemory):
    """The memory that forward passes keep for backward. Made by :func:`track_saved_memory`.

    Rows and totals are of what is alive: now, within the block; after the block, as it was at the end of
    the block. Around a training loop nothing is alive then, so read ``last_step``.

    Parameters and buffers are never counted, whichever operation saves them. A tensor that several
    operations save is counted once, at the first operation. Views of one storage never count more bytes
    than the storage has. What backward itself needs is not counted: tensors that it decodes or computes,
    and tensors that it saves while it runs attention or a checkpointed part again.
    """

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._unknown: dict[str, int] = {}
        self._ended: Counted | None = None
        self._why_empty = "the block has not ended"

    @property
    def live_bytes(self) -> int:
        """Bytes still kept now: zero once backward has run or the graph is freed."""
        return self._ledger.live_bytes()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were kept at once, since the block began."""
        return self._ledger.peak_bytes()

    @property
    def steps(self) -> int:
        """Number of training steps that have saved something, the one that runs included.

        A step begins with the first tensor that is saved after backward has freed more than half of what
        was saved since the backward pass before. So each micro-batch of an accumulated gradient is a
        step.
        """
        return self._ledger.steps

    @property
    def last_step(self) -> SavedMemoryStep | None:
        """The newest step, when it kept most; the one that runs, if one runs. None before the first."""
        return SavedMemoryStep(self._ledger.last_step()) if self.steps else None

    @property
    def unknown_operations(self) -> list[str]:
        """Operations for which the policy has no rule. Their tensors are therefore exact."""
        return sorted(self._unknown, key=lambda name: -self._unknown[name])

    def summary(self) -> str:
        """Describes the newest step and the peak in one short line, for a progress bar.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from brevitas_bp import QuantBackwardWrapper, track_saved_memory
            >>> net = QuantBackwardWrapper(nn.Sequential(nn.Linear(1024, 512), nn.ReLU()))
            >>> with track_saved_memory(net) as report:
            ...     for _ in range(3):
            ...         net(torch.randn(4096, 1024)).sum().backward()
            >>> report.summary()
            'saved 1.38 MiB of 24.0 MiB (17.5x), peak 1.38 MiB'
        """
        step = self.last_step
        if step is None:
            return "saved nothing yet"
        exact, stored = step.exact_bytes, step.stored_bytes
        ratio = f" ({exact / stored:.1f}x)" if stored else ""
        return (
            f"saved {short_mib(stored)} of {short_mib(exact)}{ratio}, peak "
            f"{short_mib(self.peak_bytes)}")

    def __str__(self) -> str:
        step = self.last_step
        if self._counted() or step is None or self.steps < 2:
            lines = [super().__str__()]
            lines += [] if self._counted() else [f"nothing is saved: {self._why_empty}"]
        else:
            lines = [
                str(step), f"the last of {self.steps} steps; peak {short_mib(self.peak_bytes)}, "
                f"{short_mib(self.live_bytes)} kept now"]
        return "\n".join([*lines, *unknown_note(self.unknown_operations)])

    def _counted(self) -> Counted:
        """Returns the counts at the end of the block, or of now if it has not ended."""
        return self._ledger.now() if self._ended is None else self._ended

    def _record(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        if running_backward() != -1:
            return
        op = saved.op or "custom function"
        if not decision.known:
            nbytes = saved.tensor.numel() * saved.tensor.element_size()
            self._unknown[op] = self._unknown.get(op, 0) + nbytes
        for x in originals:
            self._ledger.add((saved.module, op, str(x.dtype)[6:], decision.reason), packed, x)
        if not originals:
            # The first tensor that a rewrite saves has already reported the originals.
            key = (saved.module, op, str(saved.tensor.dtype)[6:], decision.reason)
            self._ledger.add(key, packed, None)

    def _record_graph(self, site: CompiledSite | None, tensors: list[Tensor]) -> None:
        if running_backward() != -1:
            return
        stored = sum(t.numel() * t.element_size() for t in tensors)
        if site is None:
            key = ("", "input of a compiled graph", str(tensors[0].dtype)[6:], "")
            given = stored
        else:
            key = (
                site.saved.module, site.saved.op or "", str(site.saved.tensor.dtype)[6:],
                site.decision.reason)
            # A graph with symbolic sizes was made for other sizes, so scale the bytes.
            given = site.given_bytes * stored // site.stored_bytes if site.stored_bytes else 0
        self._ledger.add_in_graph(key, given, tensors)

    def _finish(self, ran: bool, enabled: bool) -> None:
        self._ledger.recount()
        # It holds the model, which must not live as long as the report.
        self._ledger.ends = nothing
        self._ended = self._ledger.now()
        if self.steps:
            self._why_empty = "it was freed before the block ended; keep the output until then"
        elif not enabled:
            self._why_empty = "gradients are disabled (torch.no_grad, torch.inference_mode)"
        elif not ran:
            self._why_empty = "the model did not run; the block goes around its forward pass"
        else:
            self._why_empty = "nothing that ran needs a gradient"
