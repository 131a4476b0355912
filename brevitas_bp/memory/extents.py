"""The parts of storages that tensors occupy, counted so that no byte counts twice."""

from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import storage_id
from brevitas_bp.codec.base import is_plain
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shard import shard_of


class Extent(NamedTuple):
    """The part of a storage that a tensor occupies.

    Attributes:
        storage: identity of the storage, valid while something holds the storage.
        storage_nbytes: bytes of the storage.
        view: offset, shape and strides; tensors with equal views count once.
        nbytes: bytes of the elements that the tensor shows, each once.
    """

    storage: int
    storage_nbytes: int
    view: tuple[Any, ...]
    nbytes: int


def extent_of(x: Tensor) -> Extent:
    """Returns the extent of a tensor; that of its shard if it is a DTensor."""
    if type(x) is Tensor and x.is_contiguous():
        # Most tensors; the way below gives the same and takes longer.
        storage = x.untyped_storage()
        return Extent(
            storage._cdata, storage.nbytes(), (x.storage_offset(), x.shape, x.stride()),
            x.numel() * x.element_size())
    x = shard_of(x)
    own = TensorLayout.base(x) if is_plain(x) else x
    nbytes = own.numel() * x.element_size()
    try:
        view = (x.storage_offset(), own.shape, own.stride())
        return Extent(storage_id(x), x.untyped_storage().nbytes(), view, nbytes)
    except (NotImplementedError, RuntimeError):
        return Extent(id(x), nbytes, (), nbytes)


def weak_storage(x: Tensor) -> StorageWeakRef | None:
    """Returns a weak reference to a storage; while it is held, no other storage reuses the address."""
    try:
        return StorageWeakRef(shard_of(x).untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


class Bytes:
    """Counts extents: each view once, and never more bytes than its storage has.

    A view counts only its own elements: a batch sliced from a data set does not count the data set.
    """

    def __init__(self) -> None:
        self._views: set[tuple[Any, ...]] = set()
        self._counted: defaultdict[int, int] = defaultdict(int)

    def add(self, extent: Extent) -> int:
        """Counts an extent. Returns the bytes that it adds."""
        key = (extent.storage, *extent.view)
        if key in self._views:
            return 0
        self._views.add(key)
        left = extent.storage_nbytes - self._counted[extent.storage]
        added = max(0, min(extent.nbytes, left))
        self._counted[extent.storage] += added
        return added


class _Views:
    """The views of one storage that are there: how often each is, and the sum of their bytes."""

    __slots__ = ("nbytes", "times", "together")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.times: dict[tuple[Any, ...], int] = {}
        self.together = 0


class LiveBytes:
    """Counts extents that come and go. The total is always what :class:`Bytes` counts of those there.

    Attributes:
        total: bytes of all extents that were added and not removed.
    """

    def __init__(self) -> None:
        self.total = 0
        self._storages: dict[int, _Views] = {}

    def add(self, extent: Extent) -> None:
        """Counts an extent, once more if it is there already."""
        storage, nbytes, view, own = extent
        views = self._storages.get(storage)
        if views is None:
            views = self._storages[storage] = _Views(nbytes)
        times = views.times.get(view, 0)
        views.times[view] = times + 1
        if not times:
            self.total -= min(views.together, nbytes)
            views.together += own
            self.total += min(views.together, nbytes)

    def remove(self, extent: Extent) -> None:
        """Takes back one :meth:`add` of the same extent."""
        storage, nbytes, view, own = extent
        views = self._storages[storage]
        views.times[view] -= 1
        if views.times[view]:
            return
        del views.times[view]
        self.total -= min(views.together, nbytes)
        views.together -= own
        self.total += min(views.together, nbytes)
        if not views.times:
            del self._storages[storage]
