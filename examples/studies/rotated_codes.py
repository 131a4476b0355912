"""Measures the error and the bias of codes on buckets of different kinds, and draws a rotation.

    python examples/studies/rotated_codes.py [--markdown] [--draws 10000]
    python examples/studies/rotated_codes.py --figure docs/figures/rotated.png

The first table has the energy of the error over the energy of the bucket about its mean. The second
table has the relative bias ``|E x~ - x| / |x - mean|`` of hard buckets, and what that number of draws
resolves. Both tables take about a minute on 2 cores.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tables import show_table
from torch import Tensor

from brevitas_bp import Codec, codec_from
from brevitas_bp.format.rotation import rotate, sign_words
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketNormal,
    RotatedBuckets,
    RotatedNormal2DynamicActPerBucketFloat,
    RotatedUint2DynamicActPerBucketFloatDithered,
    ShiftedUint2DynamicActPerBucketFloatDithered,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)

SIZE = 256
INK, BLUE, ORANGE, GREY = "#22262b", "#2f6db5", "#d9772b", "#9aa3af"


class RotatedOnce2(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """The control: one rotation."""

    bit_width = 2
    rotations = 1


WAYS: dict[str, Any] = {
    "stochastic": ShiftedUint2DynamicActPerBucketFloatStochastic,
    "dithered": ShiftedUint2DynamicActPerBucketFloatDithered,
    "strict": RotatedUint2DynamicActPerBucketFloatDithered,
    "rotated": RotatedNormal2DynamicActPerBucketFloat}


def _normal(n: int) -> Tensor:
    return torch.randn(n)


def _with_outlier(n: int) -> Tensor:
    x = torch.randn(n)
    x.view(-1, SIZE)[:, 7] = 30
    return x


def _derivative_of_silu(n: int) -> Tensor:
    x = torch.randn(n)
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


#: Kind of data -> a sample of n numbers.
DATA: dict[str, Callable[[int], Tensor]] = {
    "normal": _normal,
    "Student-t(3)": lambda n: torch.distributions.StudentT(3.0).sample((n,)),
    "ReLU of normal": lambda n: torch.randn(n).relu(),
    "SiLU of normal": lambda n: torch.nn.functional.silu(torch.randn(n)),
    "normal, one element 30": _with_outlier,
    "normal + 3": lambda n: torch.randn(n) + 3,
    "SiLU' of normal": _derivative_of_silu}


def _sparse(*values: float) -> Tensor:
    x = torch.zeros(SIZE)
    x[:len(values)] = torch.tensor(values)
    return x


#: Buckets on which codes are easily biased.
HARD: dict[str, Callable[[], Tensor]] = {
    "e1 + 0.3 e2": lambda: _sparse(1, 0.3),
    "e1 + 0.9 e2": lambda: _sparse(1, 0.9),
    "normal, one element 30": lambda: _with_outlier(SIZE),
    "Student-t(3)": lambda: torch.distributions.StudentT(3.0).sample((SIZE,)),
    "ramp": lambda: torch.linspace(0, 1, SIZE),
    "200 zeros and 56 ones": lambda: (torch.arange(SIZE) >= 200).float(),
    "sine": lambda: torch.sin(torch.arange(SIZE) * (2 * math.pi / SIZE))}


def error(codec: Codec, x: Tensor) -> float:
    """Returns the energy of the error over the energy about the means of the buckets."""
    decoded = codec.encode(x, seed=1).decode().double().view(-1, SIZE)
    buckets = x.double().view(-1, SIZE)
    about = buckets - buckets.mean(1, keepdim=True)
    return float((decoded - buckets).square().sum() / about.square().sum())


def bias(codec: Codec, x: Tensor, draws: int) -> tuple[float, float]:
    """Returns the relative bias of one bucket, without what is due to the number of draws; and that."""
    decoded = codec.encode(x.repeat(draws), seed=1).decode().double().view(draws, SIZE)
    about = float((x - x.mean()).double().norm())
    offset = decoded.mean(0) - x.double()
    chance = float(decoded.var(0).sum()) / draws
    return math.sqrt(max(float(offset.square().sum()) - chance, 0.0)) / about, math.sqrt(chance) / about


def tables(draws: int, markdown: bool) -> None:
    """Prints both tables."""
    torch.manual_seed(0)
    cells = []
    for name, sample in DATA.items():
        x = sample(1 << 20)
        cells.append([name, *(
            " / ".join(f"{error(codec_from(way, bit_width=bits), x):.2g}" for bits in (1, 2, 3, 4))
            for way in WAYS.values())])
    show_table(["error, 1 / 2 / 3 / 4 bits", *WAYS], cells, markdown)
    cells = []
    for name, make in HARD.items():
        x, row = make(), [name]
        for way in (RotatedOnce2, RotatedNormal2DynamicActPerBucketFloat):
            found = [bias(codec_from(way, bit_width=bits), x, draws) for bits in (1, 2, 4)]
            row.append(" / ".join(f"{b:.4f}" for b, _ in found))
        row.append(" / ".join(f"{chance:.4f}" for _, chance in found))
        cells.append(row)
    show_table(
        ["bias, 1 / 2 / 4 bits", "one rotation", "two rotations", f"resolved by {draws:,} draws"],
        cells, markdown)


def draw(path: Path) -> None:
    """Draws one bucket with an outlier: as it is and rotated, with its 2-bit levels, and both errors."""
    torch.manual_seed(3)
    x = torch.randn(SIZE)
    x[40] = 12
    plain = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    rotated = codec_from(RotatedNormal2DynamicActPerBucketFloat)
    y = rotate((x - x.mean())[None], sign_words(torch.tensor([0]), SIZE, 1), 2)[0] * SIZE
    first, second = plain.encode(x, seed=1).decode(), rotated.encode(x, seed=1)
    scale = float(second.tensors[1][0]) * SIZE
    figure = Figure(figsize=(8.6, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    levels = torch.linspace(float(x.min()), float(x.max()), 4)
    normal = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]) * scale
    for plot, values, lines, title in (
            (axes[0, 0], x, levels, "A bucket with one outlier, and its 4 codes"),
            (axes[0, 1], y, normal, "The same bucket rotated, and its 4 codes")):
        for level in lines.tolist():
            plot.axhline(level, color=ORANGE, linewidth=1, zorder=1)
        plot.plot(values, ".", color=BLUE, markersize=3.5, zorder=2)
        plot.set_title(title, fontsize=9, color=INK, loc="left")
    for plot, decoded, title in (
            (axes[1, 0], first, "Stochastic rounding"),
            (axes[1, 1], second.decode(), "Rotated code, rotated back")):
        wrong = decoded - x
        energy = float(wrong.square().sum() / (x - x.mean()).square().sum())
        plot.axhline(0, color=GREY, linewidth=0.8)
        plot.plot(wrong, ".", color=BLUE, markersize=3.5)
        plot.set_title(
            f"{title}: error of {energy:.2g} times the energy", fontsize=9, color=INK, loc="left")
        plot.set_xlabel("element", fontsize=8, color=INK)
    for plot in axes.flat:
        plot.tick_params(labelsize=7, colors=INK)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.figure is not None:
        draw(arguments.figure)
        return
    tables(arguments.draws, arguments.markdown)


if __name__ == "__main__":
    main()
