"""Which operation and which module are running, for the thread that runs a forward pass."""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from brevitas_bp.backward.compiled.dynamo import no_graph_of_its_own, set_callback
from brevitas_bp.backward.origins import note_rounded
from brevitas_bp.backward.saved import NO_CALL, Call
from brevitas_bp.private import function_modes, pop_function_mode


class Location:
    """Where one forward pass is: qualified module name and operation.

    Args:
        root: the module that names are relative to.
        prefix: qualified name of ``root`` itself, where an outer pass knows one.
        compiled: whether it is called from something that is compiled, and so compiled too.
    """

    def __init__(self, root: nn.Module, prefix: str = "", compiled: bool = False) -> None:
        self.names: dict[int, str] = {}
        self.tree = list(_modules_of(root, self.names))
        # Names and classes of modules that are compiled by themselves.
        self.compiled_parts: dict[str, type] = {
            self.names[id(module)]: type(getattr(module, "_orig_mod", module))
            for module in self.tree if is_compiled(module)}
        self.compiled = compiled or bool(self.compiled_parts)
        self.root_compiled = compiled or is_compiled(root)
        self.prefix = prefix
        self.modules: list[tuple[str, type | None]] = [("", type(root))]
        self.call = NO_CALL
        self.rewrites: Rewrites | None = None
        self.observer: Callable[[Call, Any], None] | None = None
        # To be called when the operation that runs has ended.
        self.ending: Callable[[], None] | None = None
        # The call that saved something rounded last, and the storages of that; those of what custom
        # Functions have, of which nobody sees the end; and of all.
        self.rounding: Call | None = None
        self.rounded: set[int] = set()
        self.rounded_unseen: set[int] = set()
        self.ever_rounded: set[int] = set()
        # The pass itself, and the seed of its next encode, for hooks that serve several passes.
        self.forward_pass: Any = None
        self.next_seed: Callable[[], int] | None = None
        self.graphs: set[int] = set()
        # Whether a module of the pass has run in it.
        self.entered = self.ended = False

    def note_rounded(self, call: Call, storage: int) -> None:
        """Notes that a call has saved a tensor of this storage rounded.

        See NOTE [ No two roundings of one tensor are multiplied ].
        """
        self.ever_rounded.add(storage)
        if call is NO_CALL:
            self.rounded_unseen.add(storage)
            return
        if self.rounding is not call:
            self.rounding, self.rounded = call, set()
        self.rounded.add(storage)

    def module_in(self, traceback: Any) -> str:
        """The innermost module of the pass in a traceback, for messages."""
        found = "the network"
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and self.names.get(id(module)):
                found = f"{self.names[id(module)]!r} ({type(module).__name__})"
            traceback = traceback.tb_next
        return found

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
        prefix, module = self.prefix, self.modules[-1][0]
        return module if not prefix else f"{prefix}.{module}" if module else prefix

    @property
    def op(self) -> str | None:
        """Name of the function that runs, or None outside torch functions."""
        return None if self.call is NO_CALL else self.call.name

    def enter_module(self, module: nn.Module, args: Any) -> None:
        """Global forward pre-hook."""
        # Dynamo, which traces hooks too, must not make graphs that hold for one name only.
        if not is_compiling() and current_location() is self:
            name = self.names.get(id(module))
            self.entered = self.entered or name is not None
            self.modules.append((self.module if name is None else name, type(module)))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Global forward hook, called after exceptions too."""
        if not is_compiling() and current_location() is self and len(self.modules) > 1:
            self.modules.pop()


def _modules_of(root: nn.Module, names: dict[int, str]) -> Iterator[nn.Module]:
    """The modules of ``root.named_modules()`` in its order, whose names go to ``names``.

    That nests a generator for each level, and this runs in every step.
    """
    waiting: list[tuple[str, nn.Module]] = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if id(module) not in names:
            names[id(module)] = name
            yield module
            prefix = f"{name}." if name else ""
            waiting += [
                (prefix + child, part) for child, part in reversed(list(module._modules.items()))
                if part is not None]


def is_compiled(module: nn.Module) -> bool:
    """Whether its operations cannot be seen: ``torch.compile``, ``module.compile()``, TorchScript."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule" or (
        getattr(module, "_compiled_call_impl", None) is not None)


