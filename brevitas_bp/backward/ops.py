"""Which operation and which module are running, for the thread that runs a forward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class Location:
    """Where one forward pass is: qualified module name and operation.

    Args:
        root: the module that names are relative to.
        prefix: qualified name of ``root`` itself, where an outer pass knows one.
    """

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.names = {id(module): name for name, module in root.named_modules(
            remove_duplicate=True)}
        self.prefix = prefix
        self.modules: list[str] = [""]
        self.function: Callable[..., Any] | None = None
        self.arguments: tuple[Any, ...] = ()

    @property
    def module(self) -> str:
        """Name of the innermost module that runs, relative to the root."""
        return self.modules[-1]

    @property
    def qualified_module(self) -> str:
        """Name of the innermost module, with the prefix."""
        return ".".join(part for part in (self.prefix, self.module) if part)

    @property
    def op(self) -> str | None:
        """Name of the function that runs, or None outside torch functions."""
        return None if self.function is None else getattr(
            self.function, "__name__", str(self.function))


class _Running(threading.local):
    """The forward passes that this thread is inside of, innermost last."""

    def __init__(self) -> None:
        self.locations: list[Location] = []


_running = _Running()


def current_location() -> Location | None:
    """The innermost forward pass of this thread."""
    return _running.locations[-1] if _running.locations else None


class _OpMode(TorchFunctionMode):
    """Notes which function is running."""

    def __init__(self, location: Location) -> None:
        super().__init__()
        self.location = location

    def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        location = self.location
        before = location.function, location.arguments
        kwargs = kwargs or {}
        location.function, location.arguments = func, (*args, *kwargs.values())
        try:
            return func(*args, **kwargs)
        finally:
            location.function, location.arguments = before


def _enter_module(module: nn.Module, args: Any) -> None:
    location = current_location()
    if location is not None:
        location.modules.append(location.names.get(id(module), location.module))


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
    with _watch, _OpMode(location):
        _running.locations.append(location)
        try:
            yield location
        finally:
            _running.locations.remove(location)
