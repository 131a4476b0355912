"""Brevitas quantizers for the tensors that autograd saves for backward.

Compose a quantizer from injector classes (:mod:`brevitas_bp.quant`) and hand it to
:class:`QuantBackwardWrapper`. Every tensor that autograd saves is then really stored in a few bits.
The forward pass stays bit-identical.
"""

from brevitas_bp import probes as _probes  # noqa: F401 - imported first: it refuses an old torch
from brevitas_bp.allocate import check_gradients, plan_bit_widths
from brevitas_bp.backward import OpAware, QuantBackwardWrapper, SavedTensor, register_op
from brevitas_bp.codec import Codec, Packed, codec_from
from brevitas_bp.core.bit_width import MixProbScheduler
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.errors import (
    BrevitasBpError,
    CorruptPayloadError,
    ModifiedInPlaceError,
    SecondDerivativeError,
    UnknownNameError,
    UnsupportedQuantizerError,
)
from brevitas_bp.format.random import seeded
from brevitas_bp.memory import SavedMemoryReport, track_saved_memory

__version__ = "0.1.0"

__all__ = [
    "BrevitasBpError", "Codec", "CorruptPayloadError", "MixProbScheduler", "ModifiedInPlaceError",
    "OpAware", "Packed", "QuantBackwardWrapper", "SavedMemoryReport", "SavedTensor",
    "SecondDerivativeError", "StochasticRound", "UnknownNameError", "UnsupportedQuantizerError",
    "__version__", "check_gradients", "codec_from", "plan_bit_widths", "register_op", "seeded",
    "track_saved_memory"]
