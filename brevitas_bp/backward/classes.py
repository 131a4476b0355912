"""Rules for probabilities of classes: softmax, and the losses that follow it."""

import torch
from torch import Tensor

from brevitas_bp.backward.rows import last_dimension
from brevitas_bp.backward.saved import Call, Decision, SavedTensor, is_ordinary, storage_id
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
    ``variance(p) / p`` relative to ``g * p``. The levels of probabilities keep this below 1 / 300.
    """
    x = saved.tensor
    if saved.position is not None or x.dtype not in FLOATS or x.dim() == 0:
        return _NO_PROBABILITIES
    return Decision(
        saved.codec, "probabilities: bias of order 1/300", reach="all", rows=last_dimension,
        units="sum of one", probabilities=True)


def softmax_dim(call: Call, x: Tensor) -> int:
    """Returns the dimension of a softmax; without one, torch takes the one that it always took."""
    dim = call.argument(1, "dim")
    return dim if isinstance(dim, int) else 0 if x.dim() in (0, 1, 3) else 1


def log_softmax(saved: SavedTensor) -> Decision:
    """Decides for log-probabilities, which are stored as probabilities: backward is linear in these."""
    if saved.position is not None or saved.tensor.dtype not in FLOATS:
        return _NO_PROBABILITIES
    return Decision(
        saved.codec, "probabilities: backward is linear in them", reach="all", rows=last_dimension,
        units="logarithm", probabilities=True)


def cross_entropy(saved: SavedTensor) -> Decision:
    """Decides for a cross entropy of logits, which saves log-probabilities and targets.

    The log-probabilities are the first tensor of numbers that the call saves, if the logits need a
    gradient. ``nll_loss``, inside, saves them again, perhaps in another shape, and reads only the shape.
    Other tensors of their shape are targets or products with weights.
    """
    call, x = saved.call, saved.tensor
    logits, targets = call.argument(0, "input"), call.argument(1, "target")
    weight = call.argument(2, "weight")
    if not (isinstance(logits, Tensor) and isinstance(targets, Tensor) and logits.requires_grad
            and is_ordinary(logits) and is_ordinary(targets)) or (
            isinstance(weight, Tensor) and weight.requires_grad):
        # With a gradient of weights or targets, backward reads the log-probabilities themselves.
        return _LOSS
    if x.dtype == torch.int64:
        return Decision(codec_of_targets(call), "targets")
    if targets.requires_grad or saved.position is not None or x.dtype not in FLOATS:
        return _LOSS
    if call.scores is None:
        call.scores = storage_id(x)
    if call.scores != storage_id(x):
        return _LOSS
    if x.shape != logits.shape:
        return Decision(shape_only(), "only its shape is read")
    if targets.is_floating_point():
        return log_softmax(saved)
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
