"""Maps enum values to components, if Brevitas' own solver would choose another component."""

from typing import Any

from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import FloatToIntImplType, QuantType
from brevitas.quant.solver.common import solve_float_to_int_impl_from_enum
from dependencies.exceptions import DependencyError

from brevitas_bp.core.average import AverageQuant, check_average_size
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.core.running import RunningStatistic
from brevitas_bp.core.scaling import RuntimeDynamicBucketScaling
from brevitas_bp.core.zero_point import RuntimeDynamicBucketZeroPoint

# Stand-in for ``bucket_size`` of stock quantizers, which have no such setting.
_NO_BUCKETS = "no such setting"


class _ConfigType(type(ExtendedInjector)):
    """Lets Python's own tools inspect configs: reading a missing name is an ``AttributeError``."""

    def __getattr__(cls, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except DependencyError as error:
            if name in cls.__dependencies__:
                raise
            raise _MissingError(str(error)) from None


class _MissingError(DependencyError, AttributeError):
    """A config does not have this setting."""


class SolveFloatToIntImpl(ExtendedInjector, metaclass=_ConfigType):
    """Maps ``STOCHASTIC_ROUND`` to :class:`~brevitas_bp.core.rounding.StochasticRound`.

    Brevitas' own component draws the same numbers in every layer, on every checkpoint recompute and in
    every process.
    """

    @value
    def float_to_int_impl(float_to_int_impl_type: Any) -> Any:  # noqa: N805
        if float_to_int_impl_type == FloatToIntImplType.STOCHASTIC_ROUND:
            return StochasticRound
        try:
            return solve_float_to_int_impl_from_enum(float_to_int_impl_type)
        except NotImplementedError as error:
            kinds = ", ".join(repr(str(kind.value).lower()) for kind in FloatToIntImplType)
            raise ValueError(
                f"brevitas_bp.quant: float_to_int_impl_type must be one of {kinds}, got "
                f"{float_to_int_impl_type!r}") from error


class SolveBucketTensorQuant(ExtendedInjector):
    """Maps ``INT`` to :class:`~brevitas_bp.core.int_quant.BucketRescalingIntQuant`, ``FP`` to None.

    An ``average_size`` above 1 wraps it in an :class:`~brevitas_bp.core.average.AverageQuant`.
    """

    bucket_quant = BucketRescalingIntQuant

    @value
    def tensor_quant(quant_type: Any, average_size: Any = 1) -> Any:  # noqa: N805
        # Optional, so that the fragment that sets it may be left or right of the others.
        return _solve_tensor_quant(quant_type, average_size, BucketRescalingIntQuant)


class SolveLevelTensorQuant(ExtendedInjector):
    """Maps ``INT`` to :class:`~brevitas_bp.core.levels.BucketLevelQuant`, ``FP`` to None."""

    bucket_quant = BucketLevelQuant

    @value
    def tensor_quant(quant_type: Any, average_size: Any = 1) -> Any:  # noqa: N805
        return _solve_tensor_quant(quant_type, average_size, BucketLevelQuant)


def _solve_tensor_quant(quant_type: Any, average_size: Any, bucket_quant: type) -> type | None:
    if quant_type == QuantType.FP:
        return None
    if quant_type == QuantType.INT:
        size = check_average_size("brevitas_bp.quant", average_size)
        return bucket_quant if size == 1 else AverageQuant
    raise ValueError(
        f"brevitas_bp.quant: a bucket quantizer has quant_type INT, or FP to switch it off, got "
        f"{quant_type}; use Brevitas' own binary or ternary quantizers")


class SolveRunningRange(ExtendedInjector):
    """Replaces the statistics of a per-tensor config by their moving averages."""

    @value
    def scaling_impl(
            scaling_stats_impl: Any,  # noqa: N805
            input_view_impl: Any, restrict_scaling_impl: Any,
            range_momentum: float, bucket_size: Any = _NO_BUCKETS) -> Any:
        if bucket_size is not None:
            raise ValueError(
                "brevitas_bp.quant.RunningRange: a running range belongs to a tensor, so it needs one "
                f"bucket per tensor, got bucket_size={bucket_size!r}; use bucket_size=None or a "
                "DynamicActPerTensor config (Brevitas' own quantizers keep their own statistics)")
        return RuntimeDynamicBucketScaling(
            RunningStatistic(scaling_stats_impl, range_momentum), input_view_impl,
            restrict_scaling_impl)

    @value
    def zero_point_impl(
            signed: Any,  # noqa: N805
            input_view_impl: Any, range_momentum: float,
            zero_point_stats_impl: Any = None, quantize_zero_point: bool = False) -> Any:
        if signed:
            return ZeroZeroPoint
        return RuntimeDynamicBucketZeroPoint(
            RunningStatistic(zero_point_stats_impl, range_momentum), input_view_impl,
            quantize_zero_point)
