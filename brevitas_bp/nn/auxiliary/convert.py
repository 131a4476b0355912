"""Turns the layers of a network into auxiliary layers, in place."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from brevitas_bp.backward.location import is_compiled
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.nn.auxiliary.hooks import NetworkHooks, RunHooks
from brevitas_bp.nn.auxiliary.residual import AuxiliaryResidualConv2d, AuxiliaryResidualLinear
from brevitas_bp.nn.auxiliary.resnets import input_layers, resnet_runs
from brevitas_bp.nn.auxiliary.run import AuxiliaryRun
from brevitas_bp.nn.auxiliary.sign import AuxiliarySignConv2d, AuxiliarySignLinear
from brevitas_bp.nn.auxiliary.signs import signs_of

_RESIDUAL = "brevitas_bp.nn.convert_to_auxiliary_residual"
_SIGN = "brevitas_bp.nn.convert_to_auxiliary_sign"

#: Class of an ordinary layer -> classes with auxiliary residual and sign activations.
_FORMS: dict[type, tuple[type, type]] = {
    nn.Conv2d: (AuxiliaryResidualConv2d, AuxiliarySignConv2d),
    nn.Linear: (AuxiliaryResidualLinear, AuxiliarySignLinear)}

#: Block -> the layers that read the input of the block; or their names within each block.
LayersOf = Callable[[nn.Module], Iterable[nn.Module]] | Sequence[str]


def convert_to_auxiliary_residual(
        network: nn.Module, runs: Sequence[Sequence[str]] | None = None, *,
        layers: LayersOf = input_layers, codec: Any = None, seed: int | None = None,
        **overrides: Any) -> nn.Module:
    """Gives a residual network auxiliary residual activations (ARA), in place.

    In each block, the layers that read the block's input become :class:`AuxiliaryResidualConv2d` or
    :class:`AuxiliaryResidualLinear`. All layers of a run take the input of the run's first block as
    their input in backward, and it is stored once. Layers keep their identity, parameters and hooks, so
    optimizers and ``state_dict`` stay as they are. The forward function does not change.

    Blocks must be called as modules (hooks begin and end the runs). A checkpointed part must contain
    whole runs.

    Args:
        network: the network, before it is compiled.
        runs: names of the blocks of each run, in the order in which they run. Every block after the
            first must add to its input, and keep the shape, except the last. None:
            :func:`resnet_runs`.
        layers: the layers that read the input of the block itself, as names within the block such as
            ``("conv1", "downsample.0")``, or as a function of the block. By default those of a ResNet.
        codec: stores the auxiliary activations: a config or a codec; None: exact.
        seed: seed of the noise of the codec; None derives it from ``torch.initial_seed()``.
        **overrides: settings of the config.

    Returns:
        The network.

    Raises:
        UnknownNameError: a name of a block or layer does not exist.
        ValueError: a block is in two places, has no layer to convert, or shares it with another run.
        TypeError: a layer is neither ``nn.Conv2d`` nor ``nn.Linear`` itself, or ``network`` is compiled.

    Example:
        >>> import torch
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.layer(x).tanh()
        >>> net = nn.Sequential(Residual(), Residual(), nn.Linear(8, 2))
        >>> net = convert_to_auxiliary_residual(net, [["0", "1"]], layers=["layer"])
        >>> net(torch.randn(4, 8)).sum().backward()
        >>> type(net[1].layer).__name__
        'AuxiliaryResidualLinear'
    """
    _check_network(_RESIDUAL, network)
    named = resnet_runs(network) if runs is None else [list(run) for run in runs]
    blocks = _blocks_of(network, named)
    chosen = _layers_of(blocks, layers)
    if codec is not None and not isinstance(codec, Codec):
        codec, overrides = codec_from(codec, **overrides), {}
    names = {id(module): name for name, module in network.named_modules()}
    owner: dict[int, int] = {}
    for i, layer in ((i, layer) for i, run in enumerate(chosen) for found in run for layer in found):
        name = names.get(id(layer), "?")
        _check_layer(_RESIDUAL, name, layer)
        if owner.setdefault(id(layer), i) != i:
            raise ValueError(
                f"{_RESIDUAL}: {name!r} is shared by blocks of two runs, so it would need two auxiliary "
                "activations; put these blocks into one run")
    made = [
        AuxiliaryRun(codec, seed=None if seed is None else seed + i, name=run[0], **overrides)
        for i, run in enumerate(named)]
    for run, of_run, of_blocks in zip(made, blocks, chosen):
        for layer in {id(layer): layer for found in of_blocks for layer in found}.values():
            _turn(layer, 0, "run", run)
        RunHooks(run).attach(of_run)
    NetworkHooks(made).attach(network)
    return network


def convert_to_auxiliary_sign(
        network: nn.Module, layers: Sequence[str], *, epsilon: float = 0.01,
        lr_expansion: float = 100.0, relu: bool = False) -> nn.Module:
    """Gives layers auxiliary sign activations (ASA), in place.

    Every ``nn.Conv2d`` and ``nn.Linear`` that a pattern matches becomes an :class:`AuxiliarySignConv2d`
    or :class:`AuxiliarySignLinear`. **The forward function of the network changes**: see there. Layers
    keep their identity, parameters and hooks.

    Args:
        network: the network, before it is compiled.
        layers: globs over qualified names, for instance ``["blocks.*.down"]``.
        epsilon: size of what is added to each element of the input.
        lr_expansion: factor of the gradient of the weight.
        relu: whether the inputs of these layers have no negative values. Call it once for the layers
            behind a ReLU and once for the others.

    Returns:
        The network.

    Raises:
        UnknownNameError: a pattern matches no convolution or linear layer.
        ValueError: a number is not positive and finite.
        TypeError: a matching layer is a subclass of ``nn.Conv2d`` or ``nn.Linear``, or ``network`` is
            compiled.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> type(convert_to_auxiliary_sign(net, ["2"])[2]).__name__
        'AuxiliarySignLinear'
    """
    _check_network(_SIGN, network)
    if isinstance(layers, str):
        raise TypeError(f"{_SIGN}: layers must be a list of patterns, got {layers!r}; pass [{layers!r}]")
    signs = signs_of("convert_to_auxiliary_sign", epsilon, lr_expansion, relu)
    known = {name: m for name, m in network.named_modules() if isinstance(m, tuple(_FORMS))}
    chosen: dict[str, nn.Module] = {}
    for pattern in layers:
        matching = {name: m for name, m in known.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            raise UnknownNameError(
                f"{_SIGN}: {pattern!r} matches no Conv2d and no Linear{nearest(pattern, known)}")
        chosen |= matching
    for name, layer in chosen.items():
        _check_layer(_SIGN, name, layer)
    for layer in chosen.values():
        _turn(layer, 1, "signs", signs)
    return network


def _turn(layer: nn.Module, form: int, name: str, value: Any) -> None:
    """Gives a layer another class. Nothing that refers to it notices: parents, optimizers, hooks."""
    layer.__class__ = _FORMS[type(layer)][form]
    setattr(layer, name, value)


def _check_network(where: str, network: Any) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(network).__name__}")
    if any(is_compiled(module) for module in network.modules()):
        raise TypeError(f"{where}: the network is compiled already; convert it before torch.compile")


def _check_layer(where: str, name: str, layer: nn.Module) -> None:
    if type(layer) not in _FORMS:
        converted = any(type(layer) in forms for forms in _FORMS.values())
        raise TypeError(
            f"{where}: {name!r} is {type(layer).__name__}, but only nn.Conv2d and nn.Linear themselves "
            "can be converted; " + (
                "it has been converted already" if converted else
                "a subclass may compute something else. Convert before you parametrize or shard"))


def _blocks_of(network: nn.Module, runs: Sequence[Sequence[str]]) -> list[list[nn.Module]]:
    """Returns the blocks of each run."""
    known = dict(network.named_modules())
    del known[""]
    seen: set[str] = set()
    for name in (name for run in runs for name in run):
        if name not in known:
            raise UnknownNameError(
                f"{_RESIDUAL}: the network has no module {name!r}{nearest(name, known)}")
        if name in seen:
            raise ValueError(
                f"{_RESIDUAL}: block {name!r} is in two places of runs; a block belongs to one run")
        seen.add(name)
    if not runs or not all(runs):
        raise ValueError(f"{_RESIDUAL}: expected runs of at least one block, got {list(runs)!r}")
    return [[known[name] for name in run] for run in runs]


def _layers_of(
        runs: list[list[nn.Module]], layers: LayersOf) -> list[list[list[nn.Module]]]:
    """Returns, for each block of each run, the layers that read the block's input."""
    if callable(layers):
        found = [[list(layers(block)) for block in run] for run in runs]
    else:
        if isinstance(layers, str):
            raise TypeError(f"{_RESIDUAL}: layers must be a list of names, got {layers!r}")
        parts = [[dict(block.named_modules()) for block in run] for run in runs]
        for name in layers:
            known = {key for run in parts for block in run for key in block}
            if name not in known:
                raise UnknownNameError(
                    f"{_RESIDUAL}: no block has a layer {name!r}{nearest(name, known)}")
        found = [[[block[n] for n in layers if n in block] for block in run] for run in parts]
    if not all(block for run in found for block in run):
        raise ValueError(
            f"{_RESIDUAL}: a block has no layer to convert; pass layers=, the names of the layers that "
            "read the input of their block")
    return found
