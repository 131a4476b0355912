"""Errors of few-bit tables, and few-bit against stochastically rounded derivatives.

    python examples/benchmarks/few_bit_errors.py [--seeds 64]

Prints the two tables of docs/few_bit.md. The second table is about GELU's derivative at standard normal
inputs. It gives root mean square errors, relative to the derivative's own root mean square, for one draw
and for the mean over seeds.
"""

import argparse

import torch

from brevitas_bp import codec_from
from brevitas_bp.activations.few_bit import few_bit_table, fit_few_bit_table, named_functions
from brevitas_bp.activations.functions import ACTIVATIONS
from brevitas_bp.codec import Codec, FewBitCodec
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic


def print_errors() -> None:
    """Prints the squared error on [-10, 10], with uniform weight, for every function and width."""
    print("| derivative of | 1 bit | 2 bits | 3 bits | 4 bits |\n| --- | --- | --- | --- | --- |")
    rows = [(name, False) for name in named_functions()]
    rows += [(name, True) for name in named_functions() if ACTIVATIONS[name].even]
    for name, even in sorted(rows):
        errors = [few_bit_table(name, bits, even=even).error or 0 for bits in range(1, 5)]
        cells = ["0" if error < 1e-12 else f"{error:.6f}" for error in errors]
        print(f"| {name}{', of abs(x)' if even else ''} | {' | '.join(cells)} |")


def print_bias(seeds: int, numel: int = 1 << 18) -> None:
    """Prints the error of one draw beside the error of the mean over seeds."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    exact = ACTIVATIONS["gelu"].at(x.double()).float()
    print("| codec | bits per element | one draw | mean of seeds |\n| --- | --- | --- | --- |")
    for bits in (1, 2, 3, 4):
        tables = {
            "few-bit, uniform weight": few_bit_table("gelu", bits),
            "few-bit, normal weight": fit_few_bit_table(
                "gelu", bits, weight=lambda x: torch.exp(-x * x / 2))}
        stochastic = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic, bit_width=bits)
        codecs: list[tuple[str, Codec, torch.Tensor]] = [
            *((name, FewBitCodec(table), x) for name, table in tables.items()),
            ("derivative, stochastic", stochastic, exact)]
        for name, codec, stored in codecs:
            packed = [codec.encode(stored, seed=seed) for seed in range(seeds)]
            decoded = torch.stack([p.decode() for p in packed])
            errors = [
                float((d - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                for d in (decoded[0], decoded.mean(0))]
            size = packed[0].nbytes * 8 / numel
            print(f"| {bits}-bit {name} | {size:.3f} | {errors[0]:.4f} | {errors[1]:.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=64, help="number of draws of the stochastic codecs")
    arguments = parser.parse_args()
    print_errors()
    print()
    print_bias(arguments.seeds)
