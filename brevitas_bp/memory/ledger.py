"""Books every saved tensor when it comes and when it goes: bytes alive, their peak, and steps.

NOTE [ How a loop of any length is counted ]
1. A saved tensor is booked when it is stored. A weak reference tells when its ``Packed`` is freed.
2. The garbage collector may free a ``Packed`` at any point, in any thread. So the weak reference only
   puts itself into a queue, and whether a backward pass runs. Before anything is booked or read, the
   queue is worked off, under a lock. So a new tensor is booked after all that was freed before, and the
   peak is exact.
3. A compiled graph holds tensors without a ``Packed``. They are looked at when a peak would be booked,
   and when figures are read.
4. A step begins with the first tensor that is saved after backward has freed more than half of what was
   saved since the backward pass before. So several forward passes before one backward pass belong
   together, and each micro-batch of an accumulated gradient is a step. Tensors that a forward pass
   drops do not matter. Nor do graphs that are kept for long, or a small gradient within a forward pass.
5. Only tensors that are alive, and those that were alive when the newest step kept most, are remembered.
   So memory does not grow, neither with the number of steps nor within a step.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.codec.base import Packed
from brevitas_bp.memory.extents import Bytes, Extent, LiveBytes, extent_of, weak_storage
from brevitas_bp.memory_tables import Counted, Key
from brevitas_bp.private import running_backward

_ALIVE = 2**62
# Up to this many entries, a step need not forget those that it can.
_FEW = 1000


def nothing() -> None:
    """Does nothing, when a step ends of which nobody wants to know."""


class Entry:
    """One saved tensor: what it is, what plain autograd would keep, and what is kept.

    Attributes:
        key: module, operation, dtype and reason.
        first: whether this is the first entry of its ``Packed``, which operations may share.
        original: extent of the tensor that plain autograd would keep; None: of another entry.
        given: bytes that plain autograd would keep, if there is no original.
        stored: extents of what is kept.
        nbytes: bytes of what is kept.
        born: time of the ledger when it came.
        died: time of the ledger when it went.
    """

    __slots__ = (
        "born", "died", "first", "given", "held", "key", "nbytes", "original", "packed", "step",
        "stored")

    def __init__(self, key: Key, stored: tuple[Extent, ...], nbytes: int) -> None:
        self.key = key
        self.stored = stored
        self.nbytes = nbytes
        self.first = True
        self.original: Extent | None = None
        self.given = 0
        self.packed = 0
        # Keeps the addresses of storages from being reused while the entry is remembered.
        self.held: tuple[StorageWeakRef | None, ...] = ()
        self.born, self.died, self.step = 0, _ALIVE, 0

    @property
    def in_graph(self) -> bool:
        """Whether a compiled graph holds it."""
        return self.packed == 0

    @property
    def expired(self) -> bool:
        """Whether the compiled graph has freed it."""
        return all(storage is None or storage.expired() for storage in self.held)


class _Watch(weakref.ref[Packed]):
    """A weak reference to the ``Packed`` of an entry."""

    __slots__ = ("entry",)
    entry: Entry


class _Step:
    """The newest step: its entries, its bytes now, and when they were most.

    Attributes:
        risen: bytes saved since the backward pass before.
        fallen: bytes that backward has freed since then.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.now = self.most = self.most_at = self.risen = self.fallen = 0
        self._prune_at = _FEW

    @property
    def over(self) -> bool:
        """Whether backward has freed more than half of what was saved before it."""
        return 2 * self.fallen > self.risen

    def add(self, entry: Entry) -> None:
        """Adds a tensor that was just saved."""
        if self.fallen:
            self.risen = self.fallen = 0
        if entry.first:
            self.risen += entry.nbytes
            self.now += entry.nbytes
        if self.now >= self.most:
            self.most, self.most_at = self.now, entry.born
        self.entries.append(entry)
        if len(self.entries) > self._prune_at:
            self.entries = [e for e in self.entries if e.died == _ALIVE or self.had_at_most(e)]
            self._prune_at = max(_FEW, 2 * len(self.entries))

    def remove(self, entry: Entry, in_backward: bool) -> None:
        """Removes the bytes of a tensor that was freed."""
        if entry.first:
            self.now -= entry.nbytes
            self.fallen += entry.nbytes if in_backward else 0

    def had_at_most(self, entry: Entry) -> bool:
        """Whether a tensor was alive when the step kept most."""
        return entry.born <= self.most_at < entry.died


def _note_freed(queue: "deque[tuple[weakref.ref[Packed], bool]]", watch: weakref.ref[Packed]) -> None:
    queue.append((watch, running_backward() != -1))


