"""Compares published codes for saved tensors: bytes, error and bias of the gradient of four networks.

    python examples/studies/published_codes.py [--models gpt,vit] [--draws 8] [--minutes 5] [--markdown]
    python examples/studies/published_codes.py --show --figure docs/figures/published_codes.png
    python examples/studies/published_codes.py --times

Each code stores the inputs of layers and of norms in about 1, 2 or 4 bits for each element. All other
tensors are the same for all codes: factors of the passing gradient take 4 bits (dithered), query and key
take 8 bits. Tensors that a code leaves to its fallback take rotated codes of 1, 2 or 4 bits. Two rows,
"all alike", store every float tensor with the code, as their authors do. Codes are compared by the bytes
of the whole network, which are true bytes of live tensors.

For the gradient of all parameters as one vector, g is exact, g~ is rounded, and m is the mean of g~:

    error = E |g~ - g|^2 / |g|^2,
    bias  = |m - g| / |g|, without what is due to the number of draws.

The networks are untrained; images are smooth noise. The script appends each result at once to a file.
A stopped run continues where it stopped. The study takes about 15 minutes on one core.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gradient_quality import gpt, import_torchvision, prepare, saved
from matplotlib.figure import Figure
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import Codec, OpAware, QuantBackwardWrapper, SavedTensor, codec_from, quant
from brevitas_bp.allocate import measure_gradient_error
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
from brevitas_bp.models import efficientnet_v2_tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from timing import best_of

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


def images(count: int) -> Tensor:
    """Returns images of 32 x 32 pixels without sharp edges."""
    return F.interpolate(torch.randn(count, 3, 8, 8), scale_factor=4, mode="bicubic")


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns ResNet-18 with the first layer that 32 x 32 images need."""
    import_torchvision()
    net = import_torchvision("torchvision.models").resnet18(weights=None, num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net, images(16), torch.randint(10, (16,))


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a ViT of four blocks, images and labels."""
    import_torchvision()
    net = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        32, 4, 4, 4, 128, 512, num_classes=10)
    # The head starts at zero, which would make every other gradient zero.
    nn.init.normal_(net.heads.head.weight, std=0.1)
    return net, images(8), torch.randint(10, (8,))


MODELS = {
    "efficientnet_v2_tiny": lambda: (efficientnet_v2_tiny(), images(16), torch.randint(10, (16,))),
    "resnet18": resnet18, "vit": vit, "gpt": gpt}


@dataclass(frozen=True)
class Result:
    """One network, its inputs stored with one code."""

    model: str
    code: str
    bits: int
    draws: int
    stored_bytes: int
    exact_bytes: int
    error: float
    bias: float
    share: float

    @property
    def ratio(self) -> float:
        """Returns exact bytes divided by stored bytes."""
        return self.exact_bytes / self.stored_bytes

    @property
    def percent(self) -> float:
        """Returns stored bytes in percent of the exact bytes."""
        return 100 / self.ratio


def measure(name: str, code: str, bits: int, draws: int) -> Result | None:
    """Measures one network with one code; None if the code has no such width."""
    options = CODES[code](bits)
    if options is None:
        return None
    net, _, run = prepare(name, MODELS)
    model = QuantBackwardWrapper(net, **{"policy": OpAware(**SAME), **options})
    report = saved(model, run)
    total = measure_gradient_error(model, run, draws=draws).total
    error = (total.variance + max(total.offset, 0.0)) / total.size**2
    return Result(
        name, code, bits, draws, report.stored_bytes, report.exact_bytes, error, total.bias,
        total.signal)


def load(path: Path) -> dict[tuple[str, str, int], Result]:
    """Returns the results of earlier runs."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(r.model, r.code, r.bits): r for r in results}


def measure_all(path: Path, models: list[str], draws: int, minutes: float) -> bool:
    """Measures what is missing, for so many minutes; returns whether all is measured."""
    end, known = time.monotonic() + 60 * minutes, load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in models:
        for code in CODES:
            for bits in BITS:
                if (name, code, bits) in known or code in UNUSED.get(name, ()):
                    continue
                if time.monotonic() > end:
                    return False
                result = measure(name, code, bits, draws)
                if result is not None:
                    print(result, file=sys.stderr, flush=True)
                    with path.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
    return True


def show(results: dict[tuple[str, str, int], Result], models: list[str], markdown: bool) -> None:
    """Prints a table for each network: ratio, error and bias at each width."""
    for name in models:
        cells = []
        for code in CODES:
            row = [code]
            for bits in BITS:
                r = results.get((name, code, bits))
                row += ["-"] * 3 if r is None else [
                    f"{r.ratio:.1f}", _short(r.error), _short(r.bias)]
            cells.append(row)
        titles = [name, *(f"{t}, {b} bit" for b in BITS for t in ("ratio", "error", "bias"))]
        show_table(titles, cells, markdown, width=150)
        print()


def show_times(markdown: bool) -> None:
    """Prints how long it takes to store and to restore 1M elements [16, 64, 32, 32], in ns each."""
    x, cells = torch.randn(16, 64, 32, 32), []
    for code, options in CODES.items():
        codec = (options(2) or {})["act_quant"].in_rows(x[0].numel(), x.shape[-1])
        packed = codec.encode(x, seed=0)
        if code.endswith("all alike"):
            continue
        there = best_of(lambda codec=codec: codec.encode(x, seed=0))
        back = best_of(packed.decode)
        cells.append([
            code, f"{packed.nbytes * 8 / x.numel():.2f}", f"{there / x.numel() * 1e9:.1f}",
            f"{back / x.numel() * 1e9:.1f}"])
    show_table(["code", "bits", "encode, ns", "decode, ns"], cells, markdown)


def _short(number: float) -> str:
    """Returns two digits; of small numbers, three decimals."""
    return "0" if number < 5e-4 else f"{number:.3f}" if number < 0.1 else f"{number:.2g}" if (
        number < 100) else f"{number:.0f}"


INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
COLORS = (
    "#9aa3af", "#6b7280", "#b58900", "#7a5c00", "#2f6db5", "#17becf", "#8c564b", "#e377c2", "#d62728",
    "#2ca02c", "#ff7f0e", "#9467bd", "#a8326e", "#c7a6e8", "#1a9988", "#111111")
MARKERS = "os^vDPX<>*hpdH8s"


def draw(results: dict[tuple[str, str, int], Result], models: list[str], path: Path) -> None:
    """Draws error over bytes, one panel for each network; codes with a bias have hollow marks."""
    figure = Figure(figsize=(11.5, 8.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, -(-len(models) // 2), squeeze=False).flat
    for axes, name in zip(panels, models):
        for code, color, marker in zip(CODES, COLORS, MARKERS):
            found = [results[name, code, b] for b in BITS if (name, code, b) in results]
            default = code == "rotated (default)"
            axes.plot(
                [r.percent for r in found], [r.error for r in found], color=color, marker=marker,
                markersize=5.5, linewidth=2 if default else 1, label=code, zorder=4 if default else 3,
                fillstyle="full" if code in UNBIASED else "none")
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [3, 5, 7, 10, 15, 20, 30]
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in ticks if low <= t <= high])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} %")
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        axes.grid(color=LIGHT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=MUTED, length=0, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("bytes saved for backward, in percent of plain autograd's", fontsize=9, color=INK)
    figure.supylabel("squared error of the gradient, relative to its square", fontsize=9, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", fontsize=8, frameon=False, labelcolor=INK,
        title="filled: unbiased\nhollow: biased", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--times", action="store_true", help="measure times of codecs only")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/published_codes.jsonl"))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; expected some of {sorted(MODELS)}")
    if options.times:
        show_times(options.markdown)
        return
    if not options.show and not measure_all(options.out, models, options.draws, options.minutes):
        print("stopped; run again to continue", file=sys.stderr)
    results = load(options.out)
    show(results, models, options.markdown)
    if options.figure is not None:
        draw(results, models, options.figure)


if __name__ == "__main__":
    main()
