"""The codec interface, what it returns, and the codec that keeps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.recipe import Recipe
from brevitas_bp.errors import ModifiedInPlaceError


@dataclass(frozen=True, eq=False)
class Packed:
    """A stored tensor: self-contained, immutable, decoded as often as needed to the same bits.

    Attributes:
        codec: knows how to decode it.
        tensors: everything that takes memory.
        layout: of the decoded tensor.
        facts: static facts of the codec.
        where: op and module that saved the tensor, for messages.
        nbytes: bytes of all stored tensors: codes, padding, metadata.
    """

    codec: "Codec"
    tensors: tuple[Tensor, ...]
    layout: TensorLayout
    facts: Any = None
    where: str = ""
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        nbytes = 0
        for tensor in self.tensors:
            nbytes += tensor.numel() * tensor.element_size()
        object.__setattr__(self, "nbytes", nbytes)

    def decode(self) -> Tensor:
        """The tensor, with its original shape, strides, dtype and device."""
        return self.codec.decode(self)


class Codec(ABC):
    """Stores tensors. ``encode(Tensor) -> Packed``, ``decode(Packed) -> Tensor``.

    Implementations have no state that changes what an existing :class:`Packed` decodes to.
    """

    #: Shown in reports.
    name: str = "codec"
    #: Whether there is a point in encoding only if the result is smaller.
    compresses: bool = True
    #: What it was built from, where that is known; None: it cannot be built again with other settings.
    recipe: Recipe | None = None

    @abstractmethod
    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores ``x``; all randomness comes from ``seed``."""

    @abstractmethod
    def decode(self, packed: Packed) -> Tensor:
        """Restores what :meth:`encode` stored."""

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """Least bytes a tensor of this layout would take, or None where only encoding tells."""
        return None


class Keep(Codec):
    """Keeps the tensor itself, exact, and notices when it is modified in place.

    NOTE [ Kept tensors are watched ]
    Saved-tensor hooks switch off autograd's own check, so a kept tensor that is modified later would
    silently give wrong gradients. The version counter is compared when backward asks for the tensor.
    It is kept detached: a tensor that saves itself as an output would otherwise never be freed.
    """

    name = "exact"
    compresses = False

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Keeps ``x`` (not a copy)."""
        kept = x.detach()
        layout = TensorLayout(x.shape, (), x.shape, x.dtype, x.device)
        return Packed(self, (kept,), layout, version_of(kept), where)

    def decode(self, packed: Packed) -> Tensor:
        """The kept tensor.

        Raises:
            ModifiedInPlaceError: it was modified by an in-place operation since.
        """
        kept = packed.tensors[0]
        if version_of(kept) != packed.facts:
            raise ModifiedInPlaceError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: {kept.dtype} {list(kept.shape)} saved by {packed.where or 'an operation'} "
                f"is at version {version_of(kept)}; expected version {packed.facts} instead. Call "
                "backward before modifying it, or modify a clone")
        return kept

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """As many bytes as the tensor has."""
        return layout.nbytes


def version_of(x: Tensor) -> int | None:
    """The version counter; None for inference tensors, which have none."""
    return None if x.is_inference() else x._version


class Copy(Codec):
    """Keeps an exact copy of its own, so that the memory of which the tensor is a part can go."""

    name = "exact copy"
    compresses = False

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Copies ``x``."""
        layout = TensorLayout.of(x)
        return Packed(self, (layout.flatten(x.detach()).clone(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """The copy."""
        return packed.layout.restore_flat(packed.tensors[0])


class QuantizeOnBackward(Codec):
    """Keeps the float tensor and sends it through another codec when backward asks for it.

    Saves no memory: it separates the effect of quantization from that of storing early. With the same
    seed the gradient is that of the other codec, bit for bit. Source: Li, 2025, chapter 4.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.keep = Keep()
        self.name = f"{codec.name} on backward"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Keeps ``x`` and the seed."""
        kept = self.keep.encode(x, where=where)
        return Packed(self, kept.tensors, kept.layout, (kept, seed, []), where)

    def decode(self, packed: Packed) -> Tensor:
        """Encodes, at the first call, and decodes now."""
        kept, seed, encoded = packed.facts
        x = self.keep.decode(kept)
        if not encoded:
            # Not at each call: a quantizer that collects statistics would give other codes.
            encoded.append(self.codec.encode(x, seed=seed, where=packed.where))
        # The same break-even rule as for storing early.
        return encoded[0].decode() if encoded[0].nbytes < TensorLayout.of(x).nbytes else x


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary strided tensor that a codec may take apart."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
