"""Tracks which operation and which module are running, in the thread that runs a forward pass."""

import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from brevitas_bp.backward.compiled.dynamo import no_graph_of_its_own, set_callback
from brevitas_bp.backward.origins import SharedRoundings, note_rounded
from brevitas_bp.backward.saved import NO_CALL, Call, place_of, storage_id
from brevitas_bp.private import function_modes, pop_function_mode


class Location:
    """The current position of one forward pass: qualified module name and operation.

    Args:
        root: the module that names are relative to.
        prefix: qualified name of ``root`` itself, if an outer pass knows it.
        compiled: whether the caller of ``root`` is compiled, so that ``root`` is compiled too.
    """

    def __init__(self, root: nn.Module, prefix: str = "", compiled: bool = False) -> None:
        self.names: dict[int, str] = {}
        self.tree = list(_modules_of(root, self.names))
        # Name -> class of each module that is compiled by itself.
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
        # Called with the output of the running operation when it has ended.
        self.endings: list[Callable[[Any], None]] = []
        # Called with the next call, before it runs.
        self.following: list[Callable[[Call], None]] = []
        # The last call that saved a rounded tensor; storages and places of what this call saved rounded.
        self.rounding: Call | None = None
        self.rounded: set[Hashable] = set()
        # Storages that custom Functions saved rounded; we cannot see when such a Function ends.
        self.rounded_unseen: set[int] = set()
        # All storages that were saved rounded in this pass.
        self.ever_rounded: set[int] = set()
        self.shared_roundings = SharedRoundings()
        # The pass itself, and the function that returns its next seed. Hooks that serve several passes
        # need both.
        self.forward_pass: Any = None
        self.next_seed: Callable[[], int] | None = None
        self.graphs: set[int] = set()
        # Storage -> how it was filled, see ``backward/logits.py``.
        self.made: dict[int, Any] = {}
        # Whether the pass stores nothing and rewrites nothing. Its mode then leaves the stack while
        # another pass runs, whose hooks call thousands of functions; ``paused`` is the mode that left.
        self.counts_only = False
        self.paused: _OpMode | None = None
        # ``entered``: a module of the root has run. ``ended``: the pass has ended.
        self.entered = self.ended = False

    def renew(self, root: nn.Module) -> None:
        """Forgets storages that were noted, and names the modules of ``root`` anew."""
        self.rounding, self.rounded = None, set()
        self.rounded_unseen, self.ever_rounded = set(), set()
        self.shared_roundings = SharedRoundings()
        self.names.clear()
        self.tree = list(_modules_of(root, self.names))

    def note_rounded(self, call: Call, x: Tensor) -> None:
        """Notes that a call has saved a tensor in rounded form.

        See NOTE [ No two roundings of one tensor are multiplied ].
        """
        storage = storage_id(x)
        self.ever_rounded.add(storage)
        if call is NO_CALL:
            self.rounded_unseen.add(storage)
            return
        if self.rounding is not call:
            self.rounding, self.rounded = call, set()
        self.rounded |= {storage, place_of(x)}

    def follow(self, call: Call) -> None:
        """Tells who waits for the call after another one which call it is: NO_CALL at the pass's end."""
        following, self.following = self.following, []
        for tell in following:
            tell(call)

    def module_in(self, traceback: Any) -> str:
        """Names the innermost module of the pass in a traceback, for messages."""
        found = "the network"
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and self.names.get(id(module)):
                found = f"{self.names[id(module)]!r} ({type(module).__name__})"
            traceback = traceback.tb_next
        return found

    @property
    def module(self) -> str:
        """Name of the innermost running module, relative to the root."""
        return self.modules[-1][0]

    @property
    def module_type(self) -> type | None:
        """Class of the innermost running module."""
        return self.modules[-1][1]

    @property
    def qualified_module(self) -> str:
        """Name of the innermost running module, with the prefix."""
        prefix, module = self.prefix, self.modules[-1][0]
        return module if not prefix else f"{prefix}.{module}" if module else prefix

    @property
    def op(self) -> str | None:
        """Name of the running function, or None outside torch functions."""
        return None if self.call is NO_CALL else self.call.name

    def enter_module(self, module: nn.Module, args: Any) -> None:
        """Global forward pre-hook."""
        # Dynamo traces hooks too. It must not make graphs that are valid for one module name only.
        if not is_compiling() and current_location() is self:
            name = self.names.get(id(module))
            self.entered = self.entered or name is not None
            self.modules.append((self.module if name is None else name, type(module)))

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Global forward hook, called after exceptions too."""
        if not is_compiling() and current_location() is self and len(self.modules) > 1:
            self.modules.pop()


def _modules_of(root: nn.Module, names: dict[int, str]) -> Iterator[nn.Module]:
    """Yields the modules of ``root.named_modules()`` in its order, and puts their names into ``names``.

    ``named_modules`` nests a generator for each level. This function does not, because it runs in every
    step.
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
    """Whether a module hides its operations: ``torch.compile``, ``module.compile()``, TorchScript."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule" or (
        getattr(module, "_compiled_call_impl", None) is not None)


# Numbers of calls: no two calls of a process have the same number.
_numbers = itertools.count()


class _Running(threading.local):
    """The forward passes that are running in this thread, innermost last."""

    def __init__(self) -> None:
        self.locations: list[Location] = []


_running = _Running()


def current_location() -> Location | None:
    """Returns the location of this thread's innermost forward pass, or None."""
    return _running.locations[-1] if _running.locations else None


