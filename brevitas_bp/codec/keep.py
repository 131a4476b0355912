"""The codec that keeps a tensor as it is, and notices if somebody modifies it."""

from typing import NoReturn

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import refuse, versions_of
from brevitas_bp.codec.layout import TensorLayout, shape_of
from brevitas_bp.errors import ModifiedInPlaceError


class Keep(Codec):
    """Keeps the tensor itself, exact, and detects in-place modification.

    NOTE [ Kept tensors are watched ]
    Saved-tensor hooks switch off autograd's own check. So a kept tensor that is modified later would
    silently give wrong gradients. This codec compares the version counter when backward asks for the
    tensor. It detaches the tensor: otherwise an output saved by its own operation would never be freed.
    """

    lossy = False
    name = "exact"
    compresses = False
    owns = False
    keeps = True

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Keeps ``x`` itself, not a copy."""
        kept = x.detach()
        layout = TensorLayout.without_strides(shape_of(x), x.dtype, x.device)
        return Packed(self, (kept,), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the kept tensor.

        Raises:
            ModifiedInPlaceError: an in-place operation has modified it since.
        """
        if len(packed.tensors) != 1:
            refuse(packed, "1 stored tensor", len(packed.tensors))
        kept = packed.tensors[0]
        if versions_of(packed.tensors) != packed.versions:
            refuse_modified(kept, packed.versions[0], packed.where)
        return kept

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """Returns the bytes of the tensor itself."""
        return layout.nbytes


def version_of(x: Tensor) -> int | None:
    """Returns the version counter; None for inference tensors, which have none."""
    return None if x.is_inference() else x._version


def refuse_modified(kept: Tensor, version: int | None, where: str) -> NoReturn:
    """Raises for a kept tensor that is no longer at ``version``.

    Raises:
        ModifiedInPlaceError: always.
    """
    raise ModifiedInPlaceError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: {kept.dtype} {list(kept.shape)} saved by {where or 'an operation'} is at "
        f"version {version_of(kept)}; expected version {version} instead. Call backward before "
        "modifying it, or modify a clone")
