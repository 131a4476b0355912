"""Variance of quantizers of gradients, on four kinds of matrices, and the time that they take.

    python examples/studies/gradient_quantizers.py [--bits 5] [--draws 400] [--markdown]

The matrices have 64 rows (samples) of 128 normal values, scaled row by row. The variance is the sum over
all elements, in the units of the matrix. "Bias" is the squared distance of the mean of all draws, over
what an unbiased quantizer leaves by chance: 1 on average. Time is that of a gradient of 128 x 16,384,
relative to a copy of it. Takes a minute on one core.

Source of the matrices: Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural
Networks", 2020.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from brevitas.nn import QuantIdentity
from tables import show_table
from torch import Tensor

from brevitas_bp import quant
from brevitas_bp.grad.quantizer import GradientQuantizer


class HouseholderRotated(
        quant.HouseholderRows, quant.RotatedBuckets, quant.PerBucketNormal, quant.ActQuantSolver):
    """BHQ, then a random rotation of each bucket, with the levels of a normal distribution."""

    bucket_size = 128


ROWS = 64
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PTQ": (quant.ShiftedUint8DynamicGradPerTensorFloatStochastic, {}),
    "PTQ, zero anywhere": (quant.ShiftedUint8DynamicActPerTensorFloatStochastic, {}),
    "PSQ": (quant.ShiftedUint8DynamicGradPerRowFloatStochastic, {}),
    "BHQ": (quant.HouseholderUint8DynamicGradPerRowFloatStochastic, {}),
    "BHQ, dithered": (quant.HouseholderUint8DynamicGradPerRowFloatDithered, {}),
    "rotated": (quant.RotatedNormal8DynamicActPerBucketFloat, {"bucket_size": 128}),
    "BHQ and rotated": (HouseholderRotated, {}),
}
SCALES = {
    "equal rows": torch.ones(ROWS),
    "lognormal rows": (2 * torch.randn(ROWS, generator=torch.Generator().manual_seed(1))).exp(),
    "one large row": torch.tensor([100.0] + [0.01] * (ROWS - 1)),
    "four large rows": torch.tensor([10.0] * 4 + [0.05] * (ROWS - 4)),
}


def rounding(name: str, bits: int) -> GradientQuantizer:
    config, settings = WAYS[name]
    layer: Any = QuantIdentity(act_quant=config, bit_width=bits, **settings)
    return GradientQuantizer(layer.act_quant.fused_activation_quant_proxy.tensor_quant, name)


def variance_and_bias(quantizer: GradientQuantizer, x: Tensor, draws: int) -> tuple[float, float]:
    mean, variance = torch.zeros_like(x, dtype=torch.float64), 0.0
    for seed in range(draws):
        error = quantizer(x, seed).double() - x
        mean += error / draws
        variance += float(error.square().sum()) / draws
    return variance, float(mean.square().sum()) * draws / variance


def relative_time(quantizer: GradientQuantizer, rounds: int = 7) -> float:
    """Returns the median time of a rounding over that of a copy, taken in turns."""
    x = torch.randn(128, 16384)
    ours, copies = [], []
    for i in range(rounds + 1):
        start = time.perf_counter()
        quantizer(x, i)
        middle = time.perf_counter()
        x.clone()
        ours.append(middle - start)
        copies.append(time.perf_counter() - middle)
    return statistics.median(ours[1:]) / statistics.median(copies[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    noise = torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(0))
    cells = []
    for name in WAYS:
        quantizer = rounding(name, args.bits)
        found = [
            variance_and_bias(quantizer, noise * scale[:, None], args.draws)
            for scale in SCALES.values()]
        cells.append([
            name, *(f"{variance:.3g}" for variance, _ in found),
            f"{min(b for _, b in found):.2f} to {max(b for _, b in found):.2f}",
            f"{relative_time(quantizer):.1f}"])
    show_table(["", *SCALES, "bias", "time / copy"], cells, args.markdown)


if __name__ == "__main__":
    main()
