"""Finds the learned tensors of a model: parametrized ones, and those of Brevitas layers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from brevitas.proxy.parameter_quant import ParameterQuantProxyFromInjector
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from brevitas_bp.backward.transparent import all_modules
from brevitas_bp.core.learned import NestedFloor

# Keys of scales in a state_dict -> the module's prefix and the tensor's name.
_SCALE_KEYS = (
    re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<tensor>\w+)\.0\.scaling_impl\.value"),
    re.compile(
        r"(?P<prefix>(?:.*\.)?)(?P<tensor>weight|bias)_quant\.tensor_quant\.(?:_orig_mod\.)?"
        r"scaling_impl\.value"))


@dataclass(frozen=True)
class LearnedTensor:
    """A parameter and its learned quantizer.

    Attributes:
        parameter: the float parameter P.
        quantizer: its quantizer.
    """

    parameter: Tensor
    quantizer: NestedFloor

    @property
    def scale(self) -> Tensor:
        """The scale in use, differentiable: 0-d, or with the dimensions of the parameter."""
        return self.quantizer.scale

    def integers(self) -> Tensor:
        """Returns ``floor(P / s)`` as floats."""
        return self.quantizer.integers(self.parameter)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Returns what the layer computes with: ``floor(P / s) * s``."""
        return self.quantizer.values(self.parameter)


def _of_module(module: nn.Module) -> Iterator[LearnedTensor]:
    if isinstance(module, ParametrizationList):
        floors = [part for part in module if isinstance(part, NestedFloor)]
        if floors and len(module) > 1:
            raise ValueError(
                "brevitas_bp.nn.learned: a learned tensor cannot have other parametrizations, got "
                f"{', '.join(type(part).__name__ for part in module)} on one tensor; remove the others "
                "(torch.nn.utils.parametrize.remove_parametrizations)")
        if floors:
            yield LearnedTensor(module.original, floors[0])
    elif isinstance(module, ParameterQuantProxyFromInjector):
        quantizer: Any = getattr(module.tensor_quant, "_orig_mod", module.tensor_quant)
        if isinstance(quantizer, NestedFloor):
            parameters: Any = module.tracked_parameter_list
            yield from (LearnedTensor(parameter, quantizer) for parameter in parameters)


def learned_tensors(where: str, model: nn.Module) -> list[LearnedTensor]:
    """Returns the learned tensors of ``model``.

    They are looked up anew in each call, because Brevitas may replace quantizers.

    Args:
        where: the caller, for the message.
        model: any module; wrappers and compiled modules are looked into.

    Raises:
        ValueError: there are none, or one has other parametrizations too.
    """
    found: list[LearnedTensor] = []
    seen: set[int] = set()
    for module in all_modules(model):
        if id(module) not in seen:
            seen.add(id(module))
            found.extend(_of_module(module))
    if not found:
        raise ValueError(
            f"{where}: expected a model with learned tensors, got {type(model).__name__} without any; "
            "call brevitas_bp.nn.learned.learn_quantization(model, ...) first, or build Brevitas layers "
            "with weight_quant=LearnedFloorIntWeightPerRowFloat")
    return found


@dataclass(frozen=True)
class Place:
    """Where a learned tensor is in a ``state_dict``.

    Attributes:
        name: name that the tensor has in the model without quantization, such as "0.weight".
        key: key of the parameter.
        own: beginning of the keys of its quantizer.
    """

    name: str
    key: str
    own: str


def _place(key: str) -> Place | None:
    for pattern in _SCALE_KEYS:
        match = pattern.fullmatch(key)
        if match is not None:
            prefix, tensor = match["prefix"], match["tensor"]
            if pattern is _SCALE_KEYS[0]:
                own = f"{prefix}parametrizations.{tensor}."
                return Place(prefix + tensor, own + "original", own)
            return Place(prefix + tensor, prefix + tensor, f"{prefix}{tensor}_quant.")
    return None


def placed_learned_tensors(where: str, model: nn.Module) -> dict[Place, LearnedTensor]:
    """Returns the learned tensors and their places, in the order of the ``state_dict``."""
    quantizers = {
        id(tensor.quantizer.scaling_impl.value): tensor.quantizer
        for tensor in learned_tensors(where, model)}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    found: dict[Place, LearnedTensor] = {}
    for key, scale in state.items():
        place = _place(key) if id(scale) in quantizers else None
        if place is not None and place.key in state:
            found[place] = LearnedTensor(state[place.key], quantizers[id(scale)])
    return found


def named_learned_tensors(model: nn.Module) -> dict[str, LearnedTensor]:
    """Returns the learned tensors by name: "0.weight" for ``model[0].weight``.

    Raises:
        ValueError: there are none.
    """
    placed = placed_learned_tensors("brevitas_bp.nn.learned.named_learned_tensors", model)
    return {place.name: tensor for place, tensor in placed.items()}