class _OpMode(TorchFunctionMode):
    """Notes which function is running, and lets the pass replace it by another function."""

    def __init__(self, location: Location) -> None:
        super().__init__()
        self.location = location

    def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.location.counts_only and not torch.is_grad_enabled():
            # Nothing is saved. There are many such calls: an optimizer makes dozens for each parameter.
            return func(*args, **kwargs)
        # Dynamo traces this very code, and a compiled graph has no calls to note or rewrite. Reading an
        # attribute of a tensor leads here too, and saves nothing.
        if is_compiling() or type(func) is MethodWrapperType:
            return _traceable(func)(*args, **kwargs)
        location = self.location
        before = location.call
        call = Call(func, args, kwargs, next(_numbers))
        if location.following:
            location.follow(call)
        location.call = call
        try:
            rewrite = None if location.rewrites is None else location.rewrites[func]
            output = NotImplemented if rewrite is None else rewrite(call)
            if output is NotImplemented:
                output = func(*args, **kwargs)
            if location.endings:
                location.endings, endings = [], location.endings
                for ending in endings:
                    ending(output)
            if location.rounding is call:
                note_rounded(output, location.rounded)
            if location.observer is not None:
                location.observer(call, output)
            return output
        finally:
            location.call = before
            location.endings.clear()


def _traceable(func: Any) -> Any:
    """Returns a function, or its substitute that Dynamo can trace when a mode calls it.

    Dynamo cannot trace a method that calls super().
    """
    return torch.unflatten if func is torch.Tensor.unflatten else func


class _OpModeInPython(_OpMode):
    """An :class:`_OpMode` for passes with compiled modules: Dynamo makes no graphs of its work.

    After a graph break, operations of a compiled region run one by one. There Dynamo would make graphs
    of the mode's own code.
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
    """Function -> its replacement or None, looked up once.

    A replacement returns the output, or NotImplemented.

    Args:
        find: looks up the replacement of a function.
    """

    def __init__(self, find: Callable[[Any], Callable[[Call], Any] | None]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, function: Any) -> Callable[[Call], Any] | None:
        self[function] = found = self.find(function)
        return found


def seen_through(call: Call, location: Location) -> Any:
    """Runs a Python function of torch so that the functions it calls are noted one by one.

    While a mode is active, a Python function of torch hands itself to the mode before it does anything
    else. Calling the function from the mode would therefore never end. So we run a copy of it that finds
    no override, and so starts at its body.
    """
    with _OpMode(location):
        return _without_override_check(call.function)(*call.args, **call.kwargs)


def _without_override_check(function: Any) -> Any:
    checks = {
        name: _finds_none for name in function.__code__.co_names
        if name.startswith("has_torch_function")}
    # The copy is made anew each time, because the globals of the function's module may change.
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
    Hooks on the user's modules would be copied and pickled with them. They would miss modules that are
    added later. Global hooks leave the modules alone. Each pass has its own global hooks. They do
    nothing in other threads, or while another pass is innermost. So passes share nothing, and an
    interrupt leaves no lock held.
    """
    # Compiled graphs have guards on the keys of the hooks. So a key is the same in every step, and no
    # two running passes of a process have the same key.
    if location.compiled:
        # torch warns that our hooks run a second time, for the ``OptimizedModule`` around a compiled
        # module. That does no harm.
        warnings.filterwarnings("ignore", _SHELL_WARNING)
    key: Any = f"brevitas_bp {threading.get_ident()} {len(_running.locations)}"
    torch_module._global_forward_pre_hooks[key] = location.enter_module
    torch_module._global_forward_hooks_always_called[key] = True
    torch_module._global_forward_hooks[key] = location.leave_module


