"""What our own functions are to Dynamo, the part of ``torch.compile`` that runs Python.

NOTE [ A compiled wrapper ]
1. Under ``torch.compile(wrapper)`` the wrapper breaks the graph once, where it sets its hooks: it
   runs in Python, with Dynamo switched off, as do the hooks.
2. Around the wrapped module Dynamo is on again, in a frame of its own, so that the module is compiled as
   in ``QuantBackwardWrapper(torch.compile(module))``, with the hooks inlined.
3. Without gradients nothing is stored: the wrapper is traced as its module, without a break.
"""

from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from brevitas_bp.private import set_callback, skip_frames, wrap_inline

# Class of wrapped modules -> the frame in which Dynamo compiles them.
_frames: WeakKeyDictionary[type, CodeType] = WeakKeyDictionary()


def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which Dynamo leaves to Python; what it calls may be compiled.

    ``torch.compiler.disable`` is that and a check of its own that fails while a graph is exported.
    """
    function._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    no_graph_of_its_own(function)
    return function


def no_graph_of_its_own(*functions: Any) -> None:
    """Tells Dynamo to make no graph that begins at one of these functions.

    Where it leaves a frame to Python it tries those that are called from there, and for what runs around
    every operation it would do so again and again, for each function and shape. As part of another graph
    it may still trace them.
    """
    for function in functions:
        skip_frames(function.__code__)


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for autograd to call: Dynamo is off while it runs, and what it calls too.

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
    """Calls a function while Dynamo does what ``callback``, from ``set_callback``, says."""
    if not callable(callback):
        return function(*args, **kwargs)
    # In a frame that Dynamo does not skip, as it does those of torch's own modules.
    compiled = wrap_inline(function)
    # One for each class: Dynamo makes a limited number of graphs that begin at one frame.
    compiled.__code__ = _frames.setdefault(type(function), compiled.__code__.replace())
    previous = set_callback(callback)
    try:
        return compiled(*args, **kwargs)
    finally:
        set_callback(previous)


def frames_of(kind: type) -> Iterator[CodeType]:
    """The code at which graphs of a class of modules begin."""
    if kind in _frames:
        yield _frames[kind]
    # Dynamo skips the forward of torch's own modules, and takes a frame around it.
    own = kind.__module__.startswith("torch.nn.")
    compiled: Any = wrap_inline(kind) if own else getattr(kind, "forward", None)
    if hasattr(compiled, "__code__"):
        yield compiled.__code__
