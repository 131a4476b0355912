"""Tensors that are kept as they are, and what gives back any saved tensor."""

import weakref
from typing import Any, final

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import SavedTensor, name_of
from brevitas_bp.backward.units import Deferred
from brevitas_bp.codec.base import Keep, Packed, is_plain, refuse_modified, version_of
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.layout import shape_of
from brevitas_bp.errors import CorruptPayloadError

KEEP = Keep()

# Elements from which a tensor that is kept as it is may spare others an encoding.
_WORTH_NOTING = 64


@final
class Kept:
    """A kept tensor where nobody listens: as :class:`Packed` of the codec :class:`Keep`, made faster.

    Most of what a network saves are parameters and statistics.

    Args:
        x: the tensor.
        function: what saves it, or the name of that; None outside of torch functions.
        module: qualified name of the module that runs.
    """

    __slots__ = ("__weakref__", "function", "module", "tensor", "version")

    def __init__(self, x: Tensor, function: Any, module: str) -> None:
        self.tensor = kept = x.detach()
        self.version = version_of(kept)
        self.function = function
        self.module = module

    def decode(self) -> Tensor:
        """The tensor itself.

        Raises:
            ModifiedInPlaceError: it was modified by an in-place operation since.
        """
        if version_of(self.tensor) != self.version:
            op = None if self.function is None else name_of(self.function)
            refuse_modified(self.tensor, self.version, described(op, self.module))
        return self.tensor


def described(op: str | None, module: str) -> str:
    """An operation and its module, for messages."""
    return f"{op or 'a custom function'} in {module or 'the wrapped module'}"


def kept(saved: SavedTensor) -> Packed:
    """A saved tensor kept as it is, where somebody wants to know what it takes."""
    return KEEP.encode(as_it_is(saved), where=described(saved.op, saved.module))


def as_it_is(saved: SavedTensor) -> Tensor:
    """What is kept of a saved tensor: with its class, which a custom Function may ask for."""
    return derived_of(saved) if saved.original is None else saved.original


def derived_of(saved: SavedTensor) -> Tensor:
    """The tensor that is to be stored: the saved one, or a derivative at it."""
    if saved.derivative is None:
        return saved.tensor
    return derivative_at(saved.tensor, saved.derivative)


class ExactStorages:
    """Storages that the graph keeps alive as they are, all of them.

    A reference to one costs nothing, where an encoding would take bytes and add noise.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[StorageWeakRef, weakref.ref[Kept | Packed], int | None]] = {}

    def note(self, saved: SavedTensor, given: Kept | Packed) -> None:
        """Notes a tensor that was kept, if that keeps all of its storage."""
        x = saved.tensor
        if saved.derivative is None and is_plain(x) and x.numel() >= _WORTH_NOTING:
            storage = x.untyped_storage()
            if storage.nbytes() <= x.numel() * x.element_size():
                self._noted[storage._cdata] = (
                    StorageWeakRef(storage), weakref.ref(given), version_of(x))

    def hold(self, saved: SavedTensor) -> bool:
        """Whether another operation keeps the storage of the tensor as it is."""
        x = saved.tensor
        if saved.derivative is not None or not self._noted or not is_plain(x):
            return False
        found = self._noted.get(x.untyped_storage()._cdata)
        return found is not None and found[1]() is not None and found[2] == version_of(x)


def unpack(given: Packed | Kept | Deferred) -> Tensor:
    """Unpack hook. Holds nothing of the forward pass.

    Raises:
        CorruptPayloadError: the codec gave back another kind of tensor. Autograd would not complain: a
            wrong shape is broadcast.
    """
    packed: Packed | Kept = given.packed if isinstance(given, Deferred) else given
    x = packed.decode()
    if isinstance(packed, Kept):
        return x
    layout = packed.layout
    if shape_of(x) != layout.shape or x.dtype != layout.dtype or x.device != layout.device:
        got, expected = (
            (t.dtype, tuple(shape), t.device)
            for t, shape in ((x, shape_of(x)), (layout, layout.shape)))
        raise CorruptPayloadError(
            f"brevitas_bp: the codec {packed.codec.name!r} decoded {got}, but {expected} was saved by "
            f"{packed.where or 'an operation'}; its decode must undo its encode")
    return x
