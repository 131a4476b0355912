"""Applies a quantizer to gradients: fast where compiled kernels know its parts."""

import copy
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.lowering import lower
from brevitas_bp.core.average import AverageQuant
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.core.rows import OverRowView, RowQuant
from brevitas_bp.format.random import derive, seeded

Values = Callable[[Tensor, int], Tensor]

# Codecs for rows of different lengths, for one quantizer.
_LENGTHS = 16


class GradientQuantizer:
    """Rounds gradients with a quantizer: ``(gradient, seed) -> values`` in its shape and dtype.

    A bucket quantizer whose parts compiled kernels know runs in these kernels, rows and mixed rows
    included. Any other quantizer runs through its modules. Neither draws from torch's generators.

    Args:
        quantizer: a ``tensor_quant`` module, or a codec.
        name: for reports.
    """

    def __init__(self, quantizer: nn.Module | Codec, name: str) -> None:
        self.quantizer = quantizer
        self.name = name
        self._values = _values_of(quantizer)
        self._register()

    def __call__(self, grad: Tensor, seed: int) -> Tensor:
        """Returns the rounded gradient."""
        if grad.numel() == 0:
            return grad
        with torch.no_grad():
            return self._values(grad, seed)

    def _register(self) -> None:
        key = next(_keys)
        _known[key] = self
        self.key = torch.tensor(key, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradientQuantizer":
        return GradientQuantizer(copy.deepcopy(self.quantizer, memo), self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


_keys = itertools.count()
_known: WeakValueDictionary[int, GradientQuantizer] = WeakValueDictionary()


def _values_of(quantizer: nn.Module | Codec) -> Values:
    if isinstance(quantizer, Codec):
        return lambda x, seed: quantizer.decode(quantizer.encode(x, seed=seed))
    if isinstance(quantizer, RowQuant):
        return _of_rows(quantizer)
    if isinstance(quantizer, AverageQuant) or (
            isinstance(quantizer, (BucketRescalingIntQuant, BucketLevelQuant))
            and lower(quantizer) is not None):
        return _values_of(codec_from(quantizer))
    return _by_modules(quantizer)


def _by_modules(quantizer: nn.Module) -> Values:
    def values(x: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            return quantizer(x)[0]

    return values


def _of_rows(quantizer: RowQuant) -> Values:
    """Runs the inner quantizer in kernels. See :class:`~brevitas_bp.core.rows.RowQuant`."""
    inner: Any = quantizer.bucket_quant
    if not isinstance(inner, (BucketRescalingIntQuant, BucketLevelQuant)):
        return _by_modules(quantizer)
    per_row = isinstance(inner.input_view_impl, OverRowView)
    if lower(_with_buckets(inner, 8) if per_row else inner) is None:
        return _by_modules(quantizer)
    codecs: dict[int, Codec] = {}

    def codec_for(length: int) -> Codec:
        if not per_row:
            length = 0
        if length not in codecs:
            while len(codecs) >= _LENGTHS:
                codecs.pop(next(iter(codecs)))
            codecs[length] = _codec_of_rows(inner, length) if per_row else codec_from(inner)
        return codecs[length]

    def values(x: Tensor, seed: int) -> Tensor:
        def inner_values(rows: Tensor) -> Tensor:
            codec = codec_for(rows.shape[1])
            return codec.decode(codec.encode(rows.contiguous(), seed=seed))

        return quantizer.apply_to_rows(x, inner_values)

    return values


def _codec_of_rows(inner: nn.Module, length: int) -> Codec:
    codec = codec_from(_with_buckets(inner, -(-length // 8) * 8))
    return codec if length % 8 == 0 else codec.in_rows(length, length)


def _with_buckets(inner: nn.Module, size: int) -> nn.Module:
    """Returns a copy of a quantizer of rows, with buckets of the flattened tensor."""
    other = copy.deepcopy(inner)
    for part in list(other.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, OverRowView):
                setattr(part, name, OverBucketView(size))
    return other


# NOTE [ Gradients are rounded by operators in compiled graphs ]
# 1. Dynamo does not trace quantizers: their kernels are not torch operations, and seeds are Python
#    integers that differ in each call. The operators are opaque.
# 2. Quantizers, and the object that gives seeds, are found by keys. The keys are tensors, so that equal
#    blocks with different quantizers share one graph.
# 3. ``gradient_seed`` draws the seed in the forward pass. It takes the layer's output, so that calls of
#    one layer on different inputs differ, and no pass over the graph merges them.
_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_library.define(
    "gradient_seed(Tensor output, Tensor owner) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define("rounded_gradient(Tensor grad, Tensor seed, Tensor quantizer, int place) -> Tensor")
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register_owner(owner: Any) -> Tensor:
    """Returns a key for an object with a method ``next_seed``."""
    key = next(_keys)
    _owners[key] = owner
    return torch.tensor(key, device="cpu")


def _found(table: Any, key: Tensor) -> Any:
    found = table.get(int(key))
    if found is None:
        raise RuntimeError(
            "brevitas_bp.grad: a compiled graph rounds gradients with a quantizer that no longer "
            "exists, because its model was unwrapped or deleted after the graph was made; keep the "
            "model until backward has run")
    return found


def _gradient_seed(output: Tensor, owner: Tensor) -> Tensor:
    # The bits of an unsigned seed, as a signed integer.
    seed = _found(_owners, owner).next_seed()
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.tensor(signed, dtype=torch.int64, device="cpu")


def _rounded_gradient(grad: Tensor, seed: Tensor, quantizer: Tensor, place: int) -> Tensor:
    result = _found(_known, quantizer)(grad, derive(int(seed), place))
    # An operator may not return its argument.
    return result.clone() if result is grad else result


_library.impl("gradient_seed", _gradient_seed, "CompositeExplicitAutograd")
_library.impl("rounded_gradient", _rounded_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::gradient_seed", lib=_library)
def _gradient_seed_fake(output: Tensor, owner: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("brevitas_bp::rounded_gradient", lib=_library)
def _rounded_gradient_fake(grad: Tensor, seed: Tensor, quantizer: Tensor, place: int) -> Tensor:
    return torch.empty_like(grad)
