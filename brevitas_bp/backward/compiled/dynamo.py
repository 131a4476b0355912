"""Controls how Dynamo, the part of ``torch.compile`` that runs Python, treats our own functions.

NOTE [ A compiled wrapper ]
1. Under ``torch.compile(wrapper)`` the wrapper breaks the graph once, where it sets its hooks. The
   wrapper and the hooks run in Python, with Dynamo switched off.
2. Around the wrapped module Dynamo is on again, in a separate frame. So the module is compiled as in
   ``QuantBackwardWrapper(torch.compile(module))``, with the hooks inlined.
3. Without gradients nothing is stored. The wrapper is then traced like its module, without a break.
"""

import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from brevitas_bp.private import set_callback, skip_frames, wrap_inline

# Class of wrapped modules -> code of the frame in which Dynamo compiles them.
_frames: WeakKeyDictionary[type, CodeType] = WeakKeyDictionary()


def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Dynamo leave ``function`` to Python. Functions that it calls may still be compiled.

    ``torch.compiler.disable`` does that too, but its own check fails while a graph is exported.
    """
    function._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    no_graph_of_its_own(function)
    return function


def no_graph_of_its_own(*functions: Any) -> None:
    """Tells Dynamo never to start a graph at one of these functions.

    When Dynamo leaves a frame to Python, it tries to compile the functions that the frame calls. The
    hooks run around every operation, so Dynamo would try again for each function and shape. It may
    still trace these functions as part of another graph.
    """
    for function in functions:
        skip_frames(function.__code__)


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``function`` for autograd to call. Dynamo is off in the function and in all that it calls.

    After a graph break, operations of a compiled region run one by one. Dynamo would make graphs of the
    hooks that they call.
    """

    def run(*args: Any) -> Any:
        callback = set_callback(None)
        try:
            return function(*args)
        finally:
            set_callback(callback)

    no_graph_of_its_own(run)
    return run


def call_with(callback: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function with Dynamo's callback set to ``callback``, a result of ``set_callback``."""
    if not callable(callback):
        return function(*args, **kwargs)
    # Dynamo skips frames of torch's own modules, but not this wrapped frame.
    compiled = wrap_inline(function)
    # One code object for each class, because Dynamo makes a limited number of graphs per code object.
    compiled.__code__ = _frames.setdefault(type(function), compiled.__code__.replace())
    previous = set_callback(callback)
    try:
        return compiled(*args, **kwargs)
    finally:
        set_callback(previous)


def frames_of(kind: type) -> Iterator[CodeType]:
    """Yields the code objects at which graphs of a class of modules start."""
    if kind in _frames:
        yield _frames[kind]
    # Dynamo skips ``forward`` of torch's own modules and compiles a frame around it instead.
    own = kind.__module__.startswith("torch.nn.")
    compiled: Any = wrap_inline(kind) if own else getattr(kind, "forward", None)
    if hasattr(compiled, "__code__"):
        yield compiled.__code__


def inductor_compiles() -> bool:
    """Whether Inductor compiles the graph that is being traced. It chooses memory orders of its own.

    Other backends run the graph's operations as they were traced, and some of them need the order with
    which they were traced.
    """
    virtualized = sys.modules.get("torch._inductor.virtualized")
    # Inductor has a mode of fake tensors while it compiles; else a placeholder stands there.
    mode = getattr(getattr(virtualized, "V", None), "fake_mode", None)
    return virtualized is not None and type(mode).__name__ != "NullHandler"
