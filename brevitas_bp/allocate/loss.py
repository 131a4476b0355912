"""Checks that a user's function returns a loss whose gradient can be compared."""

from typing import Any

from torch import Tensor


def checked_loss(where: str, loss: Any) -> Tensor:
    """Returns ``loss``, a tensor of one element whose graph leads gradients to every parameter.

    Raises:
        ValueError: it is no such tensor, or parts are checkpointed with ``use_reentrant=True``.
    """
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{where} must return a scalar tensor that requires a gradient and depends on the "
            f"parameters, got {got}; return for instance cross_entropy(model(batch[0]), batch[1]), and "
            "leave backward to this function")
    if _has_reentrant_parts(loss):
        raise ValueError(
            f"{where}: parts that are checkpointed with use_reentrant=True hide their gradients; use "
            "use_reentrant=False")
    return loss


def _has_reentrant_parts(loss: Tensor) -> bool:
    """Whether the graph of a loss has a part that calls backward on its own graph."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        left += [parent for parent, _ in node.next_functions]
    return False
