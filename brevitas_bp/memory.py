"""Bytes that autograd keeps for backward, measured on live tensors."""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.compiled.hooks import CompiledSite
from brevitas_bp.backward.explain import unknown_note, unknown_operations
from brevitas_bp.backward.hooks import PARAMETER, ForwardPass
from brevitas_bp.backward.policy import keep_all
from brevitas_bp.backward.saved import Decision, SavedTensor, storage_id
from brevitas_bp.backward.seam import listening, wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec.base import Packed, is_plain
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shard import shard_of
from brevitas_bp.memory_tables import (
    Counted,
    HasRatio,
    Key,
    SavedMemoryTable,
    add,
    grouped,
    ratio_text,
)
from brevitas_bp.text import mib, table


@dataclass(frozen=True)
class SavedMemoryRow(HasRatio):
    """Saved tensors of one module, operation and dtype.

    Attributes:
        module: qualified name; empty for the root and for operations outside the root.
        op: the torch function that saved the tensors.
        dtype: of the tensors.
        tensors: number of tensors; each is counted once.
        exact_bytes: bytes of the tensors as plain autograd would keep them.
        stored_bytes: bytes that are kept instead.
    """

    module: str
    op: str
    dtype: str
    tensors: int
    exact_bytes: int
    stored_bytes: int


@dataclass
class _Record:
    key: Key
    packed: weakref.ref[Packed]
    extent: "_Extent | None"
    storage: StorageWeakRef | None


@dataclass
class _GraphRecord:
    """A tensor that a compiled graph keeps: key, exact bytes, and the live tensors that store it."""

    key: Key
    given_bytes: int
    parts: list[tuple["_Extent", StorageWeakRef | None]]

    @property
    def alive(self) -> bool:
        """Whether backward can still run."""
        return any(storage is not None and not storage.expired() for _, storage in self.parts)


