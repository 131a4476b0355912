"""Weight and bias quantizers with learned scales: ``floor(P / s) * s``.

The classes are complete, and can be refined by a class body or by keywords::

    class Mine(LearnedFloorIntWeightPerRowFloat):
        lam = 1e-11

    QuantLinear(784, 10, weight_quant=Mine, bias_quant=LearnedFloorIntBias, weight_lam=1e-9)

Rows, columns and channels are those of :func:`brevitas_bp.core.learned.scale_shape`. Channels are
**input** channels. Brevitas' own "PerChannel" means output channels.

Source: Chinbat, "Learned Quantization Schemes for Data-centric ML Pipelines", 2025.
"""

from typing import Any

from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import FloatToIntImplType, QuantType
from brevitas.quant.solver.parameter import SolveDtypeDeviceFromTrackedParameterList

from brevitas_bp.core.learned import (
    LearnedFloorQuant,
    LearnedScale,
    SmallestBitWidth,
    scale_shape,
)
from brevitas_bp.core.nested_floor import LEAST_SCALE
from brevitas_bp.quant.learned_proxy import (
    LearnedBiasQuantProxyFromInjector,
    LearnedWeightQuantProxyFromInjector,
)

__all__ = [
    "LearnedFloorIntBias", "LearnedFloorIntWeightPerChannelFloat",
    "LearnedFloorIntWeightPerColumnFloat", "LearnedFloorIntWeightPerRowFloat",
    "LearnedFloorIntWeightPerTensorFloat"]


class SolveLearnedFloor(SolveDtypeDeviceFromTrackedParameterList):
    """Maps ``INT`` to the learned quantizer and ``FP`` to None, and a granularity to a shape."""

    @value
    def tensor_quant(quant_type: Any) -> Any:  # noqa: N805
        if quant_type == QuantType.FP:
            return None
        if quant_type == QuantType.INT:
            return LearnedFloorQuant
        raise ValueError(
            "brevitas_bp.quant: a learned quantizer has quant_type INT, or FP to switch it off, got "
            f"{quant_type}; use Brevitas' own binary or ternary quantizers")

    @value
    def scale_shape(
            granularity: Any,  # noqa: N805
            tracked_parameter_list: Any, module: Any) -> tuple[int, ...]:
        modules = module if isinstance(module, tuple) else (module,)
        shapes = [
            scale_shape("brevitas_bp.quant", granularity, tuple(x.shape), _is_transposed(m))
            for x, m in zip(tracked_parameter_list, modules)]
        if len(set(shapes)) != 1:
            raise ValueError(
                "brevitas_bp.quant: layers that share a quantizer must have scales of one shape, got "
                f"{' and '.join(str(list(shape)) for shape in shapes)} for granularity {granularity!r}; "
                "give each layer its own, or use granularity 'scalar'")
        return shapes[0]


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "transposed", False))


class LearnedFloor(SolveLearnedFloor, ExtendedInjector):
    """The settings that learned quantizers share.

    Settings: ``lam`` (None: only a penalty moves the scale), ``unanimity``, ``scale_init``,
    ``granularity``. See :class:`~brevitas_bp.core.learned.NestedFloor`.
    """

    quant_type = QuantType.INT
    scaling_impl = LearnedScale
    bit_width_impl = SmallestBitWidth
    float_to_int_impl_type = FloatToIntImplType.FLOOR
    signed = True
    narrow_range = False
    scale_init = LEAST_SCALE
    lam = 1e-10
    unanimity = True


class LearnedFloorIntWeightPerTensorFloat(LearnedFloor):
    """One learned scale for a weight."""

    granularity = "scalar"
    proxy_class = LearnedWeightQuantProxyFromInjector


class LearnedFloorIntWeightPerRowFloat(LearnedFloorIntWeightPerTensorFloat):
    """A learned scale for each input of a linear layer, or for each row of a Conv2d's kernel."""

    granularity = "row"


class LearnedFloorIntWeightPerColumnFloat(LearnedFloorIntWeightPerTensorFloat):
    """A learned scale for each output of a linear layer, or for each column of a Conv2d's kernel."""

    granularity = "column"


class LearnedFloorIntWeightPerChannelFloat(LearnedFloorIntWeightPerTensorFloat):
    """A learned scale for each input channel of a convolution. Not for linear layers."""

    granularity = "channel"


class LearnedFloorIntBias(LearnedFloor):
    """One learned scale for a bias."""

    granularity = "scalar"
    requires_input_scale = False
    proxy_class = LearnedBiasQuantProxyFromInjector
