"""Stochastic rounding and subtractive dither."""

import torch
from brevitas.function.ops_ste import floor_ste, round_ste
from torch import Tensor, nn

import brevitas_bp.format.random  # noqa: F401  (registers the operator)
from brevitas_bp.format.stages import DITHERED, STOCHASTIC, Rounding


class StochasticRound(nn.Module):
    """Rounds up with the probability of the fractional part. Fills ``float_to_int_impl``.

    ``q = floor(u) + (noise < u - floor(u))`` with ``noise`` uniform in [0, 1). ``E[q] = u`` up to
    2**-24, and integers stay as they are. NaN and Inf pass through. The gradient is that of the identity
    (straight-through estimator).

    The noise is float32 for every input dtype, because 16-bit uniforms bias the rounding. Each call
    draws a new seed. Within :func:`brevitas_bp.seeded`, the seed is derived from the given seed.
    Otherwise it comes from torch's global generator, so ``torch.manual_seed`` and checkpointing govern
    the noise as they govern dropout.

    The module differs from Brevitas' ``StochasticRoundSte``:

    * Two modules never share their draws, and copies are independent.
    * The module can be pickled and scripted.
    * ``eval()`` changes nothing unless asked to.

    Args:
        deterministic_inference: rounds to nearest in ``eval()``. Off by default: a frozen module that
            is still differentiated needs unbiased gradients.

    >>> bool((StochasticRound()(torch.full((1000,), 0.25)).mean() - 0.25).abs() < 0.1)
    True
    """

    bucketwise = True

    def __init__(self, deterministic_inference: bool = False) -> None:
        super().__init__()
        self.deterministic_inference = deterministic_inference

    def bucket_stage(self, slot: str) -> Rounding | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return STOCHASTIC if slot == "float_to_int_impl" and not self.deterministic_inference else None

    def forward(self, x: Tensor) -> Tensor:
        """Rounds ``x`` [any shape] to integers of the same dtype."""
        if self.deterministic_inference and not self.training:
            return round_ste(x)
        floor = floor_ste(x)
        fraction = x.detach() - floor.detach()
        return floor + (torch.ops.brevitas_bp.noise_like(x) < fraction).to(x.dtype)


class DitheredRound(nn.Module):
    """Subtractive dither: decoding subtracts the noise that encoding adds. Fills ``float_to_int_impl``.

    ``q = floor(u + noise)`` is decoded as ``q + 1/2 - noise``. The error is uniform within half a step,
    whatever ``u`` is. So its mean is zero, and its variance is 1/12 of a squared step. Stochastic
    rounding has ``a (1 - a)`` squared steps for the fractional part ``a``: 1/6 on average, and nothing
    if ``u`` is an integer. Values on the grid, for instance zeros and ones, are better off with
    :class:`StochasticRound`.

    Source: Roberts, "Picture coding using pseudo-random noise", 1962.

    >>> rounding, u = DitheredRound(), torch.full((1000,), 0.25)
    >>> noise = rounding.draw(u)
    >>> error = rounding.restore(rounding(u, noise), noise) - u
    >>> bool(error.abs().max() <= 0.5), bool(error.mean().abs() < 0.1)
    (True, True)
    """

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> Rounding | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return DITHERED if slot == "float_to_int_impl" else None

    def draw(self, u: Tensor) -> Tensor:
        """Draws the noise for ``u``: float32 in [0, 1), in the same shape."""
        return torch.ops.brevitas_bp.noise_like(u.detach())

    def forward(self, u: Tensor, noise: Tensor) -> Tensor:
        """Rounds ``u`` to integers of the same dtype."""
        return floor_ste(u + noise.to(u.dtype))

    def restore(self, codes: Tensor, noise: Tensor) -> Tensor:
        """Returns what the codes stand for, in steps."""
        return codes + 0.5 - noise.to(codes.dtype)
