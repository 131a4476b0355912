"""Measures what it gains to store outputs given a mask or a derivative, and draws why.

    python examples/studies/given.py [--markdown]
    python examples/studies/given.py --figure docs/figures/given.png

The table has the squared error of the stored output of an activation function, over the energy of the
output about its mean, in buckets of 256 normal inputs. The derivative has four dithered bits.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from tables import show_table
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import Codec, codec_from, quant
from brevitas_bp.activations.predictions import PREDICTIONS
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.regions import relu_region
from brevitas_bp.drawing import BLUE, GREY, INK, ORANGE, tidy
from brevitas_bp.format.differences import fill_zeros, predict

SIZE, BUCKETS = 256, 1 << 12
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def code(kind: str, bits: int) -> Codec:
    name = {
        "rotated": f"RotatedNormal{bits}DynamicActPerBucketFloat",
        "dithered": f"ShiftedUint{bits}DynamicActPerBucketFloatDithered"}[kind]
    return codec_from(getattr(quant, name), bucket_size=SIZE, metadata_dtype=torch.bfloat16)


def derivative(name: str, y: Tensor) -> Tensor:
    leaf = y.clone().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](leaf).sum(), leaf)[0]


def given(name: str, y: Tensor, inner: Codec) -> Codec:
    """Returns the codec of the output of a function, given what the function itself stores."""
    if name == "relu":
        return MaskedCodec(inner, relu_region().encode(y.relu()), SIZE)
    stored = code("dithered", 4).encode(derivative(name, y), seed=0)
    return DifferenceCodec(inner, stored, PREDICTIONS[name], SIZE)


def error(x: Tensor, codec: Codec) -> float:
    decoded = codec.encode(x, seed=1).decode()
    return float((decoded - x).square().sum() / (x - x.mean(1, keepdim=True)).square().sum())


def table(markdown: bool) -> None:
    cells = []
    for name, function in FUNCTIONS.items():
        for deviation in (0.3, 1.0, 2.0):
            torch.manual_seed(0)
            y = deviation * torch.randn(BUCKETS, SIZE)
            row = [name, f"{deviation:g}"]
            for bits in (1, 2, 3):
                inner = code("rotated", bits)
                alone, with_it = error(function(y), inner), error(function(y), given(name, y, inner))
                row.append(f"{alone:.3f} / {with_it:.4f} ({alone / with_it:.1f}x)")
            cells.append(row)
    show_table(["function", "deviation of its input", "1 bit", "2 bits", "3 bits"], cells, markdown)


def labelled(axes: Any, below: str, title: str, **legend: Any) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel("value")
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, **legend)
    tidy(axes, "y")


def figure(path: str) -> None:
    torch.manual_seed(1)
    picture = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = picture.subplots(1, 2)
    y = torch.randn(1 << 11)
    decoded = code("dithered", 4).encode(derivative("silu", y), seed=0).decode()
    order = decoded.argsort()
    left.scatter(decoded, F.silu(y), s=3, color=GREY, label="output")
    left.plot(decoded[order], predict(decoded[order], PREDICTIONS["silu"]), color=BLUE, linewidth=2,
              label="prediction")
    rest = F.silu(y) - predict(decoded, PREDICTIONS["silu"])
    left.scatter(decoded, rest, s=3, color=ORANGE, label="difference: what is stored")
    labelled(left, "derivative of SiLU, as stored in 4 bits",
             f"SiLU: the difference has 1/{float(F.silu(y).var() / rest.var()):.0f} of the energy",
             loc="upper left", markerscale=3)
    x = torch.randn(64).relu()
    filled = fill_zeros(x, 64)
    places = torch.arange(64)
    right.bar(places, filled, width=0.8, color=ORANGE, label="filled: what is stored")
    right.bar(places, x, width=0.8, color=GREY, label="output")
    labelled(right, "element of a bucket",
             f"ReLU: {float(x.var() / filled.var()):.1f} times less energy about the mean",
             loc="upper right")
    picture.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--figure", help="draw the picture into this file, and print no table")
    options = parser.parse_args()
    if options.figure:
        figure(options.figure)
    else:
        table(options.markdown)


if __name__ == "__main__":
    main()
