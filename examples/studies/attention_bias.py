"""Measures the bias of gradients when query and key of attention are rounded and all else is exact.

    python examples/studies/attention_bias.py [--seeds 500] [--markdown]

Backward runs attention again from the rounded query and key, so the weights of attention are slightly
off. Gradients are not linear in them, and so are biased. The networks are the GPT and the ViT of
``gradient_quality.py``:

* as they are initialized,
* trained until they know one batch by heart, so that attention is sharp,
* with the projections of query and key doubled after the training, so that scores are four times larger.

For each parameter, bias is ``|m - g| / |g|``, less the part that is there by chance, and noise is
``sqrt(V) / |g|``. g is the exact gradient, m is the mean of the rounded gradients, and V is their total
variance.
"""

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gradient_quality import prepare, wrap
from tables import show_table
from torch import Tensor, nn

from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import ATTENTION_INPUT, Decision, SavedTensor
from brevitas_bp.quant import (
    RotatedNormal4DynamicActPerBucketFloat,
    RotatedNormal8DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloatDithered,
    ShiftedUint8DynamicActPerBucketFloatStochastic,
)

QUANTIZERS: dict[str, Any] = {
    "stochastic, 8 bits": ShiftedUint8DynamicActPerBucketFloatStochastic,
    "dithered, 8 bits": ShiftedUint8DynamicActPerBucketFloatDithered,
    "rotated, 8 bits": RotatedNormal8DynamicActPerBucketFloat,
    "stochastic, 4 bits": ShiftedUint4DynamicActPerBucketFloatStochastic,
    "rotated, 4 bits": RotatedNormal4DynamicActPerBucketFloat}

Run = Callable[[nn.Module], Tensor]


class AttentionAlone(OpAware):
    """Rounds query and key, and nothing else."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        return decision if saved.role == ATTENTION_INPUT else decision._replace(codec=None)


def trained(model: nn.Module, run: Run, steps: int) -> tuple[nn.Module, float]:
    """Returns the network after training on its batch, and the loss."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(model)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, float(loss.detach())


def sharpened(model: nn.Module) -> nn.Module:
    """Returns the network with the weights that project query and key doubled."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "qkv" in name or "in_proj" in name:
            with torch.no_grad():
                parameter[:2 * parameter.shape[0] // 3] *= 2
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="gpt,vit")
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    titles = [
        "network", "query and key", "bias: median", "bias: largest", "noise: median", "noise: largest"]
    cells = []
    for name in options.models.split(","):
        start, _, run = prepare(name)
        after, loss = trained(start, run, options.steps)
        networks = {
            name: start, f"{name}, trained to a loss of {loss:.2g}": after,
            f"{name}, trained, scores four times larger": sharpened(after)}
        for title, network in networks.items():
            for way, quantizer in QUANTIZERS.items():
                policy = AttentionAlone(attention_quant=quantizer)
                error = measure_gradient_error(
                    wrap(copy.deepcopy(network), policy=policy), run, draws=options.seeds)
                rows = [row for row in error.parameters if not row.negligible]
                bias, noise = [row.bias for row in rows], [row.noise for row in rows]
                cells.append([title, way, *(
                    f"{value:.5f}" for value in (median(bias), max(bias), median(noise), max(noise)))])
                print(*cells[-1], sep=" | ", flush=True)
    show_table(titles, cells, options.markdown, width=150)


if __name__ == "__main__":
    main()