# Of calls, so that no two of a process have the same.
_numbers = itertools.count()


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
        if is_compiling() or type(func) is MethodWrapperType:
            return _traceable(func)(*args, **kwargs)
        location = self.location
        before = location.call
        call = location.call = Call(func, args, kwargs, next(_numbers))
        try:
            rewrite = None if location.rewrites is None else location.rewrites[func]
            output = NotImplemented if rewrite is None else rewrite(call)
            if output is NotImplemented:
                output = func(*args, **kwargs)
            if location.ending is not None:
                location.ending, ending = None, location.ending
                ending()
            if location.rounding is call:
                note_rounded(output, location.rounded)
            if location.observer is not None:
                location.observer(call, output)
            return output
        finally:
            location.call, location.ending = before, None


def _traceable(func: Any) -> Any:
    """A function, or one that Dynamo can trace when a mode calls it: no method that calls super()."""
    return torch.unflatten if func is torch.Tensor.unflatten else func


class _OpModeInPython(_OpMode):
    """The same where something is compiled: Dynamo makes no graphs of what is done here.

    It would where operations of a compiled region run one by one, after a graph break.
    """

    def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_compiling():
            return _traceable(func)(*args, **(kwargs or {}))
        callback = set_callback(None)
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            set_callback(callback)


no_graph_of_its_own(
    _OpMode.__torch_function__, _OpModeInPython.__torch_function__, Location.enter_module,
    Location.leave_module, current_location)


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


_SHELL_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"


def _watch_modules(location: Location) -> None:
    """Notes which module runs.

    NOTE [ Module names come from global hooks ]
    Hooks on the user's modules would be copied and pickled with them and miss modules added later.
    Global ones leave the modules alone; each pass has its own, which do nothing in other threads and
    while another pass is innermost. So passes share nothing, and no lock is left held by an interrupt.
    """
    # Compiled graphs are guarded by the keys: they are the same in every step, and no two passes of a
    # process have the same.
    if location.compiled:
        # It says that our hooks run once more for the shell around a compiled module: they may.
        warnings.filterwarnings("ignore", _SHELL_WARNING)
    key: Any = f"brevitas_bp {threading.get_ident()} {len(_running.locations)}"
    torch_module._global_forward_pre_hooks[key] = location.enter_module
    torch_module._global_forward_hooks_always_called[key] = True
    torch_module._global_forward_hooks[key] = location.leave_module


def _unwatch_modules(location: Location) -> None:
    # By value: an interrupt may have come anywhere.
    _remove(location.enter_module, torch_module._global_forward_pre_hooks)
    _remove(location.leave_module, torch_module._global_forward_hooks)


def _remove(hook: Callable[..., Any], hooks: dict[int, Any]) -> None:
    always_called = torch_module._global_forward_hooks_always_called
    for key in [key for key, value in list(hooks.items()) if hook == value]:
        hooks.pop(key, None)
        always_called.pop(key, None)


# NOTE [ Interrupts ]
# Ctrl-C, or an exception that another thread sends, may arrive between any two bytecodes.
# 1. Each step that installs something has one that removes it, by identity, and does nothing where it
#    is not installed: leaving may begin at any point of entering, be cut short and begun again.
# 2. Leaving runs twice, from ``with`` and from ``finally`` around it: the second run completes a first
#    that was interrupted. Only two interrupts within these microseconds leave something behind.
# 3. What lies above ours on a stack was left behind by code that ran inside (torch's own context
#    managers have no such care), and goes with ours.
# 4. torch may put a mode back after the pass has ended, when the traceback of an interrupt is freed. It
#    then does nothing, and the next pass of the thread removes it.


def enter(location: Location) -> None:
    """Keeps ``location`` up to date in this thread, until :func:`leave`."""
    for mode in function_modes():
        if isinstance(mode, _OpMode) and mode.location.ended:
            _remove_mode(mode.location)
    # Nothing but the compiled graph runs inside of it, and Dynamo warns of global hooks.
    if not location.root_compiled:
        _watch_modules(location)
    (_OpModeInPython if location.compiled else _OpMode)(location).__enter__()
    _running.locations.append(location)


def leave(location: Location) -> None:
    """Undoes :func:`enter`, wherever that came to; see NOTE [ Interrupts ]."""
    location.ended = True
    # It holds the pass, which would wait for the garbage collector.
    location.rewrites = location.observer = location.forward_pass = location.next_seed = None
    location.ending = location.rounding = None
    location.tree = []
    if location in _running.locations:
        del _running.locations[_running.locations.index(location):]
    _remove_mode(location)
    _unwatch_modules(location)


def _remove_mode(location: Location) -> None:
    """Takes the modes of a pass, and all above, from the stack of this thread."""
    for depth, mode in enumerate(modes := function_modes()):
        if isinstance(mode, _OpMode) and mode.location is location:
            for _ in modes[depth:]:
                pop_function_mode()
            return
