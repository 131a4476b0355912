"""Time to store one tensor of 4 KiB: by the codec alone, and by the hooks of a wrapped module."""

from functools import partial
from typing import Any

import torch
from codec_rates import TWO_BITS
from timing import best_of, interleaved
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.codec.regions import relu_region


class Products(nn.Module):
    """Multiplies by one tensor after another; each product saves one tensor and nothing else."""

    def forward(self, x: Tensor, factors: list[Tensor]) -> Tensor:
        for factor in factors:
            x = x * factor
        return x


def overheads(numel: int = 1024, products: int = 200, rounds: int = 30) -> list[dict[str, Any]]:
    """Measures microseconds per saved tensor.

    A row of hooks is the time added to plain autograd in forward and backward, divided by the number of
    products.
    """
    x = torch.randn(numel)
    rows = []
    for name, codec in (("2 bits", codec_from(TWO_BITS)), ("ReLU mask", relu_region())):
        packed = codec.encode(x, seed=1)
        there = best_of(lambda codec=codec: codec.encode(x, seed=1), rounds / 100, calls=100)
        back = best_of(packed.decode, rounds / 100, calls=100)
        rows.append(_row(f"codec alone, {name}", there + back, there, back))
    return rows + _in_hooks(numel, products, rounds)


def _in_hooks(numel: int, products: int, rounds: int) -> list[dict[str, Any]]:
    chain = Products()
    factors = [torch.rand(numel) + 0.5 for _ in range(products)]
    start = torch.ones(numel, requires_grad=True)
    models = {
        "plain": chain, "exact policy": QuantBackwardWrapper(chain, policy="exact"),
        # This policy stores factors with two bits more than the quantizer says.
        "op-aware policy": QuantBackwardWrapper(chain, TWO_BITS),
        "policy all": QuantBackwardWrapper(chain, TWO_BITS, policy="all")}
    for key in ("op-aware policy", "policy all"):
        _check_all_stored(models[key], start, factors)

    def both_ways(model: nn.Module) -> None:
        model(start, factors).sum().backward()

    def forward(model: nn.Module) -> Tensor:
        return model(start, factors)

    total = interleaved({key: partial(both_ways, model) for key, model in models.items()}, rounds)
    there = interleaved({key: partial(forward, model) for key, model in models.items()}, rounds)
    rows = [_row("plain autograd, one product", total["plain"] / products, there["plain"] / products,
                 (total["plain"] - there["plain"]) / products)]
    for key in list(models)[1:]:
        added = (total[key] - total["plain"]) / products
        added_there = (there[key] - there["plain"]) / products
        rows.append(_row(f"added by hooks, {key}", added, added_there, added - added_there))
    return rows


def _check_all_stored(model: nn.Module, start: Tensor, factors: list[Tensor]) -> None:
    """Raises RuntimeError unless each factor is encoded once and nothing else is encoded."""
    with track_saved_memory(model) as report:
        held = model(start, factors)
    del held
    if report.tensors != len(factors) or report.ratio < 4:
        raise RuntimeError(f"examples/benchmarks/small_tensors.py: not all were quantized\n{report}")


def _row(what: str, both: float, there: float, back: float) -> dict[str, Any]:
    return {"what": what, "us": both * 1e6, "forward, us": there * 1e6, "backward, us": back * 1e6}
