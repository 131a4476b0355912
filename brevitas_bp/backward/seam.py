"""What the rest of the package does with wrappers: find them, listen, swap the policy, put all back.

These are functions of a wrapper, not methods: a wrapper stands for its module, so each public name of
its own hides the module's attribute of that name.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from brevitas_bp.backward.arguments import Storage
from brevitas_bp.backward.hooks import GraphListener, Listener
from brevitas_bp.backward.policy import ExplainedPolicy, Policy, explained
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec.configured import ConfiguredCodec
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.backward.NoiseState"
# Attributes with what a forward pass may change: the codecs may keep statistics, a policy may count.
_CODECS = ("_act_quant", "_overrides", "_codec_by_module", "_policy", "_base_policy")
_CHANGING = (*_CODECS, "_explanation")


def wrappers_in(model: nn.Module) -> Iterator[tuple[str, QuantBackwardWrapper]]:
    """Qualified name and wrapper, of all in a model; one around another has its name and ``.module``."""
    for name, module in model.named_modules():
        while isinstance(module, QuantBackwardWrapper):
            yield name, module
            name, module = f"{name}.module".lstrip("."), module.module


@contextmanager
def listening(
        wrapper: QuantBackwardWrapper, listener: Listener,
        graph_listener: GraphListener | None = None) -> Iterator[None]:
    """Within the block ``listener`` is told of every tensor that the wrapper saves.

    Forward passes that have begun before the block do not know it.

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
    """The policy that the wrapper obeys.

    Args:
        wrapper: the wrapper.
        planned: with the plan that is in force, if there is one; False: as if there was none.
    """
    return explained(wrapper._policy if planned else wrapper._base_policy)


@contextmanager
def using_policy(wrapper: QuantBackwardWrapper, policy: Policy) -> Iterator[None]:
    """Within the block the wrapper obeys another policy, and no plan."""
    before, wrapper._policy = wrapper._policy, policy
    try:
        yield
    finally:
        wrapper._policy = before


def act_quant_of(wrapper: QuantBackwardWrapper) -> ConfiguredCodec:
    """The quantizer of the wrapper, and how it is built with other settings."""
    return wrapper._act_quant


def storage_of(wrapper: QuantBackwardWrapper) -> Storage:
    """How the wrapper stores tensors."""
    return wrapper._storage


@contextmanager
def restored(wrapper: QuantBackwardWrapper, seed: int) -> Iterator[None]:
    """Whatever runs within the block, the wrapper is afterwards what it was.

    Within the block it works on copies of its codecs and its policy, and draws the noise of another
    stream. Its own noise, the statistics of its codecs, the policy with its plan, and what
    ``explain()`` tells are then those of before. The wrapped module is not looked after.

    Args:
        wrapper: the wrapper.
        seed: of the noise within the block.
    """
    before = {key: wrapper.__dict__[key] for key in _CHANGING}
    # In one call: what two of them share is shared by the copies too.
    wrapper.__dict__.update(copy.deepcopy({key: before[key] for key in _CODECS}))
    try:
        with wrapper._noise.seeded(seed):
            yield
    finally:
        wrapper.__dict__.update(before)


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
