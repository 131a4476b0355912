"""The noise of all wrappers in a model, as one state of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from brevitas_bp.backward.wrapper import wrappers_in
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.backward.NoiseState"


class NoiseState:
    """Saves and restores the noise streams of every ``QuantBackwardWrapper`` in a model.

    Weights, optimizer and torch's random state are not all that a run consists of: to resume bit for bit
    its roundings must go on where they were. Plain values only, the same in every process. Trainers that
    save whatever has ``state_dict`` and ``load_state_dict`` take it as it is.

    Args:
        model: contains wrappers, at any depth, or is one. Their qualified names are the keys, so make
            this from the model that *you* built, before a trainer puts its own shell around it.

    Raises:
        ValueError: ``model`` contains no wrapper.

    Example:
        >>> from brevitas_bp import QuantBackwardWrapper
        >>> net = nn.Sequential(QuantBackwardWrapper(nn.Linear(4, 4), seed=3), nn.ReLU())
        >>> NoiseState(net).state_dict()
        {'0': {'base': 3, 'position': 0}}
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = dict(wrappers_in(model))
        if not self._wrappers:
            raise ValueError(
                f"{_WHERE}: {type(model).__name__} contains no QuantBackwardWrapper, so there is no "
                "noise to save; wrap the model or a part of it first")

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Qualified name of each wrapper -> its ``noise_state()``."""
        return {name: wrapper.noise_state() for name, wrapper in self._wrappers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues every stream from :meth:`state_dict`; all of them or, after an error, none.

        Raises:
            UnknownNameError: the state is of a model with other wrappers.
            ValueError: a stream's state is not one.
        """
        ours, given = set(self._wrappers), set(state_dict)
        if ours != given:
            raise UnknownNameError(
                f"{_WHERE}.load_state_dict: the wrappers of this model are {_listed(ours)}, but the "
                f"state is of {_listed(given)}{_hint(ours, given)}; wrap the same modules as when it "
                "was saved")
        before = self.state_dict()
        try:
            self._set(state_dict)
        except Exception:
            self._set(before)
            raise

    def _set(self, states: Mapping[str, Any]) -> None:
        for name, wrapper in self._wrappers.items():
            wrapper.set_noise_state(states[name])


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) if name else "the model itself" for name in sorted(names)) or "none"


def _hint(ours: set[str], given: set[str]) -> str:
    missing = sorted(ours - given)
    return nearest(missing[0], sorted(given - ours)) if missing else ""
