"""Saved-tensor hooks that apply codecs: mechanism, policy and shell."""

from brevitas_bp.backward.policy import SavedTensor
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

__all__ = ["QuantBackwardWrapper", "SavedTensor"]
