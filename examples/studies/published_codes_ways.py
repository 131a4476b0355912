"""The codes that ``published_codes.py`` compares, each in 1, 2 or 4 bits."""

from collections.abc import Callable
from typing import Any

import torch

from brevitas_bp import Codec, OpAware, SavedTensor, codec_from, quant
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec import (
    PerSampleCodec,
    PooledCodec,
    ProjectedCodec,
    RandomKCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.codec.rows import Rows

Stochastic = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
Dithered = quant.ShiftedUint2DynamicActPerBucketFloatDithered
Rotated = quant.RotatedNormal2DynamicActPerBucketFloat
Options = dict[str, Any]


class SignMagnitude(quant.StochasticRounding, quant.SignMagnitude, quant.ActQuantSolver):
    """The stochastic quantizer of Li, 2025, with the bits that it takes, not those of its name."""

    bucket_size = 512


class Averages(quant.GroupAverage, Stochastic):
    """The mean of two neighbours, in twice the bits."""

    average_size = 2


def built(config: Any, bits: int) -> Codec:
    """Returns the codec of a bucket quantizer as all studies configure it."""
    return codec_from(config, bit_width=bits, bucket_size=256, metadata_dtype=torch.bfloat16)


#: How all codes store factors, and query and key.
SAME: Options = {"multiplier_quant": built(Dithered, 4), "attention_quant": built(Dithered, 8)}


class MaskInWindows(OpAware):
    """Stores a ReLU's output with the code of the next convolution, which holds the mask."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        if saved.op not in ("relu", "relu_") or saved.tensor.dim() != 4:
            return decision
        x = saved.tensor
        # The rows of a convolution's input: with equal rows, both operations share one encoding.
        return decision._replace(
            codec=saved.codec, rows=lambda x, call: Rows(x[0].numel(), x.shape[-1])) if (
                x.shape[2] > 1) else decision


#: Code -> bits -> options of the wrapper; None if the code has no such width.
CODES: dict[str, Callable[[int], Options | None]] = {
    "thesis, deterministic": lambda b: {
        "act_quant": codec_from(quant.ThesisInt2DynamicActPerTensorFloat, bit_width=b)},
    "thesis, stochastic": lambda b: None if b == 1 else {
        "act_quant": codec_from(SignMagnitude, bit_width=b, metadata_dtype=torch.bfloat16)},
    "GACT, all alike": lambda b: {"act_quant": built(Stochastic, b), "policy": "all"},
    "ActNN, all alike": lambda b: {"act_quant": per_sample(b), "policy": "all_but_relu"},
    "stochastic (GACT's code)": lambda b: {"act_quant": built(Stochastic, b)},
    "per sample (ActNN's code)": lambda b: {"act_quant": per_sample(b)},
    "AQ, averages of 2": lambda b: {"act_quant": built(Averages, 2 * b)},
    "pooling, 2 x 2": lambda b: {"act_quant": PooledCodec(
        2, inner=built(Stochastic, 4 * b) if b < 4 else None, fallback=built(Rotated, b))},
    "DIVISION, two frequencies": lambda b: {
        "act_quant": TwoFrequencyCodec(b, fallback=built(Rotated, b))},
    "BLPA, windows": lambda b: {
        "act_quant": WindowedCodec(b, fallback=built(Rotated, b)), "policy": MaskInWindows(**SAME)},
    "EXACT, projections to 1/2": lambda b: {
        "act_quant": ProjectedCodec(1 / 2, 2 * b, fallback=built(Rotated, b))},
    "top-k, biased": lambda b: {"act_quant": TopKCodec(b / 24, fallback=built(Rotated, b))},
    "random-k, unbiased": lambda b: {
        "act_quant": RandomKCodec(b / 16, fallback=built(Rotated, b))},
    "few-bit derivatives, rest rotated": lambda b: {
        "act_quant": built(Rotated, b), "policy": OpAware(few_bit=b, **SAME)},
    "dithered": lambda b: {"act_quant": built(Dithered, b)},
    "rotated (default)": lambda b: {"act_quant": built(Rotated, b)}}

#: Codes without bias wherever backward is linear.
UNBIASED = {
    "thesis, stochastic", "stochastic (GACT's code)", "per sample (ActNN's code)",
    "DIVISION, two frequencies", "EXACT, projections to 1/2", "random-k, unbiased", "dithered",
    "rotated (default)"}
#: Network -> codes that no tensor of it takes, or a single one.
UNUSED = {
    "resnet18": {"few-bit derivatives, rest rotated"},
    "vit": {"pooling, 2 x 2", "DIVISION, two frequencies", "BLPA, windows"},
    "gpt": {"pooling, 2 x 2", "DIVISION, two frequencies", "BLPA, windows"}}
BITS = (1, 2, 4)


def per_sample(bits: int) -> Codec:
    """Returns the codec that chooses the bits of each sample."""
    return PerSampleCodec(Stochastic, bits, bucket_size=256, metadata_dtype=torch.bfloat16)
