"""Reports what was decided for each site, and why."""

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.codec import Packed
from brevitas_bp.codec.base import is_plain
from brevitas_bp.codec.keep import Keep
from brevitas_bp.text import mib, table


@dataclass
class ExplainedSite:
    """Tensors that one operation of one module saved, and that were stored alike.

    Attributes:
        module: qualified name of the module; empty for the root.
        op: the torch function that saved the tensors.
        stored: name of the codec.
        reason: why the tensors are stored so.
        known: whether the policy knows the operation.
        tensors: number of tensors.
        given_bytes: bytes of the tensors before encoding. For a rewritten operation, these are the
            tensors saved in place of the originals.
        stored_bytes: bytes that are kept.
        shared_given_bytes: the part of ``given_bytes`` that was counted before: a tensor that several
            operations save counts at each of them.
        shared_bytes: the part of ``stored_bytes`` that was counted before.
    """

    module: str
    op: str
    stored: str
    reason: str
    known: bool
    tensors: int = 0
    given_bytes: int = 0
    stored_bytes: int = 0
    shared_given_bytes: int = 0
    shared_bytes: int = 0


class _Noted(NamedTuple):
    module: str
    op: str | None
    decision: Decision
    name: str
    given: int
    stored: int
    shared_given: int
    shared: int


# Storage, offset, number of elements, and dtype.
_Memory = tuple[Hashable, ...]


class _Counted:
    """What was counted in one forward pass. It keeps no tensor in memory."""

    def __init__(self) -> None:
        # Tensors as they were saved. A reference keeps an address from being used again.
        self._storages: dict[_Memory, StorageWeakRef] = {}
        self._kept: set[_Memory] = set()
        self._payloads: dict[int, weakref.ref[Tensor]] = {}

    def __reduce__(self) -> tuple[type["_Counted"], tuple[()]]:
        # A copy counts nothing that the original has counted. References to storages cannot be copied.
        return _Counted, ()

    def has(self, x: Tensor, kept: bool) -> tuple[bool, bool]:
        """Whether the same memory has been saved before, and kept before; notes it."""
        if not is_plain(x):
            return False, False
        storage = StorageWeakRef(x.untyped_storage())
        key = storage.cdata, x.storage_offset(), x.numel(), x.dtype
        found = key in self._storages, key in self._kept
        self._storages[key] = storage
        if kept:
            self._kept.add(key)
        return found

    def bytes_of(self, payload: Iterable[Tensor]) -> int:
        """Returns the bytes of those tensors of an encoding that were counted before; notes all."""
        shared = 0
        for t in payload:
            before = self._payloads.get(id(t))
            if before is not None and before() is t:
                shared += t.numel() * t.element_size()
            else:
                self._payloads[id(t)] = weakref.ref(t)
        return shared


@dataclass
class Explanation:
    """All decisions of one forward pass, except for parameters and buffers, which are kept.

    Tensors of compiled graphs are included. Their storage was decided when the graphs were made, and
    they are listed with the sizes that they had then. In print, each tensor and each encoding counts
    where it is first saved; ``shared`` stands for bytes that another line has. ``track_saved_memory``
    counts bytes in memory.
    """

    _sites: dict[tuple[str, str, str, str], ExplainedSite] = field(default_factory=dict)
    _noted: list[_Noted] = field(default_factory=list, repr=False)
    _counted: _Counted = field(default_factory=_Counted, repr=False)
    compiled: bool = field(default=False, repr=False)
    #: Numbers of the compiled graphs that ran, and the qualified name of the wrapped module.
    graphs: set[int] = field(default_factory=set, repr=False)
    prefix: str = field(default="", repr=False)

    def add(self, saved: SavedTensor, packed: Packed, decision: Decision) -> None:
        """Records one saved tensor."""
        if not packed.codec.compresses:
            self.add_kept(saved, decision, packed.codec.name, packed.nbytes)
            return
        given = packed.layout.nbytes
        self.add_stored(
            saved, decision, packed.codec.name, given, packed.nbytes,
            given * self._counted.has(saved.tensor, False)[0], self._counted.bytes_of(packed.tensors))

    def add_kept(
            self, saved: SavedTensor, decision: Decision, name: str = Keep.name,
            nbytes: int | None = None) -> None:
        """Records one saved tensor that is kept as it is."""
        if nbytes is None:
            nbytes = saved.tensor.numel() * saved.tensor.element_size()
        given, kept = self._counted.has(saved.tensor, True)
        self.add_stored(saved, decision, name, nbytes, nbytes, nbytes * given, nbytes * kept)

    def add_stored(
            self, saved: SavedTensor, decision: Decision, name: str, given: int, stored: int,
            shared_given: int = 0, shared: int = 0) -> None:
        """Records a saved tensor of ``given`` bytes that a codec called ``name`` has stored."""
        # ``sites`` counts, when it is read: this method runs for every tensor of every step.
        self._noted.append(_Noted(
            saved.module, saved.op, decision, name, given, stored, shared_given, shared))

    @property
    def sites(self) -> dict[tuple[str, str, str, str], ExplainedSite]:
        """Module, operation, codec and reason -> tensors that were stored alike, in order of saving."""
        noted, self._noted = self._noted, []
        for note in noted:
            self._count(note)
        return self._sites

    def _count(self, noted: _Noted) -> None:
        op = noted.op or "custom function"
        decision, reason = noted.decision, noted.decision.reason
        if decision.codec is not None and noted.name == "exact":
            reason = "encoding would not make it smaller"
        key = (noted.module, op, noted.name, reason)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = ExplainedSite(
                noted.module, op, noted.name, reason, decision.known)
        site.tensors += 1
        site.stored_bytes += noted.stored
        site.given_bytes += noted.given
        site.shared_bytes += noted.shared
        site.shared_given_bytes += noted.shared_given

    @property
    def unknown(self) -> list[str]:
        """Names of the operations that the policy does not know; the tensors they save are exact."""
        return unknown_operations((s.op, s.known, s.given_bytes) for s in self.sites.values())

    def __str__(self) -> str:
        lines = [("module", "op", "stored as", "why", "tensors", "given MiB", "stored MiB")]
        sites = self.sites.values()
        lines += [
            (s.module or "(root)", s.op, s.stored, s.reason, str(s.tensors),
             _own(s.given_bytes, s.shared_given_bytes), _own(s.stored_bytes, s.shared_bytes))
            for s in sites]
        lines.append((
            "total", "", "", "", str(sum(s.tensors for s in sites)),
            mib(sum(s.given_bytes - s.shared_given_bytes for s in sites)),
            mib(sum(s.stored_bytes - s.shared_bytes for s in sites))))
        text = table(lines, left=4, total=True)
        return "\n".join([text, *unknown_note(self.unknown)])


def _own(nbytes: int, shared: int) -> str:
    return "shared" if 0 < nbytes == shared else mib(nbytes - shared)


def unknown_operations(seen: Iterable[tuple[str, bool, int]]) -> list[str]:
    """Returns the names of the unknown operations, sorted by the bytes that they save, most first."""
    by_name: dict[str, int] = {}
    for op, known, nbytes in seen:
        if not known:
            by_name[op] = by_name.get(op, 0) + nbytes
    return sorted(by_name, key=lambda name: -by_name[name])


def unknown_note(names: list[str]) -> list[str]:
    """Returns one line that names the operations left exact, or no line if there are none."""
    return [] if not names else [
        f"kept exact, because they have no rule: {', '.join(names)} (see brevitas_bp.register_op)"]
