"""Saved-tensor hooks that apply codecs: the forward pass, the policy and the wrapper."""

from brevitas_bp.backward.policy import OpAware
from brevitas_bp.backward.registry import register_op
from brevitas_bp.backward.saved import SavedTensor
from brevitas_bp.backward.seam import NoiseState
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

__all__ = ["NoiseState", "OpAware", "QuantBackwardWrapper", "SavedTensor", "register_op"]
