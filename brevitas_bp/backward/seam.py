"""Functions for the rest of the package to find wrappers, listen, swap the policy, and restore all.

These are functions, not methods. A wrapper takes the place of its module, so each public name of the
wrapper hides the module's attribute of that name.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from brevitas_bp.backward.arguments import Storage
from brevitas_bp.backward.hooks import GraphListener, Listener
from brevitas_bp.backward.policy import ExplainedPolicy, Policy, explained
from brevitas_bp.backward.transparent import Transparent
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec.configured import ConfiguredCodec
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.backward.NoiseState"
# Attributes that a forward pass may change: codecs may keep statistics, and a policy may count.
_CODECS = ("_act_quant", "_overrides", "_codec_by_module", "_policy", "_base_policy")
_CHANGING = (*_CODECS, "_explanation")


def wrappers_in(model: nn.Module) -> Iterator[tuple[str, QuantBackwardWrapper]]:
    """Yields all wrappers of saved tensors in a model, each as qualified name and wrapper.

    A wrapper directly inside another has the name of the outer one, with ``.module`` appended.
    """
    for name, module in all_wrappers(model):
        if isinstance(module, QuantBackwardWrapper):
            yield name, module


def all_wrappers(model: nn.Module) -> Iterator[tuple[str, Transparent]]:
    """Works like :func:`wrappers_in`, for wrappers of every kind."""
    for name, module in model.named_modules():
        while isinstance(module, Transparent):
            yield name, module
            name, module = f"{name}.module".lstrip("."), module.module


@contextmanager
def listening(
        wrapper: QuantBackwardWrapper, listener: Listener,
        graph_listener: GraphListener | None = None) -> Iterator[None]:
    """Within the block, calls ``listener`` for every tensor that the wrapper saves.

    Forward passes that began before the block do not call it.

    Args:
        wrapper: the wrapper.
        listener: called for each saved tensor.
        graph_listener: called, after each forward pass, for each site of a compiled graph.
    """
    graph_listeners = [] if graph_listener is None else [graph_listener]
    wrapper._listeners.append(listener)
    wrapper._graph_listeners.extend(graph_listeners)
    try:
        yield
    finally:
        wrapper._listeners.remove(listener)
        for graph_listener in graph_listeners:
            wrapper._graph_listeners.remove(graph_listener)


def policy_of(wrapper: QuantBackwardWrapper, *, planned: bool = True) -> ExplainedPolicy:
    """Returns the policy that the wrapper follows.

    Args:
        wrapper: the wrapper.
        planned: whether to include the plan in force, if any.
    """
    return explained(wrapper._policy if planned else wrapper._base_policy)


@contextmanager
def using_policy(wrapper: QuantBackwardWrapper, policy: Policy) -> Iterator[None]:
    """Within the block, the wrapper follows another policy, and no plan."""
    before, wrapper._policy = wrapper._policy, policy
    try:
        yield
    finally:
        wrapper._policy = before


def act_quant_of(wrapper: QuantBackwardWrapper) -> ConfiguredCodec:
    """Returns the quantizer of the wrapper, and how it is built with other settings."""
    return wrapper._act_quant


def storage_of(wrapper: QuantBackwardWrapper) -> Storage:
    """Returns how the wrapper stores tensors."""
    return wrapper._storage


@contextmanager
def restored(wrapper: QuantBackwardWrapper, seed: int) -> Iterator[None]:
    """Restores the wrapper after the block, whatever runs within it.

    Within the block, the wrapper works on copies of its codecs and its policy, and draws noise from
    another stream. The block leaves unchanged: the wrapper's own noise, the statistics of its codecs,
    its policy with its plan, and what ``explain()`` reports. The wrapped module is not restored.

    Args:
        wrapper: the wrapper.
        seed: seed of the noise within the block.
    """
    before = {key: wrapper.__dict__[key] for key in _CHANGING}
    # Copy all in one call: an object that two of them share is then shared by the copies too.
    wrapper.__dict__.update(copy.deepcopy({key: before[key] for key in _CODECS}))
    try:
        with wrapper._noise.seeded(seed):
            yield
    finally:
        wrapper.__dict__.update(before)


class NoiseState:
    """Saves and restores the noise streams of every wrapper in a model.

    Weights, optimizer and torch's random state are not enough to resume a run bit for bit: its roundings
    must go on where they were. The state has plain values only, the same in every process. Trainers
    that save any object with ``state_dict`` and ``load_state_dict`` take a NoiseState as it is.

    Args:
        model: contains wrappers at any depth, or is one. The keys are the qualified names of the
            wrappers. So pass the model that *you* built, before a trainer puts its own shell around it.

    Raises:
        ValueError: ``model`` contains no wrapper.

    Example:
        >>> from brevitas_bp import QuantBackwardWrapper
        >>> net = nn.Sequential(QuantBackwardWrapper(nn.Linear(4, 4), seed=3), nn.ReLU())
        >>> NoiseState(net).state_dict()
        {'0': {'base': 3, 'position': 0}}
    """

    def __init__(self, model: nn.Module) -> None:
        # Ask the class: an instance passes on the attributes of its module.
        self._wrappers: dict[str, Any] = {
            name: w for name, w in all_wrappers(model) if hasattr(type(w), "noise_state")}
        if not self._wrappers:
            raise ValueError(
                f"{_WHERE}: {type(model).__name__} contains no QuantBackwardWrapper or "
                "QuantGradientWrapper, so there is no noise to save; wrap the model or a part of it "
                "first")

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Returns a mapping: qualified name of each wrapper -> its ``noise_state()``."""
        return {name: wrapper.noise_state() for name, wrapper in self._wrappers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues every stream from :meth:`state_dict`; after an error, no stream has changed.

        Raises:
            UnknownNameError: the state is that of a model with other wrappers.
            ValueError: the state of a stream is not valid.
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
