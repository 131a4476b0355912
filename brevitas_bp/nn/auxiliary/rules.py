"""How ``QuantBackwardWrapper`` stores what auxiliary layers save.

NOTE [ Auxiliary layers inside of a wrapper ]
1. An exact auxiliary residual activation is rounded like the input of a layer: the gradient of the
   weight is linear in it, and nothing else is. All layers of a run share one rounding. They may: the
   gradient that a layer multiplies it by does not depend on it, because gradients of inputs are exact.
2. Codes of a codec and sign bits are bytes, which no policy rounds. They are kept and reported.
3. A weight that is computed (parametrizations) is no parameter, and is kept.
"""

from brevitas_bp.backward.registry import OpRule, register_op
from brevitas_bp.backward.rows import RowsOf, last_dimension
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.nn.auxiliary.residual import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    rows_of_images,
)
from brevitas_bp.nn.auxiliary.sign import AuxiliarySignConv2d, AuxiliarySignLinear

_WEIGHT = Decision(None, "weight: keeps the gradient of the input exact")
_OTHER = Decision(None, "not a floating-point tensor")


def _residual(rows: RowsOf) -> OpRule:
    def decide(saved: SavedTensor) -> Decision:
        if saved.tensor.dtype not in FLOATS:
            return _OTHER
        if saved.tensor.requires_grad:
            # The auxiliary activation is detached.
            return _WEIGHT
        return Decision(
            saved.codec, "auxiliary activation: the gradient of the weight is linear in it", rows=rows)

    return OpRule(decide)


def register() -> None:
    """Tells the op-aware policy about the layers."""
    register_op(AuxiliaryResidualConv2d, _residual(rows_of_images))
    register_op(AuxiliaryResidualLinear, _residual(last_dimension))
    for kind in (AuxiliarySignConv2d, AuxiliarySignLinear):
        register_op(kind, OpRule(lambda saved: _WEIGHT))
