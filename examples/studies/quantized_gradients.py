"""Fully quantized training on CIFAR-10: quantizers of gradients against training with exact gradients.

    python examples/studies/quantized_gradients.py --data FOLDER [--epochs 3] [--images 5000] [--seeds 3]

A pre-activation ResNet-20 of Brevitas layers has 8-bit weights and activations. QAT trains it with exact
gradients. The other runs round the gradient that enters the product with the weights: per tensor (PTQ),
per sample (PSQ), or after a block Householder transform (BHQ), with 8 to 2 bits. The gradient for the
weights has 8 bits per tensor. Runs with the same seed see the same images in the same order.

FOLDER is that of CIFAR-10 (``cifar-10-batches-py`` or ``-bin``). Results are kept in
``runs/quantized_gradients.jsonl``, one line for each run, so an interrupted study continues. The picture
``docs/figures/quantized_gradients.png`` is drawn from them. On one core, a run takes about a minute with
images of half their size (``--size 16``).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8WeightPerTensorFloat
from rich.progress import Progress
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from data import Source, load_dataset

from brevitas_bp import quant
from brevitas_bp.grad import QuantGradientWrapper

WIDTHS = (8, 6, 5, 4, 2)
KINDS = {
    "PTQ": quant.ShiftedUint8DynamicGradPerTensorFloatStochastic,
    "PSQ": quant.ShiftedUint8DynamicGradPerRowFloatStochastic,
    "BHQ": quant.HouseholderUint8DynamicGradPerRowFloatStochastic,
    "BHQ, dithered": quant.HouseholderUint8DynamicGradPerRowFloatDithered,
}
LAYER = {
    "weight_quant": Int8WeightPerTensorFloat,
    "input_quant": quant.ShiftedUint8DynamicActPerTensorFloat,
    "bias": False,
}


class Block(nn.Module):
    """Two convolutions, each after norm and ReLU, and the way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1 = QuantConv2d(inside, outside, 3, stride, 1, **LAYER)
        self.conv2 = QuantConv2d(outside, outside, 3, 1, 1, **LAYER)
        self.around = None if inside == outside else QuantConv2d(inside, outside, 1, stride, **LAYER)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(normed))))
        return y + (x if self.around is None else self.around(normed))


def resnet20() -> nn.Sequential:
    """Returns the network, with ten classes."""
    blocks, inside = [], 16
    for outside in (16, 32, 64):
        for i in range(3):
            blocks.append(Block(inside, outside, 2 if i == 0 and outside > 16 else 1))
            inside = outside
    layer = LAYER | {"bias": True}
    return nn.Sequential(
        QuantConv2d(3, 16, 3, 1, 1, **LAYER), *blocks, nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), QuantLinear(64, 10, **layer))


def ways(widths: list[int]) -> dict[str, dict[str, Any] | None]:
    """Returns the runs: name -> arguments of the wrapper; None for QAT."""
    rounded = {
        f"{kind} {bits}": {"input_grad_quant": config, "input_grad_bit_width": bits}
        for kind, config in KINDS.items() for bits in widths if kind != "BHQ, dithered" or bits <= 4}
    return {"QAT": None, **rounded}


def train(
        way: dict[str, Any] | None, data: Any, seed: int, args: argparse.Namespace, bar: Progress,
        text: str) -> list[dict[str, float]]:
    """Returns, for each epoch, loss and accuracy on the test images."""
    torch.manual_seed(seed)
    model: nn.Module = resnet20()
    if way is not None:
        model = QuantGradientWrapper(model, seed=seed, **way)
    steps = -(-len(data.train) // args.batch) * args.epochs
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    task, curve, order = bar.add_task(text, total=steps), [], torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        model.train()
        losses = []
        for part in torch.randperm(len(data.train), generator=order).split(args.batch):
            images = shown(data, data.train.images[part], args.size)
            mirrored = torch.rand(len(part), 1, 1, 1, generator=order) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
            loss = F.cross_entropy(model(images), data.train.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.advance(task)
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(shown(data, images, args.size)).argmax(1) == labels).sum())
                for images, labels in zip(data.test.images.split(500), data.test.labels.split(500)))
        curve.append({"loss": mean(losses), "accuracy": right / len(data.test)})
    bar.remove_task(task)
    return curve


