"""All private names of torch that the library needs, in one place.

If the installed torch lacks one, importing the library fails with a message that names it.
``tests/backward/test_private.py`` has a probe for each name, which checks that the name still behaves
as the library expects.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

TRIED = "2.10 to 2.14"


def private(path: str) -> Any:
    """Returns the object at a dotted path.

    Raises:
        ImportError: the installed torch does not have it.
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
        f"brevitas_bp: torch {torch.__version__} has no {path}, which the library needs; it was tried "
        f"with torch {TRIED}")


#: The saved-tensor hooks of this thread: reads the innermost pair; pushes a pair; pops it.
top_hooks: Callable[..., Any] = private("torch._C._autograd._top_saved_tensors_default_hooks")
push_hooks: Callable[..., None] = private("torch._C._autograd._push_saved_tensors_default_hooks")
pop_hooks: Callable[[], Any] = private("torch._C._autograd._pop_saved_tensors_default_hooks")

#: Whether a tensor wraps another one in a transform of ``torch.func``, or in the older vmap.
is_functorch_wrapped: Callable[[Any], bool] = private("torch._C._functorch.is_functorch_wrapped_tensor")
is_legacy_batched: Callable[[Any], bool] = private("torch._C._functorch.is_legacy_batchedtensor")

_interpreters: Callable[[], Any] = private("torch._C._functorch.get_interpreter_stack")

#: A context in which torch does not call ``__torch_function__`` of tensor subclasses.
DisableTorchFunctionSubclass: Any = private("torch._C.DisableTorchFunctionSubclass")

#: The function modes of this thread, innermost last; pops the innermost.
function_modes: Callable[[], list[Any]] = private("torch.overrides._get_current_function_mode_stack")
pop_function_mode: Callable[[], Any] = private("torch.overrides._pop_mode")

#: Number of the backward pass that runs in this thread, or -1.
running_backward: Callable[[], int] = private("torch._C._current_graph_task_id")

private("torch.autograd.graph.Node._sequence_nr")

_forward_ad: Any = private("torch.autograd.forward_ad")
private("torch.autograd.forward_ad._current_level")

#: Sets Dynamo's callback for the frames of this thread (None: ignore them). Returns the previous one.
set_callback: Callable[[Any], Any] = private("torch._C._dynamo.eval_frame.set_eval_frame")
#: Runs a function in its own frame, which Dynamo does not skip.
wrap_inline: Callable[..., Any] = private("torch._dynamo.external_utils.wrap_inline")
_graphs_of: Callable[[Any], list[Any]] = private("torch._dynamo.eval_frame._debug_get_cache_entry_list")
_dynamo_config: Any = private("torch._dynamo.config")
#: Settings of AOTAutograd; the names of the graph that it makes; Dynamo's context while it traces.
functorch_config: Any = private("torch._functorch.config")
aot_compilation_context: Callable[[], Any] = private(
    "torch._functorch._aot_autograd.logging_utils.get_aot_compilation_context")
TracingContext: Any = private("torch._guards.TracingContext")
#: Base class of modes that see every operator.
TorchDispatchMode: Any = private("torch.utils._python_dispatch.TorchDispatchMode")
#: The leaves of nested containers.
tree_leaves: Callable[[Any], list[Any]] = private("torch.utils._pytree.tree_leaves")


def transforms(kind: str) -> int:
    """Counts the transforms of ``torch.func`` of a kind ("Grad", "Jvp", "Vmap") that are running."""
    return sum(interpreter.key().name == kind for interpreter in _interpreters() or ())


def node_number(node: Any) -> int:
    """Returns the number of a node of autograd's graph: larger for nodes that a thread makes later."""
    return node._sequence_nr()


def in_forward_ad() -> bool:
    """Whether a forward-mode differentiation is active."""
    return _forward_ad._current_level >= 0


def skip_frames(code: Any) -> None:
    """Tells Dynamo never to start a graph at a function."""
    # Some releases have ``skip_code``, others do not.
    skip = getattr(private("torch._dynamo.eval_frame"), "skip_code", None)
    if skip is not None:
        skip(code)


def graphs_of(code: Any) -> int:
    """Returns how many graphs Dynamo holds that start at a function."""
    return len(_graphs_of(code))


def recompile_limit() -> int:
    """Returns how many graphs Dynamo makes of one function."""
    return _dynamo_config.recompile_limit


def saved_tensor_hook_context() -> dict[str, Any] | None:
    """Returns AOTAutograd's graphs and the tensor that they save; None while it makes no graph."""
    return private("torch._functorch._aot_autograd.graph_compile._get_saved_tensor_hook_context")()


def inlining_code() -> Any:
    """Returns the code of the function that inlines hooks.

    Its variables name the inputs that are parameters.
    """
    return private(
        "torch._functorch._aot_autograd.graph_compile.maybe_inline_graph_saved_tensors_hooks").__code__


def remove_hooks(pack: Callable[..., Any]) -> None:
    """Pops the hooks with this pack hook, and all hooks above them, from the stack of this thread."""
    others = []
    while (top := top_hooks(True)) is not None:
        pop_hooks()
        if top[0] == pack:
            return
        others.append(top)
    for pair in reversed(others):
        push_hooks(*pair)
