"""The rule of recurrent layers, which run as one function and save tensors of many kinds.

NOTE [ What recurrent layers save ]
Found by moving each saved tensor of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` (torch 2.13, CPU):

1. The input of a layer, all steps at once: only the gradient of the weight depends on it, and is linear
   in it. So does the weight of the recurrence on the output that oneDNN's LSTM saves. These are rounded.
2. Gates and states of single steps: gradients of all earlier steps depend on them, and most are not
   linear in them. A gate's output enters backward as ``y (1 - y)`` and as a factor, so no number in its
   place serves both. oneDNN keeps them in bytes of its own. These are exact.
3. Dropout between layers saves a mask of 0 and ``1 / (1 - p)``: 1 bit.
4. Other devices have kernels of their own, of which nothing is known here: all is exact.
"""

from torch import Tensor

from brevitas_bp.backward.operations import stands_alone
from brevitas_bp.backward.rows import last_dimension
from brevitas_bp.backward.saved import Decision, SavedTensor, tensors_in
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.two_valued import two_valued

_EXACT = Decision(None, "a recurrent layer: gates and states")
_MASK = Decision(two_valued(), "dropout mask of a recurrent layer")


def recurrent(saved: SavedTensor) -> Decision:
    """Decides for a tensor that a recurrent layer saves."""
    x, given = saved.tensor, saved.call.argument(0, "input")
    if x.dtype not in FLOATS or x.device.type != "cpu" or not isinstance(given, Tensor):
        return _EXACT
    if not (saved.aliases(given) or _is_sequence(saved, given)):
        return _EXACT
    if _may_drop(saved) and not saved.aliases(given) and two_valued().encode(x).is_smaller:
        return _MASK
    alone = stands_alone(saved)
    return Decision(
        saved.codec, "input of a recurrent layer, or its output: the weight's gradient is linear in it",
        shared=alone, reach="weight" if alone else "all", rows=last_dimension)


def _is_sequence(saved: SavedTensor, given: Tensor) -> bool:
    """Whether a tensor has one row for each step of each sequence, and there are several steps."""
    x, batch = saved.tensor, _batch(saved)
    rows = given.shape[:-1].numel()
    return x.dim() in (2, 3) and x.shape[:-1].numel() == rows and batch is not None and rows > batch


def _batch(saved: SavedTensor) -> int | None:
    """Returns the number of sequences, from the first state [layers, batch, features]."""
    states = [t for t in tensors_in(saved.arguments[1:]) if t.is_floating_point() and t.dim() == 3]
    return states[0].shape[1] if states else None


def _may_drop(saved: SavedTensor) -> bool:
    """Whether the call has a probability of dropout: its only float argument."""
    return any(isinstance(a, float) and a > 0 for a in saved.arguments)
