"""Rules for probabilities of classes: softmax, and the losses that follow it."""

import torch
from torch import Tensor

from brevitas_bp.backward.rows import last_dimension
from brevitas_bp.backward.saved import Call, Decision, SavedTensor
from brevitas_bp.codec.base import FLOATS, Codec
from brevitas_bp.codec.lossless import narrow_to
from brevitas_bp.codec.shape_only import shape_only

_LOSS = Decision(None, "a loss")
_NO_PROBABILITIES = Decision(None, "not linear in what is saved")


def classes_dim(scores: Tensor) -> int:
    """Returns the dimension of the classes: the second one, or the only one."""
    return min(scores.dim() - 1, 1)


def codec_of_targets(call: Call) -> Codec | None:
    """Returns a codec for the targets of a loss: class indices, or ``ignore_index``."""
    scores, ignored = call.argument(0, "input"), call.argument(4, "ignore_index", -100)
    if not isinstance(scores, Tensor) or scores.dim() == 0 or not isinstance(ignored, int):
        return None
    return narrow_to(max(scores.shape[classes_dim(scores)], ignored + 1, -ignored))


def softmax(saved: SavedTensor) -> Decision:
    """Decides for probabilities, which softmax saves when it has computed them.

    Backward is ``p * (g - sum(g * p))``. It multiplies a rounding by itself, with a bias of
    ``variance(p) / p`` relative to ``g * p``. The levels of probabilities keep this below 1 / top code.
    """
    if saved.position is not None or saved.tensor.dtype not in FLOATS:
        return _NO_PROBABILITIES
    return Decision(
        saved.codec, "probabilities: bias of order 1/300", reach="all", rows=last_dimension,
        probabilities=True)


def log_softmax(saved: SavedTensor) -> Decision:
    """Decides for log-probabilities, which are stored as probabilities: backward is linear in these."""
    if saved.position is not None or saved.tensor.dtype not in FLOATS:
        return _NO_PROBABILITIES
    return Decision(
        saved.codec, "probabilities: backward is linear in them", reach="all", rows=last_dimension,
        units="logarithm", probabilities=True)


def cross_entropy(saved: SavedTensor) -> Decision:
    """Decides for a cross entropy of logits, which saves log-probabilities and targets."""
    call, x = saved.call, saved.tensor
    logits, targets = call.argument(0, "input"), call.argument(1, "target")
    if not (isinstance(logits, Tensor) and isinstance(targets, Tensor)):
        return _LOSS
    if x.dtype == torch.int64:
        return Decision(codec_of_targets(call), "targets")
    if saved.position is not None or x.shape != logits.shape or x.dtype not in FLOATS:
        return _LOSS
    if targets.is_floating_point():
        # With a gradient, backward reads the log-probabilities themselves.
        return _LOSS if targets.requires_grad else log_softmax(saved)
    return Decision(
        saved.codec, "error of each class: backward is linear in it", reach="all", rows=last_dimension,
        units="class error", probabilities=True)


def nll_loss(saved: SavedTensor) -> Decision:
    """Decides for a loss that picks log-probabilities: backward reads only their shape."""
    if saved.tensor.dtype == torch.int64:
        return Decision(codec_of_targets(saved.call), "targets")
    if saved.position == 0 and saved.tensor.is_floating_point():
        return Decision(shape_only(), "only its shape is read")
    return _LOSS
