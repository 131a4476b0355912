"""Recognises what ``torch.utils.checkpoint`` saves, and where it drops what others would save.

NOTE [ Checkpointed parts ]
1. Around a checkpointed part, our hooks get its inputs. They come from no operation; that checkpointing
   saves them shows in who calls the hook.
2. Inside of a checkpointed part (``use_reentrant=False``), its own hooks drop what is saved and
   count whether the second run saves the same. Hooks of ours would take their place and switch
   recomputing off without a word: there a wrapper only runs its module.
3. Inside of a reentrant one the first run has no gradients, and the second is a forward like any other.
"""

import sys
from types import FrameType
from typing import Any

from torch.utils import checkpoint

from brevitas_bp.private import top_hooks

# A Function's ``apply`` stands between in the reentrant form.
_DISTANCE = 2


def is_checkpoint_input() -> bool:
    """Whether the pack hook that asks was called for an input of a checkpointed part."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DISTANCE):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            return True
        frame = frame.f_back
    return False


def inside_checkpoint() -> bool:
    """Whether what is saved now goes to ``torch.utils.checkpoint``, which drops or recounts it."""
    top: Any = top_hooks(True)
    return top is not None and getattr(top[0], "__module__", None) == checkpoint.__name__