def shown(data: Any, images: Tensor, size: int) -> Tensor:
    """Returns normalised float images of a side of ``size`` pixels."""
    x = (images.float() - data.mean) / data.std
    return x if x.shape[-1] == size else F.adaptive_avg_pool2d(x, size)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what makes results comparable."""
    return {k: getattr(args, k) for k in ("epochs", "images", "test_images", "size", "batch", "lr")}


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what is missing, and returns all results."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = [row for row in rows if row["settings"] == settings(args)]
    done = {(row["way"], row["seed"]) for row in rows}
    missing = [
        (name, way, seed) for seed in range(args.seeds) for name, way in ways(args.widths).items()
        if (name, seed) not in done][:args.runs]
    if not missing:
        return rows
    data = load_dataset("cifar10", Source(
        Path(args.data), limit_train=args.images, limit_test=args.test_images))
    with Progress(transient=True) as bar:
        whole = bar.add_task("runs", total=len(missing))
        for name, way, seed in missing:
            start = time.perf_counter()
            curve = train(way, data, seed, args, bar, f"{name}, seed {seed}")
            row = {
                "way": name, "seed": seed, "curve": curve, "settings": settings(args),
                "seconds": time.perf_counter() - start}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            bar.advance(whole)
    return rows


def summary(rows: list[dict[str, Any]], widths: list[int]) -> list[list[str]]:
    """Returns the cells of the table: accuracy after the last epoch, over the seeds."""
    cells = []
    for name in ways(widths):
        of_way = [row["curve"][-1] for row in rows if row["way"] == name]
        if of_way:
            accuracies = [100 * end["accuracy"] for end in of_way]
            deviation = f" ± {stdev(accuracies):.1f}" if len(of_way) > 1 else ""
            cells.append([
                name, f"{mean(accuracies):.1f}{deviation}", f"{mean(e['loss'] for e in of_way):.3f}",
                str(len(of_way))])
    return cells


def draw(rows: list[dict[str, Any]], widths: list[int], path: Path) -> None:
    """Draws the training loss over the epochs, one panel for each width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(widths), figsize=(2.6 * len(widths), 2.8), sharey=True, squeeze=False)
    for axis, bits in zip(axes[0], widths):
        names = ["QAT", *(name for name in ways(widths) if name.endswith(f" {bits}"))]
        for name in names:
            curves = [[e["loss"] for e in row["curve"]] for row in rows if row["way"] == name]
            if curves:
                values = torch.tensor(curves)
                epochs = range(1, values.shape[1] + 1)
                style = {"color": "black", "linestyle": "--"} if name == "QAT" else {}
                line, = axis.plot(epochs, values.mean(0), label=name.rsplit(" ", 1)[0], **style)
                axis.fill_between(
                    epochs, values.amin(0), values.amax(0), alpha=0.15, color=line.get_color())
        axis.set(title=f"{bits} bits", xlabel="epoch")
        axis.set_xticks(list(range(1, len(rows[0]["curve"]) + 1)))
    axes[0][0].set_ylabel("training loss")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the CIFAR-10 files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000, help="training images")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--runs", type=int, help="stop after this many runs; call again to go on")
    parser.add_argument("--out", default="runs/quantized_gradients.jsonl")
    parser.add_argument("--picture", default="docs/figures/quantized_gradients.png")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows = study(args)
    show_table(
        ["gradients", "accuracy in %, ± deviation over seeds", "training loss, last epoch", "seeds"],
        summary(rows, args.widths), args.markdown)
    draw(rows, args.widths, Path(args.picture))


if __name__ == "__main__":
    main()
