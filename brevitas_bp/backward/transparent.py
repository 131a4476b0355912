"""A module that takes the place of another one: same names, keys and attributes."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

_OWN = "module"
TABLES = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_Self = TypeVar("_Self", bound="Transparent")


def all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Modules of a network, those included that wrappers stand for."""
    for module in root.modules():
        yield module
        while isinstance(module, Transparent):
            module = module.module
            yield module


class Transparent(nn.Module):
    """Base of a wrapper of one module, ``self.module``.

    What the wrapper does not have is read from the module; modules, parameters, tensors and what the
    module has already are set and deleted there: ``wrapper.fc = nn.Linear(512, 10)`` replaces the
    module's own ``fc``.

    NOTE [ The wrapper takes the place of the module ]
    1. The tables of parameters, buffers, submodules and hooks of ``state_dict`` are the module's own,
       the very same objects: names, keys, and what is set, replaced or deleted through either of the
       two are those of both.
    2. So the module is no submodule of the wrapper, and no name has a step more than without it. Tools
       that match names of parameters with keys of a state_dict (PEFT) depend on that.
    3. What a module does to itself (``_apply``, ``train``, ``state_dict``) it is asked to do, since its
       class may do it in its own way.
    4. Methods of the module that the wrapper does not have run on the module: what they save is exact.
    """

    def _stand_for(self, module: nn.Module) -> None:
        """To be called last in ``__init__``: until then everything set is the wrapper's own."""
        self.__dict__[_OWN] = module
        for table in TABLES:
            # Not from its __dict__: TorchScript computes some of them.
            self.__dict__[table] = getattr(module, table)
        self.training = module.training

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``state_dict``: same keys, wrapped or not."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a ``state_dict`` of the module, wrapped or not."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def apply(self: _Self, fn: Callable[[nn.Module], Any]) -> _Self:
        """Applies ``fn`` to the modules that it would see without the wrapper."""
        self.module.apply(fn)
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """Sets the mode of the module."""
        self.module.train(mode)
        self.training = mode
        return self

    def _apply(self: _Self, fn: Callable[[Any], Any], recurse: bool = True) -> _Self:
        self.module._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Reached when a parent module loads.
        self.module._load_from_state_dict(*args, **kwargs)

    def __copy__(self: _Self) -> _Self:
        # Around a copy of the module: what is set on it would reach the original through the same one.
        return self._around(copy.copy(self.module))

    def _replicate_for_data_parallel(self: _Self) -> _Self:
        # nn.DataParallel sets parameters on what it gets.
        return self._around(self.module._replicate_for_data_parallel())  # pyright: ignore

    def _around(self: _Self, module: nn.Module) -> _Self:
        """The same wrapper of another module."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__getstate__())
        other._stand_for(module)
        return other

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == _OWN:
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and value.__name__.startswith("Parametrized"):
            # torch.nn.utils.parametrize puts properties on a class made for one module.
            raise TypeError(
                f"brevitas_bp.{type(self).__name__}: its class cannot be changed, since it is the "
                "module that runs; parametrize wrapper.module (and build that anew: the parameter to be "
                "computed is gone already)")
        if not self._is_own(name) and (
                isinstance(value, (nn.Module, Tensor)) or hasattr(self.module, name)):
            setattr(self.module, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def _is_own(self, name: str) -> bool:
        """Whether the wrapper has such an attribute; everything is its own until it has a module."""
        return name in self.__dict__ or hasattr(type(self), name) or _OWN not in self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for this: it compiles what runs forward, which is the module.
        return self.module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_for(self.module)
