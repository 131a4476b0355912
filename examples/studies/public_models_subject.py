"""A published model with suitable inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

#: Arguments of a forward pass, by name or by position.
Arguments = dict[str, Any] | tuple[Any, ...]


class Unmeasured(Exception):  # noqa: N818 - a result, not an error
    """The reason why a model has no figures."""

    def __init__(self, status: str, detail: str = "") -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail[:400]


@dataclass(frozen=True)
class Subject:
    """A module in training mode, with suitable inputs.

    Attributes:
        module: the module.
        inputs: its inputs.
        autocast: whether it runs under autocast to bfloat16.
    """

    module: nn.Module
    inputs: Arguments
    autocast: bool = False

    def call(self, model: nn.Module) -> Any:
        """Runs a model on copies of the inputs, since forward may change them."""
        inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    @property
    def shapes(self) -> str:
        """Describes the shapes of the inputs."""
        named = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs)
        return ", ".join(
            f"{name} {'x'.join(map(str, leaf.shape))}" for name, value in named
            for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def differentiable(output: Any) -> list[Tensor]:
    """Returns every tensor of an output that can go into a loss, each once."""
    leaves = {id(leaf): leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
    return [leaf for leaf in leaves.values() if leaf.requires_grad]


def first_that_runs(
        module: nn.Module, candidates: Iterable[Arguments]) -> Subject:
    """Returns the first inputs that give an output with a gradient.

    Raises:
        Unmeasured: no inputs do.
    """
    status, reasons = "no inputs fit", []
    for inputs in candidates:
        subject = Subject(module.train(), inputs)
        try:
            if differentiable(subject.call(module)):
                return subject
            status = "no gradient"
            reasons.append("no output needs a gradient")
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}"[:150])
    raise Unmeasured(status, " | ".join(dict.fromkeys(reasons)))


@torch.no_grad()
def move_constants(module: nn.Module, std: float) -> None:
    """Adds noise to parameters that start constant: norms, biases, layer scales, zero-initialized heads.

    A factor that starts at zero would hide the gradient of everything before it.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))


def finish(
        make: Callable[[], nn.Module],
        candidates: Callable[[nn.Module], Iterable[Arguments]],
        most_parameters: int, std: float) -> Subject:
    """Builds a model if it is small enough, and finds inputs for it.

    Raises:
        Unmeasured: the model is too large, or accepts none of the inputs.
    """
    with torch.device("meta"):
        number = sum(p.numel() for p in make().parameters())
    if number > most_parameters:
        raise Unmeasured("too large", f"{number / 1e6:.0f} million parameters")
    module = make().float()
    move_constants(module, std)
    return first_that_runs(module, candidates(module))
