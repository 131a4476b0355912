"""Less than one bit per element: bytes, bias and noise of the gradient of a small EfficientNetV2.

    python examples/studies/average_quantization.py [--seeds 20] [--size 32] [--markdown]

The study uses an untrained network, smooth random images, buckets of 256 and bfloat16 metadata. For each
parameter, g is the exact gradient, m is the mean of the rounded gradients over the seeds, and V is their
total variance. The table prints medians over the weights of convolutions and linear layers, since the
gradient of such a weight is a product with an averaged input:

    cosine = <m, g> / (|m| |g|), share = <m, g> / |g|^2: 1 if the gradient is unbiased,
    noise  = sqrt(V) / |g| / share,
    bias   = sqrt(max(|m - g|^2 - V / seeds, 0)) / |g|.

Two more columns give the median bias over all other parameters, and the largest bias of all parameters.

"norms averaged" does what the op-aware policy avoids, to show why it does so. Takes a minute on one
core.
"""

import argparse
from statistics import median
from typing import Any

import torch
from gradient_quality import Result, Ways, measure
from rich.progress import track
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import Codec, OpAware, SavedTensor, quant
from brevitas_bp.backward.saved import Decision
from brevitas_bp.models import efficientnet_v2_tiny

TITLES = [
    "stored as", "KiB", "ratio", "cosine", "share", "noise", "bias", "bias elsewhere", "largest bias"]
BATCH = 16


class NormsAveraged:
    """The op-aware policy, except that the inputs of norms are averaged too."""

    def __init__(self) -> None:
        self.policy = OpAware()

    def __call__(self, saved: SavedTensor) -> Codec | None:
        return self.decide(saved).codec

    def decide(self, saved: SavedTensor) -> Decision:
        decision = self.policy.decide(saved)
        return decision._replace(codec=saved.codec) if decision.reach == "norm" else decision

    def rewrite(self, function: Any) -> Any:
        return self.policy.rewrite(function)


class Averages(quant.GroupAverage, quant.RotatedNormal2DynamicActPerBucketFloat):
    """Two rotated bits for each mean of ``average_size`` neighbours."""


def averages(size: int) -> Any:
    """Returns the 2-bit quantizer of means of ``size`` neighbours."""
    return Averages.let(average_size=size)


#: Way of storing -> options of the wrapper. "1 bit" stores norms in 2 bits, as the averages do.
WAYS: Ways = {
    "2 bits": {},
    "1 bit, all": {"bit_width": 1},
    "1 bit": {"bit_width": 1, "policy": OpAware(norm_bits=2)},
    "1 bit (means of 2)": {"act_quant": averages(2)},
    "0.5 bits (means of 4)": {"act_quant": averages(4)},
    "0.25 bits (means of 8)": {"act_quant": averages(8)},
    "1 bit, norms averaged": {"act_quant": averages(2), "policy": NormsAveraged()},
    "0.5 bits, norms averaged": {"act_quant": averages(4), "policy": NormsAveraged()},
    "0.25 bits, norms averaged": {"act_quant": averages(8), "policy": NormsAveraged()},
}


def network(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a small EfficientNetV2, images without sharp edges, and labels."""
    coarse = torch.randn(BATCH, 3, size // 4, size // 4)
    images = F.interpolate(coarse, scale_factor=4, mode="bicubic")
    return efficientnet_v2_tiny(), images, torch.randint(10, (BATCH,))


def row(result: Result, weights: set[str]) -> list[str]:
    """Returns the cells of one way of storing."""
    of_weights = [i for i, n in enumerate(result.parameters) if n in weights]
    elsewhere = [b for n, b in zip(result.parameters, result.bias) if n not in weights]
    medians = [
        median(values[i] for i in of_weights)
        for values in (cosines(result), result.signal, result.per_signal, result.bias)]
    return [
        result.way, f"{result.stored_bytes / 1024:.0f}", f"{result.ratio:.2f}",
        *(f"{m:.3f}" for m in medians), f"{median(elsewhere):.3f}", f"{max(result.bias):.3f}"]


def cosines(result: Result) -> list[float]:
    """Returns cosines between mean and exact gradients, without the noise of finitely many seeds."""
    # |m|^2 / |g|^2 = bias^2 + 2 share - 1, and at least share^2.
    return [
        s / max(b * b + 2 * s - 1, s * s, 1e-12) ** 0.5 for s, b in zip(result.signal, result.bias)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels, a multiple of 4")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    name = "efficientnet_v2_tiny"
    weights = {n for n, p in efficientnet_v2_tiny().named_parameters() if p.dim() > 1}
    cells = [
        row(measure(name, way, options.seeds, {name: lambda: network(options.size)}, WAYS), weights)
        for way in track(list(WAYS), "ways")]
    show_table(TITLES, cells, options.markdown)


if __name__ == "__main__":
    main()
