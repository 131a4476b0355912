"""The learning indicator: whether an auxiliary activation gives useful gradients."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.nn.auxiliary.residual import AuxiliaryResidualConv2d, AuxiliaryResidualLinear
from brevitas_bp.nn.auxiliary.sign import AuxiliarySignConv2d, AuxiliarySignLinear
from brevitas_bp.text import table

_LAYERS = (
    AuxiliaryResidualConv2d, AuxiliaryResidualLinear, AuxiliarySignConv2d, AuxiliarySignLinear)


def learning_indicator(x: Tensor, a: Tensor, dims: int = 1) -> Tensor:
    """Returns how well ``a`` stands for the layer input ``x`` in the gradient of the weight.

    ``LI = <a, 2 x - a> / |x|^2 = 1 - |x - a|^2 / |x|^2``, over the last ``dims`` dimensions.

    It is 1 if ``a`` is ``x``, and at most 1. Above 0, an update of the weight moves the output in a
    direction in which the loss falls. ``x`` is the input that enters the layer, with all that is added
    to it. Computed in float32, or in float64 for float64 tensors. A row ``x = 0`` gives 1 if ``a`` is 0
    there too, and otherwise -inf; NaN gives NaN. The authors add 1e-6 to the denominator, which would
    make small inputs look unreliable.

    Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training", 2023.

    Args:
        x: input of the layer, [..., features]; for a convolution [N, C, H, W].
        a: auxiliary activation, same shape.
        dims: 1 for a linear layer, so one number for each token; 3 for a convolution, so one for each
            image.

    Raises:
        ValueError: the shapes differ, or have fewer than ``dims`` dimensions.

    >>> x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    >>> learning_indicator(x, torch.tensor([[3.0, 4.0], [3.0, 0.0]])).tolist()
    [1.0, 0.36000001430511475]
    """
    if x.shape != a.shape or not 1 <= dims <= x.dim():
        raise ValueError(
            f"brevitas_bp.nn.learning_indicator: x and a must have one shape with at least {dims} "
            f"dimensions, got {list(x.shape)} and {list(a.shape)}; dims is 1 for linear layers and 3 "
            "for convolutions")
    dtype = torch.promote_types(x.dtype, torch.float32)
    over = tuple(range(-dims, 0))
    x, a = x.detach().to(dtype), a.detach().to(dtype)
    missed, size = (x - a).square().sum(over), x.square().sum(over)
    nothing = torch.where(missed == 0, 1.0, -torch.inf).to(dtype)
    return torch.where(size == 0, nothing, 1 - missed / size)


class LearningIndicators(dict[str, Tensor]):
    """Name of a layer -> its learning indicators, one for each image or token; prints as a table."""

    def __str__(self) -> str:
        lines = [("layer", "values", "mean", "least", "share above 0")]
        for name, values in self.items():
            least = values.min() if values.numel() else values.mean()
            mean, least, above = (
                f"{float(f):.3f}" for f in (values.mean(), least, (values > 0).double().mean()))
            lines.append((name or "(root)", str(values.numel()), mean, least, above))
        return table(lines, left=1)


@contextmanager
def watch_learning_indicators(network: nn.Module) -> Iterator[LearningIndicators]:
    """Records the learning indicators of all auxiliary layers while forward passes run in the block.

    Later passes add to the values of earlier ones. Run the passes with gradients enabled: without them,
    runs hold no auxiliary activation. Outputs and gradients are the same as without it. It computes with
    the exact activation, before any codec rounds it.

    Args:
        network: contains auxiliary layers.

    Yields:
        Layer name -> values, in the order in which layers first ran, on the device of the layer.

    Raises:
        ValueError: the network has no auxiliary layer.

    Example:
        >>> net = nn.Sequential(nn.Tanh(), AuxiliarySignLinear(4, 2, epsilon=1.0))
        >>> with watch_learning_indicators(net) as found:
        ...     y = net(torch.randn(5, 4))
        >>> found["1"].shape, bool((found["1"] > 0).all())
        (torch.Size([5]), True)
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, _LAYERS)}
    if not layers:
        raise ValueError(
            f"brevitas_bp.nn.watch_learning_indicators: {type(network).__name__} contains no auxiliary "
            "layer; convert it first, for instance with convert_to_auxiliary_residual")
    found = LearningIndicators()
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(_Watch(name, found), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


class _Watch:
    """A forward pre-hook that notes the learning indicators of one layer."""

    def __init__(self, name: str, found: LearningIndicators) -> None:
        self.name = name
        self.found = found

    @torch.no_grad()
    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if isinstance(layer, (AuxiliaryResidualConv2d, AuxiliaryResidualLinear)):
            a = layer.run.auxiliary_for(x, type(layer).__name__)
        else:
            x, a = layer.signs.added_to(x), layer.signs.of(x)
        dims = 3 if isinstance(layer, nn.Conv2d) else 1
        values = learning_indicator(x, a, dims).reshape(-1)
        before = self.found.get(self.name)
        self.found[self.name] = values if before is None else torch.cat((before, values))
