"""Recognises inputs that ``torch.utils.checkpoint`` saves, and code whose saved tensors it drops.

NOTE [ Checkpointed parts ]
1. Around a checkpointed part, our hooks get the inputs of that part. No operation saves these inputs:
   checkpointing does. We recognise them by the caller of the hook.
2. Inside a checkpointed part (``use_reentrant=False``), checkpointing sets hooks of its own. They drop
   the saved tensors, and count whether the second run saves the same tensors. Our hooks would replace
   them and silently switch recomputing off. So a wrapper inside such a part only runs its module.
3. Inside a reentrant checkpointed part, the first run has no gradients. The second run is a forward
   pass like any other.
"""

import sys
from types import FrameType
from typing import Any

from torch.utils import checkpoint

from brevitas_bp.private import top_hooks

# Number of frames to search: in the reentrant form, a Function's ``apply`` lies between.
_DISTANCE = 2


def is_checkpoint_input() -> bool:
    """Whether the calling pack hook was called for an input of a checkpointed part."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DISTANCE):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            return True
        frame = frame.f_back
    return False


def inside_checkpoint() -> bool:
    """Whether tensors saved now go to ``torch.utils.checkpoint``, which drops or recounts them."""
    top: Any = top_hooks(True)
    return top is not None and getattr(top[0], "__module__", None) == checkpoint.__name__
