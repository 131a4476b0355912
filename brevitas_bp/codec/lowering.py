"""A bucket quantizer made of known parts -> the spec of one fused kernel."""

from typing import Any

from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import IntScaling
from brevitas.core.zero_point import ZeroZeroPoint

from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import (
    BucketIntQuant,
    BucketRescalingIntQuant,
    SignMagnitudeIntScaling,
)
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.core.scaling import RuntimeDynamicBucketScaling
from brevitas_bp.core.stats import BucketAbsMax, BucketL2Norm, BucketMin, BucketMinMaxRange
from brevitas_bp.core.zero_point import RuntimeDynamicBucketZeroPoint
from brevitas_bp.format.spec import BucketQuantSpec, CodeRange, ScaleRule

_SYMMETRIC_RULES: dict[type, ScaleRule] = {BucketAbsMax: "max", BucketL2Norm: "l2"}


def lower(quantizer: Any) -> BucketQuantSpec | None:
    """The spec of ``quantizer``, or None where a part is not ours and the modules must run.

    Types are compared exactly: a subclass may compute something else, and under BREVITAS_JIT=1 stock
    parts are scripted copies.
    """
    if type(quantizer) is not BucketRescalingIntQuant:
        return None
    int_quant, view = quantizer.int_quant, quantizer.input_view_impl
    if type(int_quant) is not BucketIntQuant or type(view) is not OverBucketView:
        return None
    rule, code_range = _scale_rule(quantizer), _code_range(quantizer)
    stochastic = is_stochastic(int_quant.float_to_int_impl)
    if rule is None or code_range is None or stochastic is None:
        return None
    if view.bucket_pad_zero != (rule == "l2") or (code_range == "unsigned") != (rule == "min_max"):
        return None
    selector = quantizer.msb_clamp_bit_width_impl
    mixing = {}
    if type(selector) not in (BitWidthConst, TwoBitWidthSelector):
        return None
    if isinstance(selector, TwoBitWidthSelector):
        mixing = {
            "mix_bit_width": selector.bit_widths[1], "mix_prob": selector.probability,
            "mix_per": selector.mix_per}
    return BucketQuantSpec(
        bit_width=quantizer.bit_widths[0],
        bucket_size=view.bucket_size,
        scale_rule=rule,
        code_range=code_range,
        stochastic=stochastic,
        integer_zero_point=bool(getattr(quantizer.zero_point_impl, "quantize_zero_point", False)),
        metadata_dtype=quantizer.metadata_dtype,
        **mixing)


def _scale_rule(quantizer: BucketRescalingIntQuant) -> ScaleRule | None:
    scaling: Any = quantizer.scaling_impl
    zero_point: Any = quantizer.zero_point_impl
    if type(scaling) is not RuntimeDynamicBucketScaling or (
            type(scaling.restrict_scaling_impl) is not FloatRestrictValue):
        return None
    stats: Any = scaling.scaling_stats_impl
    if type(scaling.input_view_impl) is not OverBucketView:
        return None
    if type(zero_point) is ZeroZeroPoint:
        return _SYMMETRIC_RULES.get(type(stats))
    affine = type(zero_point) is RuntimeDynamicBucketZeroPoint and type(
        stats) is BucketMinMaxRange and type(zero_point.zero_point_stats_impl) is BucketMin
    if not affine:
        return None
    dtypes = {
        quantizer.metadata_dtype, stats.minimum.metadata_dtype,
        zero_point.zero_point_stats_impl.metadata_dtype}
    return "min_max" if len(dtypes) == 1 else None


def _code_range(quantizer: BucketRescalingIntQuant) -> CodeRange | None:
    scaling = quantizer.int_scaling_impl
    if type(quantizer.int_quant.int_scaling_impl) is not type(scaling):
        return None
    if type(scaling) is SignMagnitudeIntScaling:
        return "sign_magnitude" if quantizer.int_quant.signed else None
    if type(scaling) is not IntScaling or scaling.signed != quantizer.int_quant.signed:
        return None
    if scaling.signed:
        return "narrow" if scaling.narrow_range else None
    return "unsigned" if not scaling.narrow_range else None


def is_stochastic(rounding: Any) -> bool | None:
    """Whether a known rounding is stochastic; None for one that is not known."""
    if type(rounding) is StochasticRound and not rounding.deterministic_inference:
        return True
    return False if type(rounding) is RoundSte else None
