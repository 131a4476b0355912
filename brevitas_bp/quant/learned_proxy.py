"""The Brevitas proxies of learned weight and bias quantizers."""

from typing import Any

from brevitas.inject.enum import FloatToIntImplType
from brevitas.proxy import BiasQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from brevitas.quant_tensor.base_quant_tensor import _unpack_quant_tensor
from torch import nn

from brevitas_bp.core.learned import NestedFloor
from brevitas_bp.errors import UnknownNameError, nearest

# What Brevitas adds to an injector.
_ADDED_BY_BREVITAS = frozenset({"module", "proxy_module", "tracked_parameter_list"})
# Settings that Brevitas reads and that the scheme itself decides.
_FIXED: dict[str, Any] = {
    "signed": True, "narrow_range": False, "float_to_int_impl_type": FloatToIntImplType.FLOOR}


def _check_settings(injector: Any) -> None:
    """Raises for settings that would do nothing. Brevitas accepts any keyword."""
    config = next(c for c in injector.__mro__ if c.__module__ != "brevitas.inject")
    known = set(config.__dependencies__)
    settings = sorted(name for name in known - set(_FIXED) if not name.startswith("_"))
    for name in sorted(set(injector.__dependencies__) - known - _ADDED_BY_BREVITAS):
        hint = (
            ": its integers have no clamp, and take the bits that the scale leaves them"
            if name == "bit_width" else nearest(name, settings))
        raise UnknownNameError(
            f"brevitas_bp.quant: {config.__name__} has no setting {name!r}{hint}")
    for name, fixed in _FIXED.items():
        if getattr(injector, name) != fixed:
            raise ValueError(
                f"brevitas_bp.quant: {config.__name__} always rounds down to signed integers, so "
                f"{name} = {getattr(injector, name)!r} would do nothing; leave it out")


class PerInputIntQuantTensor(IntQuantTensor):
    """A weight with a scale for each group of inputs.

    A layer's outputs sum over inputs, so they have no scale. Brevitas' rules for layers would compute a
    wrong one. So every operation with this tensor returns a plain tensor.
    """

    @classmethod
    def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain: Any = _unpack_quant_tensor(kwargs or {})
        return func(*_unpack_quant_tensor(args), **plain)


class _KeepsItsQuantizer:
    """Keeps the learned scale when Brevitas would build a new one: ``load_state_dict``, sharing."""

    tensor_quant: Any

    def __init__(self, quant_layer: nn.Module, quant_injector: Any) -> None:
        _check_settings(quant_injector)
        super().__init__(quant_layer, quant_injector)  # pyright: ignore[reportCallIssue]

    @property
    def requires_export_handler(self) -> bool:
        """False: there is no export format, so the quantizer runs unchanged in export and inference."""
        return False

    def init_tensor_quant(self, preserve_state_dict: bool = False) -> None:
        """Builds the quantizer unless there is one whose scale fits.

        The optimizer would not hold the parameter of a new one, which would have lost its dtype too.
        """
        quantizer = _uncompiled(self.tensor_quant)
        tensors: Any = self.tracked_parameter_list  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(quantizer, NestedFloor) and tensors:
            config: Any = self.quant_injector  # pyright: ignore[reportAttributeAccessIssue]
            shape = tuple(config.let(tracked_parameter_list=tensors).scale_shape)
            if shape == tuple(quantizer.scaling_impl.value.shape):
                return
        super().init_tensor_quant(preserve_state_dict)  # pyright: ignore[reportAttributeAccessIssue]


def _uncompiled(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


class LearnedWeightQuantProxyFromInjector(_KeepsItsQuantizer, WeightQuantProxyFromInjector):
    """Holds a learned weight quantizer for Brevitas layers. Fills ``proxy_class``.

    Raises:
        UnknownNameError: the config does not know a keyword override.
        ValueError: an override would do nothing.
    """

    def create_quant_tensor(self, qt_args: Any) -> IntQuantTensor:
        value, scale, zero_point, bit_width = qt_args
        outputs: Any = self.tracked_module_list[0]
        per_output = scale.numel() == scale.shape[outputs.output_channel_dim] if scale.dim() else True
        kind = IntQuantTensor if per_output else PerInputIntQuantTensor
        return kind(value, scale, zero_point, bit_width, self.is_signed, self.training)


class LearnedBiasQuantProxyFromInjector(_KeepsItsQuantizer, BiasQuantProxyFromInjector):
    """Holds a learned bias quantizer for Brevitas layers. Fills ``proxy_class``.

    Raises:
        UnknownNameError: the config does not know a keyword override.
        ValueError: an override would do nothing.
    """
