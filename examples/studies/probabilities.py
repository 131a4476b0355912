"""Measures codes for probabilities: error and bias of gradients of softmax and of a cross entropy.

    python examples/studies/probabilities.py [--seeds 200] [--markdown]

Logits are normal, times "spread". The error is ``|g~ - g| / |g|`` for one draw, the bias is
``|m - g| / |g|`` for the mean ``m`` over the seeds, less the part that is there by chance.

* Softmax saves its probabilities, and the table compares kinds of code with 4 bits.
* A cross entropy is measured at 2, 3 and 4 bits. "Confident" adds a number to the logit of the target.
  It is compared with ``log_softmax`` and ``nll_loss`` called apart, which cannot know the targets when
  the probabilities are stored.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SavedTensor
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision

ROWS = 256
KINDS = ("stochastic", "dithered", "companded")


class Kind(OpAware):
    """Stores probabilities in a kind of code."""

    kind = "companded"

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        if not decision.probabilities or decision.codec is None or self.kind == "companded":
            return decision
        return decision._replace(codec=decision.codec.of_kind(self.kind))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def measure(
        function: Callable[[Tensor], Tensor], z: Tensor, policy: Any, seeds: int) -> tuple[float, float]:
    """Returns error and bias of the gradient of ``z``."""
    z = z.detach().requires_grad_()
    cotangent = torch.randn(function(z).shape, generator=torch.Generator().manual_seed(2))

    def gradient(seed: int, policy: Any) -> Tensor:
        model = QuantBackwardWrapper(
            Function(function), policy=policy, seed=seed, bucket_size=256,
            metadata_dtype=torch.bfloat16)
        return torch.autograd.grad(model(z), z, cotangent)[0].double()

    exact = gradient(0, "exact")
    mean, squares = torch.zeros_like(exact), 0.0
    for seed in range(seeds):
        drawn = gradient(seed, policy)
        mean += drawn / seeds
        squares += float((drawn - exact).square().sum()) / seeds
    off = float((mean - exact).square().sum())
    by_chance = (squares - off) / max(seeds - 1, 1)
    size = float(exact.norm())
    return squares**0.5 / size, max(off - by_chance, 0.0)**0.5 / size


def logits(classes: int, spread: float) -> Tensor:
    """Returns normal logits."""
    return spread * torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(1))


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    lines = []
    for classes in (64, 256, 1024):
        for spread in (0.3, 1, 3, 8):
            line = [str(classes), f"{spread:g}"]
            for kind in KINDS:
                policy = type(f"Kind_{kind}", (Kind,), {"kind": kind})()
                error, bias = measure(
                    lambda z: torch.softmax(z, -1), logits(classes, spread), policy, options.seeds)
                line += [f"{error:.3f}", f"{bias:.4f}"]
            lines.append(line)
    titles = [f"{kind}, {what}" for kind in KINDS for what in ("error", "bias")]
    show_table(["softmax over", "spread", *titles], lines, options.markdown)
    print()

    lines = []
    targets = torch.randint(0, 64, (ROWS,), generator=torch.Generator().manual_seed(3))
    for classes, confident in ((64, 0), (1024, 0), (64, 4), (64, 8), (64, 16)):
        z = logits(classes, 1)
        z[torch.arange(ROWS), targets] += confident
        line = [str(classes), f"{confident:g}"]
        for bits in (2, 3, 4):
            # Errors of classes get one bit fewer than factors.
            policy = replace(OpAware(), multiplier_bits=bits + 1)
            error, bias = measure(lambda z: F.cross_entropy(z, targets), z, policy, options.seeds)
            line += [f"{error:.3f}", f"{bias:.4f}"]
        apart, _ = measure(
            lambda z: F.nll_loss(F.log_softmax(z, -1), targets), z, OpAware(), options.seeds)
        lines.append([*line, f"{apart:.3f}"])
    titles = [f"{bits} bits, {what}" for bits in (2, 3, 4) for what in ("error", "bias")]
    show_table(
        ["cross entropy over", "confident", *titles, "called apart, 4 bits: error"], lines,
        options.markdown)


if __name__ == "__main__":
    main()
