"""The pack and unpack hooks of one forward pass."""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.ops import Location, current_location, located
from brevitas_bp.backward.parameters import ParameterSet, storage_id
from brevitas_bp.backward.policy import Policy, SavedTensor, can_encode
from brevitas_bp.codec.base import Codec, Keep, Packed, QuantizeOnBackward, version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.stock import StatefulCodec
from brevitas_bp.errors import CorruptPayloadError

_KEEP = Keep()

#: Called as ``listener(saved, packed, is_parameter)`` for every saved tensor.
Listener = Callable[[SavedTensor, Packed, bool], None]


class ForwardPass:
    """One forward pass: decides for each saved tensor, and encodes it once.

    NOTE [ One encode per storage and version ]
    1. A tensor saved by several operations is encoded once: the key is its storage, offset, shape,
       strides, dtype, version, lazy conjugation or negation, and the codec.
    2. The storage is held by a weak reference. It keeps the address from being reused, not the memory.
    3. The payload is held weakly too: it lives exactly as long as the graph nodes that need it.
    4. The table lives as long as the forward pass.

    Args:
        root: the module that runs.
        codec_of: module name -> configured codec, or None for exact.
        policy: saved tensor -> codec, or None for exact.
        next_seed: seed of the next encode.
        on_backward: keep floats and quantize when backward asks.
        listeners: told of every saved tensor.
    """

    def __init__(
            self,
            root: nn.Module,
            codec_of: Callable[[str], Codec | None],
            policy: Policy,
            next_seed: Callable[[], int],
            on_backward: bool = False,
            listeners: tuple[Listener, ...] = ()) -> None:
        outer = current_location()
        self.location = Location(root, "" if outer is None else outer.qualified_module)
        self.parameters = ParameterSet(root)
        self.codec_of = codec_of
        self.policy = policy
        self.next_seed = next_seed
        self.on_backward = on_backward
        self.listeners = listeners
        self._encoded: dict[Any, tuple[StorageWeakRef, weakref.ref[Packed]]] = {}
        self._slots: defaultdict[StatefulCodec, itertools.count[int]] = defaultdict(itertools.count)

    def pack(self, x: Tensor) -> Packed:
        """Pack hook."""
        location = self.location
        parameter = self.parameters.contains(x, location.arguments)
        if parameter and not self.listeners:
            # Most saved tensors of a small step are parameters: nothing to decide or to share.
            return _KEEP.encode(x, where=self._where(location.op, location.qualified_module))
        codec = None if parameter else self.codec_of(location.module)
        saved = SavedTensor(
            x, location.op, location.qualified_module, codec, location.arguments)
        chosen = None
        if not parameter and can_encode(x):
            chosen = self.policy(saved)
            if not (chosen is None or isinstance(chosen, Codec)):
                raise TypeError(
                    "brevitas_bp.QuantBackwardWrapper: policy must return a Codec or None, got "
                    f"{chosen!r}; codec_from makes a codec of a quantizer")
        packed = self._encode_once(saved, _KEEP if chosen is None else chosen)
        for listener in self.listeners:
            listener(saved, packed, parameter)
        return packed

    def _encode_once(self, saved: SavedTensor, codec: Codec) -> Packed:
        x = saved.tensor
        key = (storage_id(x), x.storage_offset(), x.shape, x.stride(), x.dtype, version_of(x),
               x.is_conj(), x.is_neg(), id(codec)) if can_encode(x) else None
        if key in self._encoded:
            packed = self._encoded[key][1]()
            if packed is not None:
                return packed
        packed = self._encode(saved, codec)
        if key is not None:
            self._encoded[key] = (StorageWeakRef(x.untyped_storage()), weakref.ref(packed))
        return packed

    def _encode(self, saved: SavedTensor, codec: Codec) -> Packed:
        x = saved.tensor
        where = self._where(saved.op, saved.module)
        if codec is _KEEP:
            return _KEEP.encode(x, where=where)
        if isinstance(codec, StatefulCodec):
            codec = codec.slot(next(self._slots[codec]))
        layout = TensorLayout.of(x)
        least = codec.stored_nbytes(layout)
        if least is not None and least >= layout.nbytes:
            return _KEEP.encode(x, where=where)
        if self.on_backward:
            return QuantizeOnBackward(codec).encode(x, seed=self.next_seed(), where=where)
        packed = codec.encode(x, seed=self.next_seed(), where=where)
        # Codes, padding and metadata must be smaller than what they replace.
        return packed if packed.nbytes < layout.nbytes else _KEEP.encode(x, where=where)

    @staticmethod
    def _where(op: str | None, module: str) -> str:
        return f"{op or 'a custom function'} in {module or 'the wrapped module'}"

    def __enter__(self) -> "ForwardPass":
        self._located = located(self.location)
        self._located.__enter__()
        self._hooks = saved_tensors_hooks(self.pack, unpack)
        try:
            self._hooks.__enter__()
        except RuntimeError as error:
            self._located.__exit__(None, None, None)
            raise RuntimeError(
                "QuantBackwardWrapper.forward: saved-tensor hooks are disabled here (torch.func "
                "transforms such as grad and vjp do that); run the wrapped module itself, "
                f"wrapper.module, inside the transform. PyTorch says: {error}") from error
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self._hooks.__exit__(*exception)
        finally:
            self._located.__exit__(*exception)


def unpack(packed: Packed) -> Tensor:
    """Unpack hook. Holds nothing of the forward pass.

    Raises:
        CorruptPayloadError: the codec gave back another kind of tensor. Autograd would not complain: a
            wrong shape is broadcast.
    """
    x, layout = packed.decode(), packed.layout
    if x.shape != layout.shape or x.dtype != layout.dtype or x.device != layout.device:
        got, expected = ((t.dtype, tuple(t.shape), t.device) for t in (x, layout))
        raise CorruptPayloadError(
            f"brevitas_bp: the codec {packed.codec.name!r} decoded {got}, but {expected} was saved by "
            f"{packed.where or 'an operation'}; its decode must undo its encode")
    return x
