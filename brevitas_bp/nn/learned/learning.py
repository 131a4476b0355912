"""Turns weights and biases of a model into learned tensors."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from brevitas.proxy.parameter_quant import ParameterQuantProxyFromInjector
from torch import Tensor, nn
from torch.nn.utils import parametrize

from brevitas_bp.backward.transparent import Transparent
from brevitas_bp.core.learned import Granularity, LearnedFloor, LearnedScale, scale_shape
from brevitas_bp.core.nested_floor import LEAST_SCALE, check_lam
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.nn.learned.learn_quantization"
_DENSE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d)


def learn_quantization(
        model: nn.Module, *, granularity: Granularity, lam: float | None,
        include: str | Sequence[str] | None = None, exclude: str | Sequence[str] = (),
        unanimity: bool = True, scale_init: float = LEAST_SCALE) -> list[str]:
    """Makes layers compute with ``floor(P / s) * s``, with learned scales s, in place of P.

    Registers a parametrization (``torch.nn.utils.parametrize``) on each chosen tensor. The float
    parameter stays the same object. Parametrizations add one parameter per tensor, the scale. So create
    the optimizer afterwards, with :func:`~brevitas_bp.nn.learned.adam`.

    Tensors with one dimension (biases) always have one scale.

    ``parametrize.remove_parametrizations(layer, "weight")`` makes the quantized values the parameter
    again.

    Args:
        model: any module.
        granularity: which elements share a scale, see
            :func:`~brevitas_bp.core.learned.scale_shape`.
        lam: threshold of the gradient-ratio rule, see
            :func:`~brevitas_bp.core.nested_floor.ratio_gradient`. None: only a penalty moves the scales.
        include: patterns of tensor names ("*.weight", "features.0.*"). None: weights and biases of all
            linear layers and convolutions.
        exclude: patterns of tensors to leave as they are.
        unanimity: see :func:`~brevitas_bp.core.nested_floor.ratio_gradient`.
        scale_init: first value of all scales.

    Returns:
        the names of the chosen tensors.

    Raises:
        ValueError: ``lam``, ``granularity`` or ``scale_init`` is not possible, or a chosen tensor cannot
            be learned. The model is then unchanged.
        UnknownNameError: a pattern matches no tensor.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> learn_quantization(net, granularity="row", lam=1e-10)
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_lam(_WHERE, lam)
    LearnedScale((), scale_init)
    tensors = list(_tensors(model))
    _check_patterns([*_patterns(include or ()), *_patterns(exclude)], [name for name, *_ in tensors])
    chosen = [entry for entry in tensors if _is_chosen(entry, include, exclude)]
    if not chosen:
        raise ValueError(
            f"{_WHERE}: expected a linear layer, a convolution or a pattern that leaves a tensor, got "
            f"{type(model).__name__} with none; pass include=")
    shapes = [_shape(entry, granularity) for entry in chosen]
    for (_, module, attribute, x), shape in zip(chosen, shapes):
        scaling = LearnedScale(shape, scale_init, x.dtype, x.device)
        parametrize.register_parametrization(
            module, attribute, LearnedFloor(scaling, lam, unanimity).train(module.training))
    return [name for name, *_ in chosen]


_Entry = tuple[str, nn.Module, str, Tensor]


def _tensors(model: nn.Module) -> Iterator[_Entry]:
    """Yields (name, module, attribute, parameter); a parametrized tensor has its name in the module."""
    for name, module in model.named_modules():
        while isinstance(module, Transparent):
            module = module.module
        if "parametrizations" in name.split("."):
            continue
        prefix = f"{name}." if name else ""
        for attribute, parameter in module.named_parameters(recurse=False):
            yield prefix + attribute, module, attribute, parameter
        if parametrize.is_parametrized(module):
            tables: Any = module.parametrizations
            # Reading the tensor itself could change it: spectral norm iterates.
            yield from ((prefix + name, module, name, torch.empty(0)) for name in tables)


def _patterns(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _check_patterns(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError(
                f"{_WHERE}: the pattern {pattern!r} matches no tensor{nearest(pattern, names)}")


def _is_chosen(
        entry: _Entry, include: str | Sequence[str] | None, exclude: str | Sequence[str]) -> bool:
    name, module, attribute, _ = entry
    if any(fnmatchcase(name, pattern) for pattern in _patterns(exclude)):
        return False
    if include is None:
        return isinstance(module, _DENSE) and attribute in ("weight", "bias")
    return any(fnmatchcase(name, pattern) for pattern in _patterns(include))


def _shape(entry: _Entry, granularity: str) -> tuple[int, ...]:
    """Returns the shape of the scale, after checking that the tensor can be learned."""
    name, module, attribute, x = entry
    where = f"{_WHERE}: {name!r}"
    if parametrize.is_parametrized(module, attribute):
        tables: Any = module.parametrizations
        parts = ", ".join(type(part).__name__ for part in tables[attribute])
        raise ValueError(
            f"{where} is parametrized already, by {parts}; exclude it, or remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations)")
    proxy = getattr(module, f"{attribute}_quant", None)
    if isinstance(proxy, ParameterQuantProxyFromInjector) and proxy.is_quant_enabled:
        raise ValueError(
            f"{where} is quantized by Brevitas already; build the layer with {attribute}_quant=None, or "
            f"with a learned config of brevitas_bp.quant as its {attribute}_quant")
    if not x.is_floating_point() or x.numel() == 0:
        raise ValueError(
            f"{where} must be a float tensor with elements, got {x.dtype} {list(x.shape)}; exclude it")
    of_bias = x.dim() < 2 and granularity in get_args(Granularity)
    return scale_shape(
        where, "scalar" if of_bias else granularity, tuple(x.shape),
        bool(getattr(module, "transposed", False)))
