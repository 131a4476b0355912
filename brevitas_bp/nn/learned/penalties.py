"""Penalties that move learned scales: terms to add to a loss.

Each is the mean of a function f(P, s) over all learned tensors, weighted by their numbers of elements::

    penalty = gamma * sum_t n_t f(P_t, s_t) / sum_t n_t

Learn the tensors with ``lam=None``, so that their scales get no other gradient.

Source: Chinbat, "Learned Quantization Schemes for Data-centric ML Pipelines", 2025.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from brevitas_bp.nn.learned.tensors import LearnedTensor, learned_tensors


class Penalty(ABC):
    """Base of the penalties. ``loss = loss + MaxBin(gamma=1e-8)(model)``.

    Args:
        gamma: weight of the penalty, >= 0.

    Raises:
        TypeError: gamma is no number.
        ValueError: gamma is negative or not finite.
    """

    def __init__(self, gamma: float) -> None:
        where = f"brevitas_bp.nn.learned.{type(self).__name__}"
        if isinstance(gamma, bool) or not isinstance(gamma, int | float):
            raise TypeError(
                f"{where}: gamma must be a number >= 0, got {gamma!r} ({type(gamma).__name__}); call it "
                f"as {type(self).__name__}(gamma=1e-8)(model)")
        if not 0 <= gamma < math.inf:
            raise ValueError(
                f"{where}: gamma must be >= 0 and finite, got {gamma!r}; 0 switches the penalty off")
        self.gamma = float(gamma)

    def __call__(self, model: nn.Module) -> Tensor:
        """Computes the penalty of ``model`` [0-d, float32 or float64], differentiable.

        Raises:
            ValueError: the model has no learned tensors.
        """
        tensors = learned_tensors(f"brevitas_bp.nn.learned.{type(self).__name__}", model)
        sizes = [tensor.parameter.numel() for tensor in tensors]
        terms = [n * self.of(*_wide(tensor)) for n, tensor in zip(sizes, tensors)]
        return self.gamma * torch.stack(terms).sum() / sum(sizes)

    @abstractmethod
    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        """Computes f for one tensor.

        Args:
            x: parameter P, any shape.
            scale: 0-d, or as many dimensions as ``x``, with size 1 along all but one.

        Returns:
            f [0-d].
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma:g})"


def _wide(tensor: LearnedTensor) -> tuple[Tensor, Tensor]:
    """Returns parameter and scale in at least float32: 1 / s**2 overflows in float16."""
    x, scale = tensor.parameter, tensor.scale
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    return x.to(dtype), scale.to(dtype)


class MaxBin(Penalty):
    """Mean over scales of ``max_i |P_i| / s_k``: the number of bins that a group reaches.

    It makes scales larger, and the largest parameter of each group smaller.

    >>> x = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
    >>> MaxBin(gamma=1).of(x, torch.tensor(0.25))
    tensor(4.8000)
    """

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        single = scale.dim() == 0
        dims = [d for d in range(x.dim()) if single or scale.shape[d] == 1]
        return (x.abs().amax(dims, keepdim=not single) / scale).mean()


class InverseScale(Penalty):
    """Mean over scales of ``1 / s_k``. It makes scales larger and leaves parameters alone.

    It does not know how large the parameters are: a scale may grow beyond all of them.

    >>> InverseScale(gamma=1).of(torch.tensor([.5, -.3]), torch.tensor(0.25))
    tensor(4.)
    """

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale.reciprocal().mean()


class Difference(Penalty):
    """Mean of ``|P_i - P_i / s_i|``, which is ``mean|P| * |1 - 1 / s|`` for one scale.

    It is smallest **at s = 1**: scales below 1 grow, scales above 1 shrink. It also makes parameters
    smaller. It is no quantization error: see :class:`Deviation`.

    >>> x = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
    >>> Difference(gamma=1).of(x, torch.tensor(0.25))
    tensor(1.8000)
    """

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x - x / scale).abs().mean()


class Deviation(Penalty):
    """Mean of ``|P_i - s_i floor(P_i / s_i)|``: what quantization takes away. Not in the thesis.

    With the integers held fixed, the gradient of s is ``-mean(floor(P / s))``. Over a group that is
    symmetric about 0 the integers have a mean of -1/2. So scales become **smaller**: this term balances
    the other ones, and alone it keeps scales at their smallest. The gradient of each P_i is ``1 / n``,
    which moves all parameters of a tensor down alike.

    >>> x = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
    >>> Deviation(gamma=1).of(x, torch.tensor(0.25))
    tensor(0.1167)
    """

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            integers = torch.floor(x / scale)
        return (x - scale * integers).abs().mean()