class Ledger:
    """Books saved tensors. See NOTE [ How a loop of any length is counted ].

    Args:
        ends: called when a step has ended, and the first tensor of the next one is about to be booked.

    Attributes:
        steps: number of steps that have begun.
    """

    def __init__(self, ends: Callable[[], None] = nothing) -> None:
        self.steps = 0
        self.ends = ends
        self._lock = threading.RLock()
        self._freed: deque[tuple[weakref.ref[Packed], bool]] = deque()
        self._note = partial(_note_freed, self._freed)
        self._watches: dict[int, _Watch] = {}
        self._in_graphs: list[Entry] = []
        self._packed: set[int] = set()
        self._live = LiveBytes()
        self._peak = self._clock = 0
        self._step = _Step()

    def add(self, key: Key, packed: Packed, original: Tensor | None) -> None:
        """Books a saved tensor, whose memory ``packed`` holds.

        Args:
            key: module, operation, dtype and reason.
            packed: what is kept.
            original: the tensor that plain autograd would keep; None if another entry has it.
        """
        entry = Entry(key, tuple(extent_of(x) for x in packed.tensors), packed.nbytes)
        if original is not None:
            entry.original, entry.held = extent_of(original), (weak_storage(original),)
        watch = _Watch(packed, self._note)
        watch.entry, entry.packed = entry, id(packed)
        with self._lock:
            self._settle()
            entry.first = id(packed) not in self._packed
            self._packed.add(id(packed))
            self._watches[id(watch)] = watch
            self._book(entry)

    def add_in_graph(self, key: Key, given: int, tensors: list[Tensor]) -> None:
        """Books a tensor that a compiled graph keeps as ``tensors``, and autograd in ``given`` bytes."""
        stored = tuple(extent_of(x) for x in tensors)
        entry = Entry(key, stored, sum(extent.nbytes for extent in stored))
        entry.given, entry.held = given, tuple(weak_storage(x) for x in tensors)
        with self._lock:
            self._settle()
            if self._in_graphs and self._in_graphs[0].expired:
                self._settle_graphs()
            self._in_graphs.append(entry)
            self._book(entry)

    def live_bytes(self) -> int:
        """Returns the bytes that are kept now."""
        with self._lock:
            self._settle_all()
            return self._live.total

    def peak_bytes(self) -> int:
        """Returns the most bytes that were kept at once."""
        with self._lock:
            self._settle_all()
            return max(self._peak, self._live.total)

    def step_is_over(self) -> bool:
        """Whether backward has freed most of the newest step; cheap if nothing was freed."""
        if not (self._freed or self._in_graphs):
            return self._step.over
        with self._lock:
            self._settle_all()
            return self._step.over

    def now(self) -> Counted:
        """Counts what is alive."""
        with self._lock:
            self._settle_all()
            return _counted(sorted(self._alive(), key=lambda entry: entry.born))

    def last_step(self) -> Counted:
        """Counts the newest step at the moment when it kept most."""
        with self._lock:
            self._settle_all()
            step = self._step
            return _counted(filter(step.had_at_most, step.entries))

    def recount(self) -> None:
        """Counts anew what is alive, in case an interrupt has cut a booking short."""
        with self._lock:
            self._settle_all()
            live = LiveBytes()
            for entry in self._alive():
                for extent in entry.stored:
                    live.add(extent)
            self._live = live

    def _alive(self) -> Iterator[Entry]:
        return chain((watch.entry for watch in self._watches.values()), self._in_graphs)

    def _book(self, entry: Entry) -> None:
        if self._step.over:
            self.ends()
            self._step = _Step()
        self.steps += not self._step.entries
        self._clock += 1
        entry.born, entry.step = self._clock, self.steps
        for extent in entry.stored:
            self._live.add(extent)
        self._step.add(entry)
        if self._live.total > self._peak:
            # Tensors of a compiled graph may be freed, and nobody told us.
            self._settle_graphs()
            self._peak = max(self._peak, self._live.total)

    def _settle_all(self) -> None:
        self._settle()
        self._settle_graphs()

    def _settle(self) -> None:
        """Books what was freed."""
        while self._freed:
            watch, in_backward = self._freed.popleft()
            assert isinstance(watch, _Watch)
            if self._watches.pop(id(watch), None) is not None:
                self._packed.discard(watch.entry.packed)
                self._bury(watch.entry, in_backward)

    def _settle_graphs(self) -> None:
        if not self._in_graphs:
            return
        kept: list[Entry] = []
        for entry in self._in_graphs:
            if entry.expired:
                self._bury(entry, in_backward=True)
            else:
                kept.append(entry)
        self._in_graphs = kept

    def _bury(self, entry: Entry, in_backward: bool) -> None:
        self._clock += 1
        entry.died = self._clock
        for extent in entry.stored:
            self._live.remove(extent)
        if entry.step == self.steps:
            self._step.remove(entry, in_backward)


def _counted(entries: Iterable[Entry]) -> Counted:
    """Returns key -> number of tensors, exact bytes, stored bytes."""
    counted: Counted = {}
    exact, stored = Bytes(), Bytes()
    for entry in entries:
        row = counted.setdefault(entry.key, [0, 0, 0])
        row[0] += entry.first
        row[1] += entry.given
        if entry.original is not None:
            row[1] += exact.add(entry.original)
        for extent in entry.stored:
            row[2] += stored.add(extent)
    return {key: numbers for key, numbers in counted.items() if any(numbers)}
