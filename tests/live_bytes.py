"""Measures how much memory a call takes, besides the memory in use before."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveBytes(TorchDispatchMode):
    """Counts storages made by operations, while they live; not the memory inside a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, StorageWeakRef] = {}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        for storage in _storages((arguments, keywords)):
            if storage._cdata not in self.made:
                self.before.setdefault(storage._cdata, StorageWeakRef(storage))
        result = function(*arguments, **(keywords or {}))
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        for storage in _storages(result):
            known = self.before.get(storage._cdata)
            if known is None or known.expired():
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.made.values()))
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            yield leaf.untyped_storage()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Returns the largest bytes of tensors that ``function`` holds at a time, its result included."""
    with _LiveBytes() as mode:
        function()
    return mode.peak
