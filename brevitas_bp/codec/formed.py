"""Stores the input or output of a function as the number in which its backward is affine."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from brevitas_bp.activations.forms import Form
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import WrappingCodec
from brevitas_bp.format.arithmetic import compute_dtype, to_finite


@final
class FormCodec(WrappingCodec):
    """Stores ``d`` of a :class:`~brevitas_bp.activations.forms.Form`, and decodes to the saved tensor.

    If ``d`` is unbiased, so is the gradient. The decoded tensor itself is not.

    Args:
        inner: stores ``d``. It must not change its sign
            (:attr:`~brevitas_bp.codec.Codec.keeps_sign`).
        form: the form of the saved tensor.

    >>> from brevitas_bp.activations.forms import OF_INPUT
    >>> from brevitas_bp.codec import Copy
    >>> FormCodec(Copy(), OF_INPUT["log"]).encode(torch.tensor([0.25, 8.0]), seed=0).decode()
    tensor([0.2500, 8.0000])
    """

    def __init__(self, inner: Codec, form: Form) -> None:
        super().__init__(inner)
        self.form = form
        self.name = f"{inner.name}, of the derivative"
        self.decodes_anew = True

    def around(self, inner: Codec) -> Codec:
        return FormCodec(inner, self.form)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores ``d``, which is computed in float32 or float64."""
        with torch.no_grad():
            base = TensorLayout.base(x.detach()).resolve_neg()
            d = self.form.forth(base.to(compute_dtype(x.dtype)))
        stored = self.inner.encode(d, seed=seed, where=where)
        return Packed(self, stored.tensors, TensorLayout.of(x), stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the tensor whose ``d`` is the stored one."""
        layout = packed.layout
        with torch.no_grad():
            # A number that rounds up to infinity would not have the stored d.
            return layout.restore(to_finite(
                self.form.back(self.stored_in(packed).decode()), layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        return packed.facts.codec.tensor_types(packed.facts)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        # d is in the compute dtype, which decides the dtype of metadata alone.
        return self.inner.stored_nbytes(layout)
