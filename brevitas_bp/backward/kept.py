"""Tensors that are kept as they are, and the unpack hook for all saved tensors."""

import weakref
from typing import Any, final

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import SavedTensor, name_of
from brevitas_bp.backward.units import Deferred
from brevitas_bp.codec.base import Packed, is_plain
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.keep import Keep, refuse_modified, version_of
from brevitas_bp.codec.layout import shape_of
from brevitas_bp.errors import CorruptPayloadError

KEEP = Keep()

# A kept tensor with this many elements or more may spare other saved tensors an encoding.
_WORTH_NOTING = 64


@final
class Kept:
    """A kept tensor, if there are no listeners: like a ``Packed`` of :class:`Keep`, but faster to make.

    Speed counts: most tensors that a network saves are parameters and statistics, which are kept.

    Args:
        x: the tensor.
        function: the function that saves it, or that function's name; None outside torch functions.
        module: qualified name of the module that runs.
    """

    __slots__ = ("__weakref__", "function", "module", "tensor", "version")

    def __init__(self, x: Tensor, function: Any, module: str) -> None:
        self.tensor = kept = x.detach()
        self.version = version_of(kept)
        self.function = function
        self.module = module

    def __reduce__(self) -> Any:
        # A copy notes the version anew, so it must not hide that somebody has modified the original.
        function = None if self.function is None else name_of(self.function)
        return Kept, (self.decode(), function, self.module)

    def decode(self) -> Tensor:
        """Returns the tensor itself.

        Raises:
            ModifiedInPlaceError: an in-place operation has modified the tensor since.
        """
        if version_of(self.tensor) != self.version:
            op = None if self.function is None else name_of(self.function)
            refuse_modified(self.tensor, self.version, described(op, self.module))
        return self.tensor


def described(op: str | None, module: str) -> str:
    """Names an operation and its module, for messages."""
    return f"{op or 'a custom function'} in {module or 'the wrapped module'}"


def kept(saved: SavedTensor) -> Packed:
    """Keeps a saved tensor as it is, in a ``Packed`` that knows its size."""
    return KEEP.encode(as_it_is(saved), where=described(saved.op, saved.module))


def as_it_is(saved: SavedTensor) -> Tensor:
    """Returns the tensor to keep, with its Python class, which a custom Function may ask for."""
    return derived_of(saved) if saved.original is None else saved.original


def derived_of(saved: SavedTensor) -> Tensor:
    """Returns the tensor to store: the saved tensor, or a derivative at it."""
    if saved.derivative is None:
        return saved.tensor
    return derivative_at(saved.tensor, saved.derivative)


class ExactStorages:
    """The storages that the graph keeps alive, each unchanged and as a whole.

    Another reference to such a storage costs nothing. An encoding would take bytes and add noise.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[StorageWeakRef, weakref.ref[Kept | Packed], int | None]] = {}

    def note(self, saved: SavedTensor, given: Kept | Packed) -> None:
        """Notes a kept tensor, if keeping it keeps all of its storage."""
        x = saved.tensor
        if saved.derivative is None and is_plain(x) and x.numel() >= _WORTH_NOTING:
            storage = x.untyped_storage()
            if storage.nbytes() <= x.numel() * x.element_size():
                self._noted[storage._cdata] = (
                    StorageWeakRef(storage), weakref.ref(given), version_of(x))

    def hold(self, saved: SavedTensor) -> bool:
        """Whether another operation already keeps the storage of the tensor as it is."""
        x = saved.tensor
        if saved.derivative is not None or not self._noted or not is_plain(x):
            return False
        found = self._noted.get(x.untyped_storage()._cdata)
        return found is not None and found[1]() is not None and found[2] == version_of(x)


def unpack(given: Packed | Kept | Deferred) -> Tensor:
    """Unpack hook; it holds nothing of the forward pass.

    Raises:
        CorruptPayloadError: the codec decoded a tensor of another shape, dtype or device. Autograd would
            not complain: it broadcasts a wrong shape.
    """
    # A tensor that waited for the next call may wait for the end of a norm, too.
    while isinstance(given, Deferred):
        given = given.found()
    packed: Packed | Kept = given
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
