"""Whether a tensor was computed from another one that is stored rounded.

NOTE [ No two roundings of one tensor are multiplied ]
1. ``f(x, w)`` that saves ``x`` gives ``w`` the gradient ``g x``. Where ``w`` was computed from ``x``, it
   goes on through operations that saved ``x`` as well, and is multiplied by it again. With one rounding
   for both the mean of the product is wrong: it is that of a square.
2. So the operation has a rounding of its own where the gradient of another argument goes through an
   operation that saved ``x`` rounded. Roundings of other tensors are independent of it.
3. The last node of an operation that saved something rounded is marked with the storages of that. The
   marks are in the node's own metadata: its Python object comes and goes.
"""

from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from brevitas_bp.backward.saved import tensors_in

_MARK = "brevitas_bp: storages of what is saved rounded"
# Nodes looked at, before a tensor counts as computed from any other.
_MOST = 4096


def note_rounded(output: Any, storages: set[int]) -> None:
    """Marks what an operation returns that has saved tensors of these storages rounded."""
    for tensor in tensors_in(output if isinstance(output, (tuple, list)) else (output,)):
        # Of a view, an operation in place makes a new node: the one of its base stays.
        for made in (tensor, tensor._base):
            node: Any = None if made is None else made.grad_fn
            if node is not None:
                node.metadata[_MARK] = storages


def goes_through_rounding_of(storage: int, x: Tensor, custom: bool = False) -> bool:
    """Whether a gradient of ``x`` goes through an operation that saved a tensor rounded.

    Args:
        storage: of that tensor.
        x: an argument of an operation.
        custom: whether a custom autograd Function has saved it. Nobody sees them end, so they bear no
            mark.
    """
    node: Any = x.grad_fn
    if node is None:
        return False
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if storage in node.metadata.get(_MARK, ()) or (custom and isinstance(node, BackwardCFunction)):
            return True
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
        if len(seen) > _MOST:
            return True
    return False
