"""A module that stands for another one: same keys, same attributes, whether read, set or deleted."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

_OWN = "module"


class Transparent(nn.Module):
    """Base of a wrapper of one module, ``self.module``, set last in ``__init__``.

    What the wrapper does not have is read from the module, and also set and deleted there:
    ``wrapper.fc = nn.Linear(512, 10)`` replaces the module's own ``fc``. The wrapper has no parameters,
    buffers and submodules but those of the module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_name_keys_as_given)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``state_dict``: same keys, wrapped or not."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a ``state_dict`` of the module, wrapped or not."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], Any]) -> Any:
        """Applies ``fn`` to the modules that it would see without the wrapper."""
        self.module.apply(fn)
        return self

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a child to the module."""
        self.module.add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter to the module."""
        self.module.register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Adds a buffer to the module."""
        self.module.register_buffer(name, tensor, persistent)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == _OWN:
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_own(name) and (
                isinstance(value, (nn.Module, nn.Parameter)) or hasattr(self.module, name)):
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
        return (
            name == _OWN or name in self.__dict__ or hasattr(type(self), name)
            or _OWN not in self.__dict__.get("_modules", ()))

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for this: it compiles what runs forward, which is the module.
        return self.module

    def _load_from_state_dict(
            self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        # Reached when a parent module loads: its keys do not name the wrapper.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}{_OWN}.{key[len(prefix):]}"] = state_dict.pop(key)
        messages = missing_keys, unexpected_keys, error_msgs
        self.__dict__["_loading"] = prefix, [(list_, len(list_)) for list_ in messages]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *messages)


def _name_keys_as_given(wrapper: Transparent, incompatible: Any) -> None:
    """Takes the wrapper's own name out of what a parent's ``load_state_dict`` reports."""
    prefix, messages = wrapper.__dict__.pop("_loading")
    for list_, start in messages:
        list_[start:] = [text.replace(f"{prefix}{_OWN}.", prefix, 1) for text in list_[start:]]
