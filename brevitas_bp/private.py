"""The names of torch that are private and that this library is built on, all in one place.

A release that lacks one is refused with a sentence that names it. ``tests/backward/test_private.py`` has
a probe for each, which says whether it still does what is expected of it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

TRIED = "2.10 to 2.14"


def private(path: str) -> Any:
    """What a dotted path leads to.

    Raises:
        ImportError: this torch does not have it.
    """
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        try:
            for name in parts[split:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise ImportError(
        f"brevitas_bp: torch {torch.__version__} has no {path}, on which the library is built; it was "
        f"tried with torch {TRIED}")


#: The hooks of this thread for saved tensors: the innermost pair; sets a pair; takes it away.
top_hooks: Callable[..., Any] = private("torch._C._autograd._top_saved_tensors_default_hooks")
push_hooks: Callable[..., None] = private("torch._C._autograd._push_saved_tensors_default_hooks")
pop_hooks: Callable[[], Any] = private("torch._C._autograd._pop_saved_tensors_default_hooks")

#: Whether a tensor stands for another one in a transform of ``torch.func``, or in the vmap of before.
is_functorch_wrapped: Callable[[Any], bool] = private("torch._C._functorch.is_functorch_wrapped_tensor")
is_legacy_batched: Callable[[Any], bool] = private("torch._C._functorch.is_legacy_batchedtensor")

#: Within it, ``__torch_function__`` of subclasses is not asked.
DisableTorchFunctionSubclass: Any = private("torch._C.DisableTorchFunctionSubclass")

#: The function modes of this thread, innermost last; takes the innermost away.
function_modes: Callable[[], list[Any]] = private("torch.overrides._get_current_function_mode_stack")
pop_function_mode: Callable[[], Any] = private("torch.overrides._pop_mode")

_forward_ad: Any = private("torch.autograd.forward_ad")
private("torch.autograd.forward_ad._current_level")

#: Sets what Dynamo does with the frames of this thread (None: nothing), and returns what it did.
set_callback: Callable[[Any], Any] = private("torch._C._dynamo.eval_frame.set_eval_frame")
#: Runs a function in a frame of its own that Dynamo does not skip.
wrap_inline: Callable[..., Any] = private("torch._dynamo.external_utils.wrap_inline")
_graphs_of: Callable[[Any], list[Any]] = private("torch._dynamo.eval_frame._debug_get_cache_entry_list")
_dynamo_config: Any = private("torch._dynamo.config")
#: Settings of AOTAutograd; the names of the graph that it makes; what Dynamo knows while it traces.
functorch_config: Any = private("torch._functorch.config")
aot_compilation_context: Callable[[], Any] = private(
    "torch._functorch._aot_autograd.logging_utils.get_aot_compilation_context")
TracingContext: Any = private("torch._guards.TracingContext")
#: A mode that sees every operator.
TorchDispatchMode: Any = private("torch.utils._python_dispatch.TorchDispatchMode")
#: The leaves of nested containers.
tree_leaves: Callable[[Any], list[Any]] = private("torch.utils._pytree.tree_leaves")


def in_forward_ad() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return _forward_ad._current_level >= 0


def skip_frames(code: Any) -> None:
    """Tells Dynamo to make no graph that begins at a function."""
    # Releases have had it and not.
    skip = getattr(private("torch._dynamo.eval_frame"), "skip_code", None)
    if skip is not None:
        skip(code)


def graphs_of(code: Any) -> int:
    """How many graphs Dynamo holds that begin at a function."""
    return len(_graphs_of(code))


def recompile_limit() -> int:
    """How many graphs of one function Dynamo makes."""
    return _dynamo_config.recompile_limit


def saved_tensor_hook_context() -> dict[str, Any] | None:
    """The graphs that AOTAutograd is making, and the tensor they save; None outside of that."""
    return private("torch._functorch._aot_autograd.graph_compile._get_saved_tensor_hook_context")()


def inlining_code() -> Any:
    """The code of the function that inlines hooks; its variables say which inputs are parameters."""
    return private(
        "torch._functorch._aot_autograd.graph_compile.maybe_inline_graph_saved_tensors_hooks").__code__