def _unwatch_modules(location: Location) -> None:
    # Find the hooks by value, not by key: an interrupt may have come anywhere.
    _remove(location.enter_module, torch_module._global_forward_pre_hooks)
    _remove(location.leave_module, torch_module._global_forward_hooks)


def _remove(hook: Callable[..., Any], hooks: dict[int, Any]) -> None:
    always_called = torch_module._global_forward_hooks_always_called
    for key in [key for key, value in list(hooks.items()) if hook == value]:
        hooks.pop(key, None)
        always_called.pop(key, None)


# NOTE [ Interrupts ]
# Ctrl-C, or an exception that another thread sends, may arrive between any two bytecodes.
# 1. Each step that installs something has a counterpart that removes it, by identity. The counterpart
#    does nothing if the thing is not installed. So leaving may begin at any point of entering, be cut
#    short, and begin again.
# 2. Leaving runs twice: from ``with``, and from the ``finally`` around it. The second run completes a
#    first run that was interrupted. Only two interrupts within these microseconds leave anything behind.
# 3. Code that ran inside the pass may leave entries above ours on a stack, because torch's own context
#    managers do not guard against interrupts. We remove these entries with ours.
# 4. torch may put a mode back after the pass has ended, when the traceback of an interrupt is freed. The
#    mode then does nothing, and the next pass of the thread removes it.


def enter(location: Location) -> None:
    """Keeps ``location`` up to date in this thread, until :func:`leave`."""
    for mode in function_modes():
        if isinstance(mode, _OpMode) and mode.location.ended:
            _remove_mode(mode.location)
    _pause_counting(location)
    # Inside a compiled root, only its graph runs. Hooks would be of no use there, and Dynamo would warn.
    if not location.root_compiled:
        _watch_modules(location)
    (_OpModeInPython if location.compiled else _OpMode)(location).__enter__()
    _running.locations.append(location)


def leave(location: Location) -> None:
    """Undoes :func:`enter`, however far that came; see NOTE [ Interrupts ]."""
    location.ended = True
    # These attributes hold the pass, which would otherwise wait for the garbage collector.
    location.rewrites = location.observer = location.forward_pass = location.next_seed = None
    location.endings, location.following, location.rounding = [], [], None
    location.tree, location.made = [], {}
    if location in _running.locations:
        del _running.locations[_running.locations.index(location):]
    _remove_mode(location)
    _unwatch_modules(location)
    paused, location.paused = location.paused, None
    if paused is not None and not paused.location.ended:
        paused.__enter__()


def _pause_counting(location: Location) -> None:
    """Takes the innermost mode off the stack if its pass only counts; :func:`leave` puts it back."""
    modes = function_modes()
    if modes and isinstance(modes[-1], _OpMode) and modes[-1].location.counts_only:
        location.paused = pop_function_mode()


def _remove_mode(location: Location) -> None:
    """Pops the modes of a pass, and all modes above them, from the stack of this thread."""
    for depth, mode in enumerate(modes := function_modes()):
        if isinstance(mode, _OpMode) and mode.location is location:
            for _ in modes[depth:]:
                pop_function_mode()
            return
