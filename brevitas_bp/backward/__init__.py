"""Saved-tensor hooks that apply codecs: mechanism, policy and shell."""

from brevitas_bp.backward.operations import register_op
from brevitas_bp.backward.policy import OpAware
from brevitas_bp.backward.saved import SavedTensor
from brevitas_bp.backward.seam import NoiseState
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

__all__ = ["NoiseState", "OpAware", "QuantBackwardWrapper", "SavedTensor", "register_op"]
