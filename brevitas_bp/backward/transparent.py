"""A module that takes the place of another module: same names, keys and attributes."""

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
    """Yields the modules of a network, including the modules that wrappers take the place of."""
    for module in root.modules():
        yield module
        while isinstance(module, Transparent):
            module = module.module
            yield module


class Transparent(nn.Module):
    """Base class of a wrapper of one module, ``self.module``.

    Attributes that the wrapper does not have are read from the module. Modules, parameters, tensors and
    attributes that the module already has are set and deleted on the module:
    ``wrapper.fc = nn.Linear(512, 10)`` replaces the module's own ``fc``.

    NOTE [ The wrapper takes the place of the module ]
    1. The tables of parameters, buffers, submodules and hooks of ``state_dict`` are the module's own
       objects. So wrapper and module have the same names and keys. Setting, replacing or deleting an
       entry through one of them does it for both.
    2. So the module is not a submodule of the wrapper, and the wrapper adds no step to any name. Tools
       that match names of parameters with keys of a state_dict (PEFT) depend on that.
    3. The wrapper passes on to the module what a module does to itself (``_apply``, ``train``,
       ``state_dict``). The module's class may do these operations in its own way.
    4. Methods of the module that the wrapper does not have run on the module. The tensors that they
       save are exact.
    """

    def _stand_for(self, module: nn.Module) -> None:
        """Takes the place of ``module``; call it last in ``__init__``.

        Until then, everything that is set is the wrapper's own.
        """
        self.__dict__[_OWN] = module
        for table in TABLES:
            # Do not read the tables from __dict__: TorchScript computes some of them.
            self.__dict__[table] = getattr(module, table)
        self.training = module.training

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's own ``state_dict``: same keys, wrapped or not."""
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
        # Copy the module too: attributes set on the copy would otherwise reach the original module.
        return self._around(copy.copy(self.module))

    def _replicate_for_data_parallel(self: _Self) -> _Self:
        # nn.DataParallel sets parameters on what it gets.
        return self._around(self.module._replicate_for_data_parallel())  # pyright: ignore

    def _around(self: _Self, module: nn.Module) -> _Self:
        """Returns a copy of this wrapper around another module."""
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
                f"brevitas_bp.{type(self).__name__}: its class cannot be changed, because the wrapped "
                "module is what runs; parametrize wrapper.module, and build that module anew first, "
                "because the parameter to be computed is already gone")
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
        """Whether the attribute is the wrapper's own; until it has a module, every attribute is."""
        return name in self.__dict__ or hasattr(type(self), name) or _OWN not in self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this to get what it compiles: the module, which runs forward.
        return self.module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_for(self.module)
