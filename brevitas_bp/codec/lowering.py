"""Lowers a bucket quantizer made of known parts to the spec of one fused kernel.

NOTE [ What a part says of itself ]
1. ``bucket_stage(slot)`` of a part returns one of three answers for this slot of a quantizer:
   * a row of :mod:`brevitas_bp.format.stages`, if the part computes exactly that row,
   * ``NEUTRAL``, if the part does nothing that a kernel would have to know,
   * None, if no row says what the part does.
2. The answer holds only for the class that defines ``bucket_stage``. A subclass may compute something
   else, so it has to define ``bucket_stage`` again.
3. :data:`_FOREIGN` answers for parts of Brevitas and torch.
4. All parts are asked, at any depth. If one has no answer, the quantizer runs through its modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity, RoundSte
from brevitas.core.function_wrapper.misc import Abs
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import IntScaling
from brevitas.core.zero_point import ZeroZeroPoint
from torch import nn

from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.levels import BucketLevelQuant
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    NARROW,
    NEAREST,
    NEUTRAL,
    NO_TRANSFORM,
    UNSIGNED,
    CodeRange,
    Neutral,
    Rounding,
    ScaleRule,
    Stage,
    Transform,
)


def _int_scaling(part: Any) -> CodeRange | None:
    if part.signed:
        return NARROW if part.narrow_range else None
    return None if part.narrow_range else UNSIGNED


#: Class of a part -> the slot that it may fill, and its stage there. This covers the part's own parts.
_FOREIGN: dict[type, tuple[str, Callable[[Any], Stage | Neutral | None]]] = {
    RoundSte: ("float_to_int_impl", lambda part: NEAREST),
    IntScaling: ("int_scaling_impl", _int_scaling),
    ZeroZeroPoint: ("zero_point_impl", lambda part: NEUTRAL),
    BitWidthConst: ("msb_clamp_bit_width_impl", lambda part: NEUTRAL),
    FloatRestrictValue: ("restrict_scaling_impl", lambda part: NEUTRAL),
    # FloatRestrictValue applies Abs to a scale, which is never negative.
    Abs: ("restrict_scaling_pre", lambda part: NEUTRAL),
    Identity: ("restrict_scaling_pre", lambda part: NEUTRAL)}


def lower(quantizer: Any) -> BucketQuantSpec | None:
    """Returns the spec of ``quantizer``, or None if no fused kernel computes what its parts do.

    See NOTE [ What a part says of itself ]. Under BREVITAS_JIT=1, stock parts are scripted copies, which
    are instances of no known class.
    """
    if type(quantizer) not in (BucketRescalingIntQuant, BucketLevelQuant):
        return None
    stages: dict[type[Stage], Stage] = {Transform: NO_TRANSFORM}
    if type(quantizer) is BucketLevelQuant:
        stages[Rounding] = NEAREST
    if not _collect(quantizer, stages) or not _is_consistent(quantizer, stages):
        return None
    selector = quantizer.msb_clamp_bit_width_impl
    mixing = {} if not isinstance(selector, TwoBitWidthSelector) else {
        "mix_bit_width": selector.bit_widths[1], "mix_prob": selector.probability,
        "mix_per": selector.mix_per}
    rows: dict[Any, Any] = stages
    view: Any = quantizer.input_view_impl
    return BucketQuantSpec(
        bit_width=quantizer.bit_widths[0],
        bucket_size=view.bucket_size,
        scale_rule=rows[ScaleRule], code_range=rows[CodeRange], rounding=rows[Rounding],
        transform=rows[Transform],
        integer_zero_point=_rounds_zero_point(quantizer) and not rows[ScaleRule].zero_in_range,
        metadata_dtype=quantizer.metadata_dtype,
        **mixing)


def _rounds_zero_point(quantizer: Any) -> bool:
    return bool(getattr(getattr(quantizer, "zero_point_impl", None), "quantize_zero_point", False))


def _collect(part: nn.Module, stages: dict[type[Stage], Stage]) -> bool:
    """Adds the stages of a part's children to ``stages``; False if one is unknown or two disagree."""
    for slot, child in part.named_children():
        stage = _stage_of(child, slot)
        if stage is None:
            return False
        if isinstance(stage, Stage):
            before = stages.get(type(stage))
            if before is not None and before is not stage and before is not NO_TRANSFORM:
                return False
            stages[type(stage)] = stage
        if type(child) not in _FOREIGN and not _collect(child, stages):
            return False
    return True


def _stage_of(part: nn.Module, slot: str) -> Stage | Neutral | None:
    stage = own_stage(part, slot)
    if stage is not None:
        return stage
    expected, stage = _FOREIGN.get(type(part), (None, None))
    return None if stage is None or slot != expected else stage(part)


def own_stage(part: nn.Module, slot: str) -> Stage | Neutral | None:
    """Returns the answer of the class of a part, not of a base class; None if there is none."""
    answer: Any = vars(type(part)).get("bucket_stage")
    found: Any = answer(part, slot) if callable(answer) else None
    return found


def _is_consistent(quantizer: Any, stages: dict[type[Stage], Any]) -> bool:
    """Whether all stages are there, and whether stages and settings of the parts agree."""
    if not {ScaleRule, CodeRange, Rounding} <= stages.keys():
        return False
    rule, codes, transform = stages[ScaleRule], stages[CodeRange], stages[Transform]
    by_levels = type(quantizer) is BucketLevelQuant
    if by_levels != (codes.nearest is not None) or by_levels != (rule.refit is not None):
        return False
    if not by_levels:
        has_offset = hasattr(quantizer.zero_point_impl, "offset")
        if rule.signed != codes.signed or codes.signed != quantizer.int_quant.signed or (
                rule.affine != has_offset):
            return False
    views = {
        (part.bucket_size, part.bucket_pad_zero) for part in quantizer.modules()
        if hasattr(part, "bucket_pad_zero")}
    dtypes: set[torch.dtype] = {
        part.metadata_dtype for part in quantizer.modules() if hasattr(part, "metadata_dtype")}
    pads_with_zero = rule.pads_with_zero or transform.pads_with_zero
    return len(dtypes) == 1 and len(views) == 1 and next(iter(views))[1] == pads_with_zero
