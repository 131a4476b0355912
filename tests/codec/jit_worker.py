"""Quantizes one tensor with several configs. test_jit.py runs it with and without BREVITAS_JIT=1."""

import sys
from typing import Any

import brevitas.quant
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor, nn

from brevitas_bp import codec_from, quant, seeded
from brevitas_bp.quant import ActQuantSolver, PerBucketMax, StochasticRounding


class Percentile(nn.Module):
    """A custom component of a user."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().quantile(0.9, dim=-1, keepdim=True)


class Own(StochasticRounding, PerBucketMax, ActQuantSolver):
    bit_width = 4
    scaling_stats_impl = Percentile


class StochasticInt8(StochasticRounding, brevitas.quant.Int8ActPerTensorFloat):
    pass


class StochasticFp8(StochasticRounding, brevitas.quant.Fp8e4m3ActPerTensorFloat):
    pass


class StochasticMXInt8(StochasticRounding, brevitas.quant.MXInt8Act):
    group_dim = 1


CONFIGS: dict[str, Any] = {
    "nearest": quant.ShiftedUint2DynamicActPerBucketFloat,
    "stochastic": quant.ShiftedUint2DynamicActPerBucketFloatStochastic,
    "norm": quant.Int4DynamicActPerBucketFloatL2Stochastic,
    "whole tensor": quant.Int4DynamicActPerTensorFloat,
    "mixed": quant.ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    "averages": quant.ShiftedUint2Avg4DynamicActPerBucketFloatStochastic,
    "rotated": quant.RotatedNormal2DynamicActPerBucketFloat,
    "rotated, two widths": quant.RotatedNormal1Mix4DynamicActPerBucketFloat,
    "rotated, dithered": quant.RotatedUint2DynamicActPerBucketFloatDithered,
    "dithered": quant.ShiftedUint4DynamicActPerBucketFloatDithered,
    "thesis": quant.ThesisLevels4DynamicActPerBucketFloatStochastic,
    "thesis baseline": quant.ThesisInt2DynamicActPerTensorFloat,
    "own part": Own,
    "deterministic inference": quant.ShiftedUint2DynamicActPerBucketFloatStochastic.let(
        deterministic_inference=True),
    "stock integers": brevitas.quant.Int8ActPerTensorFloat,
    "stock integers, stochastic": StochasticInt8,
    "stock minifloats, stochastic": StochasticFp8,
    "stock groups, stochastic": StochasticMXInt8}


def results() -> dict[str, dict[str, Any]]:
    """Returns forward value, gradient and packed tensors of every config."""
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    out = {}
    for name, config in CONFIGS.items():
        layer, codec = QuantIdentity(config, return_quant_tensor=False), codec_from(config)
        leaf = x.clone().requires_grad_()
        with seeded(3):
            value = layer(leaf)
        value.sum().backward()
        packed = codec.encode(x, seed=3)
        out[name] = {
            "value": value.detach(), "gradient": leaf.grad, "decoded": packed.decode(),
            "bytes": packed.tensors}
    return out


if __name__ == "__main__":
    torch.save({"jit": bool(brevitas.config.JIT_ENABLED), "results": results()}, sys.argv[1])
