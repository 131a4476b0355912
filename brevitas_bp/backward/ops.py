"""Which operation and which module are running, for the thread that runs a forward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from brevitas_bp.backward.saved import NO_CALL, Call


class Location:
    """Where one forward pass is: qualified module name and operation.

    Args:
        root: the module that names are relative to.
        prefix: qualified name of ``root`` itself, where an outer pass knows one.
    """

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.names: dict[int, str] = {}
        self.compiled = False
        for name, module in root.named_modules():
            self.names[id(module)] = name
            self.compiled = self.compiled or is_compiled(module)
        self.root_compiled = is_compiled(root)
        self.prefix = prefix
        self.modules: list[tuple[str, type | None]] = [("", type(root))]
        self.call = NO_CALL
        self.calls = 0
        self.rewrites: Rewrites | None = None
        self.observer: Callable[[Call, Any], None] | None = None

    @property
    def module(self) -> str:
        """Name of the innermost module that runs, relative to the root."""
        return self.modules[-1][0]

    @property
    def module_type(self) -> type | None:
        """Class of the innermost module that runs."""
        return self.modules[-1][1]

    @property
    def qualified_module(self) -> str:
        """Name of the innermost module, with the prefix."""
        return ".".join(part for part in (self.prefix, self.module) if part)

    @property
    def op(self) -> str | None:
        """Name of the function that runs, or None outside torch functions."""
        return None if self.call is NO_CALL else self.call.name


def is_compiled(module: nn.Module) -> bool:
    """Whether its operations cannot be seen: ``torch.compile``, ``module.compile()``, TorchScript."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule" or (
        getattr(module, "_compiled_call_impl", None) is not None)


class _Running(threading.local):
    """The forward passes that this thread is inside of, innermost last."""

    def __init__(self) -> None:
        self.locations: list[Location] = []


_running = _Running()


def current_location() -> Location | None:
    """The innermost forward pass of this thread."""
    return _running.locations[-1] if _running.locations else None


class _OpMode(TorchFunctionMode):
    """Notes which function is running, and lets the pass run another in its place."""

    def __init__(self, location: Location) -> None:
        super().__init__()
        self.location = location

    def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Dynamo traces this very code: a compiled graph has no calls to note or rewrite. And attributes
        # of tensors come here too, which save nothing.
        if type(func) is MethodWrapperType or is_compiling():
            return func(*args, **kwargs)
        location = self.location
        before = location.call
        location.calls += 1
        call = location.call = Call(func, args, kwargs, location.calls)
        try:
            rewrite = None if location.rewrites is None else location.rewrites[func]
            output = NotImplemented if rewrite is None else rewrite(call)
            if output is NotImplemented:
                output = func(*args, **kwargs)
            if location.observer is not None:
                location.observer(call, output)
            return output
        finally:
            location.call = before


class Rewrites(dict[Any, Callable[[Call], Any] | None]):
    """Function -> what is run in its place (it returns the output, or NotImplemented), looked up once.

    Args:
        find: looks it up.
    """

    def __init__(self, find: Callable[[Any], Callable[[Call], Any] | None]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, function: Any) -> Callable[[Call], Any] | None:
        self[function] = found = self.find(function)
        return found


def seen_through(call: Call, location: Location) -> Any:
    """Runs a Python function of torch so that the functions it calls are noted one by one.

    While a mode runs, torch's own Python functions hand themselves to it before they do anything, which
    would never end. A copy of the function that finds no override starts at its body.
    """
    with _OpMode(location):
        return _without_override_check(call.function)(*call.args, **call.kwargs)


def _without_override_check(function: Any) -> Any:
    checks = {
        name: _finds_none for name in function.__code__.co_names
        if name.startswith("has_torch_function")}
    # Made anew each time: what the module's names stand for may change.
    copy = FunctionType(
        function.__code__, {**function.__globals__, **checks}, function.__name__,
        function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _finds_none(*arguments: Any) -> bool:
    return False


def _enter_module(module: nn.Module, args: Any) -> None:
    location = current_location()
    if location is not None:
        name = location.names.get(id(module), location.module)
        location.modules.append((name, type(module)))


def _leave_module(module: nn.Module, args: Any, output: Any) -> None:
    location = current_location()
    if location is not None and len(location.modules) > 1:
        location.modules.pop()


class _ModuleWatch:
    """Module hooks, installed while any pass runs and removed with the last one.

    NOTE [ Module names come from global hooks ]
    Hooks on the user's modules would be copied and pickled with them and miss modules added later.
    Global ones leave the modules alone; they look at the thread's own pass and do nothing elsewhere.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._handles = [
                    register_module_forward_pre_hook(_enter_module),
                    register_module_forward_hook(_leave_module, always_call=True)]
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for handle in self._handles:
                    handle.remove()
                self._handles = []


_watch = _ModuleWatch()


@contextmanager
def located(location: Location) -> Iterator[Location]:
    """Keeps ``location`` up to date within the block, in this thread."""
    # Nothing but the compiled graph runs inside of it, and Dynamo warns of global hooks.
    watch = nullcontext() if location.root_compiled else _watch
    with watch, _OpMode(location):
        _running.locations.append(location)
        try:
            yield location
        finally:
            _running.locations.remove(location)
