"""Reports what was decided for each site, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.codec import Packed
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
        stored_bytes: bytes that are kept. An encoding that several sites share counts at each of them.
    """

    module: str
    op: str
    stored: str
    reason: str
    known: bool
    tensors: int = 0
    given_bytes: int = 0
    stored_bytes: int = 0


@dataclass
class Explanation:
    """All decisions of one forward pass, except for parameters and buffers, which are kept.

    Tensors of compiled graphs are included. Their storage was decided when the graphs were made, and
    they are listed with the sizes that they had then. An encoding that several sites share counts at
    each of them, in the total too. ``track_saved_memory`` counts bytes in memory, each once.
    """

    _sites: dict[tuple[str, str, str, str], ExplainedSite] = field(default_factory=dict)
    _noted: list[tuple[str, str | None, Decision, str, int, int]] = field(
        default_factory=list, repr=False)
    compiled: bool = field(default=False, repr=False)
    #: Numbers of the compiled graphs that ran, and the qualified name of the wrapped module.
    graphs: set[int] = field(default_factory=set, repr=False)
    prefix: str = field(default="", repr=False)

    def add(self, saved: SavedTensor, packed: Packed, decision: Decision) -> None:
        """Records one saved tensor."""
        stored = packed.nbytes
        given = packed.layout.nbytes if packed.codec.compresses else stored
        self.add_stored(saved, decision, packed.codec.name, given, stored)

    def add_kept(self, saved: SavedTensor, decision: Decision) -> None:
        """Records one saved tensor that is kept as it is."""
        nbytes = saved.tensor.numel() * saved.tensor.element_size()
        self.add_stored(saved, decision, Keep.name, nbytes, nbytes)

    def add_stored(
            self, saved: SavedTensor, decision: Decision, name: str, given: int,
            stored: int) -> None:
        """Records a saved tensor of ``given`` bytes that a codec called ``name`` has stored."""
        # ``sites`` counts, when it is read: this method runs for every tensor of every step.
        self._noted.append((saved.module, saved.op, decision, name, given, stored))

    @property
    def sites(self) -> dict[tuple[str, str, str, str], ExplainedSite]:
        """Module, operation, codec and reason -> tensors that were stored alike, in order of saving."""
        noted, self._noted = self._noted, []
        for note in noted:
            self._count(*note)
        return self._sites

    def _count(
            self, module: str, op: str | None, decision: Decision, name: str, given: int,
            stored: int) -> None:
        op = op or "custom function"
        reason = decision.reason
        if decision.codec is not None and name == "exact":
            reason = "encoding would not make it smaller"
        key = (module, op, name, reason)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = ExplainedSite(module, op, name, reason, decision.known)
        site.tensors += 1
        site.stored_bytes += stored
        site.given_bytes += given

    @property
    def unknown(self) -> list[str]:
        """Names of the operations that the policy does not know; the tensors they save are exact."""
        return unknown_operations((s.op, s.known, s.given_bytes) for s in self.sites.values())

    def __str__(self) -> str:
        lines = [("module", "op", "stored as", "why", "tensors", "given MiB", "stored MiB")]
        lines += [
            (s.module or "(root)", s.op, s.stored, s.reason, str(s.tensors), mib(s.given_bytes),
             mib(s.stored_bytes)) for s in self.sites.values()]
        sites = self.sites.values()
        lines.append((
            "total", "", "", "", str(sum(s.tensors for s in sites)),
            mib(sum(s.given_bytes for s in sites)), mib(sum(s.stored_bytes for s in sites))))
        text = table(lines, left=4, total=True)
        return "\n".join([text, *unknown_note(self.unknown)])


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