class SavedMemoryReport(HasRatio):
    """The memory that a forward pass keeps for backward. Made by :func:`track_saved_memory`.

    Parameters and buffers are never counted, whichever operation saves them. A tensor that several
    operations save is counted once, at the first operation. Views of one storage never count more bytes
    than the storage has. Only tensors that are alive when the block ends count.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._graph_records: list[_GraphRecord] = []
        self._seen: list[tuple[str, bool, int]] = []
        self._counted: Counted | None = None
        self._why_empty = "the block has not ended"

    @property
    def rows(self) -> list[SavedMemoryRow]:
        """One row per module, operation and dtype, in the order of the forward pass."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for (module, op, dtype, _), numbers in self._now().items():
            add(found.setdefault((module, op, dtype), [0, 0, 0]), numbers)
        return [SavedMemoryRow(*key, *numbers) for key, numbers in found.items()]

    def by(self, *columns: str, top: int | None = None) -> SavedMemoryTable:
        """Groups the saved tensors, for instance ``by("op")`` or ``by("module", "reason", top=10)``.

        Args:
            *columns: some of "module", "op", "dtype", "reason". The reason is that of the policy.
            top: number of groups to show; the others become one. None: all.

        Returns:
            A table, which ``print`` shows: most stored bytes first.

        Raises:
            UnknownNameError: there is no such column.
            ValueError: no column is given, or ``top`` is below 1.
        """
        return grouped(self._now(), columns, top)

    def _now(self) -> Counted:
        """Returns the counts at the end of the block, or of now if it has not ended."""
        return self._count() if self._counted is None else self._counted

    def _totals(self) -> list[int]:
        """Returns the number of tensors, exact bytes and stored bytes of all."""
        totals = [0, 0, 0]
        for numbers in self._now().values():
            add(totals, numbers)
        return totals

    @property
    def tensors(self) -> int:
        """Number of saved tensors."""
        return self._totals()[0]

    @property
    def exact_bytes(self) -> int:
        """Bytes that plain autograd would keep."""
        return self._totals()[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes that are really kept."""
        return self._totals()[2]

    @property
    def unknown_operations(self) -> list[str]:
        """Operations for which the policy has no rule. Their tensors are therefore exact."""
        return unknown_operations(self._seen)

    @property
    def live_bytes(self) -> int:
        """Bytes still kept now: zero once backward has run or the graph is freed."""
        return sum(stored for _, _, stored in self._count().values())

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and total as plain values, for JSON. An undefined ratio is None."""
        total = {
            "tensors": self.tensors, "exact_bytes": self.exact_bytes,
            "stored_bytes": self.stored_bytes, "ratio": _number(self.ratio)}
        return {
            "rows": [{**asdict(r), "ratio": _number(r.ratio)} for r in self.rows], "total": total}

    def __str__(self) -> str:
        lines = [("module", "op", "dtype", "tensors", "exact MiB", "stored MiB", "ratio")]
        for row in self.rows:
            lines.append((
                row.module or "(root)", row.op, row.dtype, str(row.tensors),
                mib(row.exact_bytes), mib(row.stored_bytes),
                ratio_text(row.exact_bytes, row.stored_bytes)))
        lines.append((
            "total", "", "", str(self.tensors), mib(self.exact_bytes), mib(self.stored_bytes),
            ratio_text(self.exact_bytes, self.stored_bytes)))
        empty = [] if self.rows else [f"nothing is saved: {self._why_empty}"]
        return "\n".join(
            [table(lines, left=3, total=True), *empty, *unknown_note(self.unknown_operations)])

    def _record(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        if decision is PARAMETER:
            return
        op = saved.op or "custom function"
        self._seen.append((op, decision.known, saved.tensor.numel() * saved.tensor.element_size()))
        for x in originals:
            self._records.append(_Record(
                (saved.module, op, str(x.dtype).removeprefix("torch."), decision.reason),
                weakref.ref(packed), _Extent.of(x), _weak_storage(x)))
        if not originals:
            # The first tensor that a rewrite saves has already reported the originals.
            dtype = str(saved.tensor.dtype).removeprefix("torch.")
            self._records.append(_Record(
                (saved.module, op, dtype, decision.reason), weakref.ref(packed), None, None))

    def _record_graph(self, site: CompiledSite | None, tensors: list[Tensor]) -> None:
        stored = sum(t.numel() * t.element_size() for t in tensors)
        if site is None:
            key, given = ("", "input of a compiled graph", str(tensors[0].dtype), ""), stored
        else:
            key = (
                site.saved.module, site.saved.op or "", str(site.saved.tensor.dtype),
                site.decision.reason)
            # A graph with symbolic sizes was made for other sizes, so scale the bytes.
            given = site.given_bytes * stored // site.stored_bytes if site.stored_bytes else 0
        self._graph_records.append(_GraphRecord(
            (key[0], key[1], key[2].removeprefix("torch."), key[3]), given,
            [(_Extent.of(t), _weak_storage(t)) for t in tensors]))

    def _finish(self, ran: bool, enabled: bool) -> None:
        self._counted = self._count()
        if self._records or self._graph_records:
            self._why_empty = "it was freed before the block ended; keep the output until then"
        elif not enabled:
            self._why_empty = "gradients are disabled (torch.no_grad, torch.inference_mode)"
        elif not ran:
            self._why_empty = "the model did not run; the block goes around its forward pass"
        else:
            self._why_empty = "nothing that ran needs a gradient"

    def _count(self) -> Counted:
        """Returns key -> number of tensors, exact bytes, stored bytes, of what is alive."""
        counted: Counted = {}
        exact, stored = _Bytes(), _Bytes()
        packed_seen: set[int] = set()
        for record in self._records:
            packed = record.packed()
            if packed is None:
                continue
            row = counted.setdefault(record.key, [0, 0, 0])
            if id(packed) not in packed_seen:
                packed_seen.add(id(packed))
                row[0] += 1
            if record.extent is not None:
                row[1] += exact.add(record.extent)
            for tensor in packed.tensors:
                row[2] += stored.add(_Extent.of(tensor))
        for record in self._graph_records:
            if record.alive:
                row = counted.setdefault(record.key, [0, 0, 0])
                row[0] += 1
                row[1] += record.given_bytes
                row[2] += sum(stored.add(extent) for extent, _ in record.parts)
        return {key: numbers for key, numbers in counted.items() if any(numbers)}


@contextmanager
def track_saved_memory(model: nn.Module) -> Iterator[SavedMemoryReport]:
    """Measures what autograd keeps for backward, of a wrapped or an unwrapped model.

    Gradients, outputs and random state are the same as without it. Operations in the block but outside
    the model (for instance the loss) are counted under the root's name.

    Args:
        model: the model that runs in the block; may contain wrappers.

    Yields:
        The report. It is complete when the block ends, before backward runs.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        >>> with track_saved_memory(net) as report:
        ...     loss = net(torch.randn(512, 64)).sum()
        >>> report.exact_bytes  # the input and the output of tanh
        262144
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "brevitas_bp.track_saved_memory: expected a torch.nn.Module, got "
            f"{type(model).__name__}")
    report = SavedMemoryReport()
    wrappers = [wrapper for _, wrapper in wrappers_in(model)]
    root = model.module if isinstance(model, QuantBackwardWrapper) else model
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(listening(wrapper, report._record, report._record_graph))
        forward_pass = ForwardPass(
            root, lambda name: None, keep_all, lambda: 0, listeners=(report._record,))
        stack.callback(forward_pass.close)
        stack.enter_context(forward_pass)
        location, enabled = forward_pass.location, torch.is_grad_enabled()
        location.names.setdefault(id(model), "")
        try:
            yield report
        finally:
            report._finish(location.entered, enabled)


@dataclass(frozen=True)
class _Extent:
    """The part of a storage that a tensor occupies."""

    storage: int
    storage_nbytes: int
    view: tuple[Any, ...]
    nbytes: int

    @classmethod
    def of(cls, x: Tensor) -> "_Extent":
        x = shard_of(x)
        own = TensorLayout.base(x) if is_plain(x) else x
        nbytes = own.numel() * x.element_size()
        try:
            view = (x.storage_offset(), own.shape, own.stride())
            return cls(storage_id(x), x.untyped_storage().nbytes(), view, nbytes)
        except (NotImplementedError, RuntimeError):
            return cls(id(x), nbytes, (), nbytes)


class _Bytes:
    """Counts extents: each view once, and never more bytes than its storage has.

    A view counts only its own elements: a batch sliced from a data set does not count the data set.
    """

    def __init__(self) -> None:
        self._views: set[tuple[Any, ...]] = set()
        self._counted: defaultdict[int, int] = defaultdict(int)

    def add(self, extent: _Extent) -> int:
        """Counts an extent. Returns the bytes that it adds."""
        key = (extent.storage, *extent.view)
        if key in self._views:
            return 0
        self._views.add(key)
        left = extent.storage_nbytes - self._counted[extent.storage]
        added = max(0, min(extent.nbytes, left))
        self._counted[extent.storage] += added
        return added


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x


def _weak_storage(x: Tensor) -> StorageWeakRef | None:
    """Returns a weak reference to a storage; while it is held, no other storage reuses the address."""
    try:
        return StorageWeakRef(shard_of(x).untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
