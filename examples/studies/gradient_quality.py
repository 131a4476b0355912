"""Bias and noise of the gradient of whole networks, per parameter, over many roundings.

    python examples/studies/gradient_quality.py [--models gpt,vit] [--seeds 500] [--markdown]

For each network and way of storing: the stored bytes, and of each parameter the exact gradient g, the
mean m of the rounded ones over the seeds, and their total variance V. Printed are

    noise  = sqrt(V) / |g|,                            the median over the parameters,
    bias   = sqrt(max(|m - g|^2 - V / seeds, 0)) / |g|,  median and largest: what is left of the
             difference when the part is taken off that the seeds leave by chance,
    worse  = parameters whose noise and bias together are above those of the op-aware policy.

Results are appended as they come; a run that was stopped goes on where it was. About an hour on 2 cores.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from small_gpt import SmallGPT
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloatStochastic

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from vision import import_torchvision

#: Way of storing -> options of the wrapper.
WAYS: dict[str, dict[str, Any]] = {
    "op-aware, 2 bits": {},
    "op-aware, 2 bits, query and key 8": {
        "policy": OpAware(attention_quant=ShiftedUint8DynamicActPerBucketFloatStochastic)},
    "op-aware, 3 bits, query and key 8": {
        "bit_width": 3,
        "policy": OpAware(attention_quant=ShiftedUint8DynamicActPerBucketFloatStochastic)},
    "all, 2 bits": {"policy": "all"},
    "all, 3 bits": {"policy": "all", "bit_width": 3},
    "all, 4 bits": {"policy": "all", "bit_width": 4},
}


def vision(name: str, batch: int, size: int, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A torchvision model with images and labels."""
    import_torchvision()
    model = import_torchvision("torchvision.models").get_model(
        name, weights=None, num_classes=10, **options)
    return model, torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    """A ViT of four blocks."""
    import_torchvision()
    transformer = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        32, 4, 4, 4, 128, 512, num_classes=10)
    # Its head starts at zero, which would hide every gradient.
    nn.init.normal_(transformer.heads.head.weight, std=0.1)
    return transformer, torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    """A GPT of four blocks."""
    tokens = torch.randint(256, (8, 65))
    return SmallGPT(), tokens[:, :-1], tokens[:, 1:].flatten()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "gpt": gpt, "vit": vit, "resnet50": lambda: vision("resnet50", 8, 64),
    "efficientnet_v2_s": lambda: vision("efficientnet_v2_s", 8, 64, dropout=0.0),
}


@dataclass(frozen=True)
class Result:
    """Of one network stored in one way."""

    model: str
    way: str
    seeds: int
    stored_bytes: int
    exact_bytes: int
    parameters: list[str]
    noise: list[float]
    bias: list[float]


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Gradients of all parameters; masks of dropout and stochastic depth are always the same."""
    model.zero_grad()
    torch.manual_seed(1)
    run().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def measure(name: str, way: str, seeds: int) -> Result:
    """Exact gradients, then ``seeds`` rounded ones."""
    torch.manual_seed(0)
    model, inputs, labels = MODELS[name]()
    model.train()
    wrapped = QuantBackwardWrapper(
        model, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0, **WAYS[way])

    def run(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(network(inputs).flatten(0, -2), labels)

    exact = gradients(model, run(model))
    with track_saved_memory(wrapped) as report:
        loss = run(wrapped)()
    del loss
    mean = [torch.zeros_like(g, dtype=torch.float64) for g in exact]
    square = [0.0] * len(exact)
    for _ in track(range(seeds), f"{name}, {way}", console=Console(stderr=True)):
        for i, (g, e) in enumerate(zip(gradients(model, run(wrapped)), exact)):
            difference = g.double() - e.double()
            mean[i] += difference / seeds
            square[i] += float(difference.square().sum()) / seeds
    size = [float(e.norm()) for e in exact]
    offset = [float(m.square().sum()) for m in mean]
    # Of the squared distance of the mean, a share 1 / seeds of the variance is chance.
    variance = [(s - o) * seeds / (seeds - 1) for s, o in zip(square, offset)]
    bias = [max(o - v / seeds, 0) ** 0.5 for o, v in zip(offset, variance)]
    # Gradients that are zero but for float32 rounding (a bias before a norm) have no relative error.
    largest = max(size)
    kept = [i for i, s in enumerate(size) if s > 1e-6 * largest]
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    return Result(
        name, way, seeds, report.stored_bytes, report.exact_bytes, [names[i] for i in kept],
        [variance[i] ** 0.5 / size[i] for i in kept], [bias[i] / size[i] for i in kept])


def load(path: Path) -> list[Result]:
    """Results of earlier runs."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def show(results: list[Result], markdown: bool) -> None:
    """The table, on the console or as Markdown."""
    titles = ["network", "stored as", "ratio", "noise, median", "bias, median", "bias, largest", "worse"]
    aware = {r.model: r for r in results if r.way.startswith("op-aware")}
    cells = []
    for r in results:
        error = [(n * n + b * b) for n, b in zip(r.noise, r.bias)]
        base = aware.get(r.model, r)
        least = [(n * n + b * b) for n, b in zip(base.noise, base.bias)]
        worse = sum(e > x for e, x in zip(error, least))
        middle = len(r.noise) // 2
        cells.append([
            r.model, r.way, f"{r.exact_bytes / r.stored_bytes:.2f}", f"{sorted(r.noise)[middle]:.3f}",
            f"{sorted(r.bias)[middle]:.4f}", f"{max(r.bias):.4f}",
            "-" if base is r else f"{worse} of {len(error)}"])
    if markdown:
        for line in (titles, ["---"] * len(titles), *cells):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(*titles)
    for line in cells:
        table.add_row(*line)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/quality.json"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; there are {sorted(MODELS)}")
    results = load(options.out)
    for name in chosen:
        for way in WAYS:
            if any((r.model, r.way, r.seeds) == (name, way, options.seeds) for r in results):
                continue
            results.append(measure(name, way, options.seeds))
            with options.out.open("a") as file:
                file.write(json.dumps(asdict(results[-1])) + "\n")
    show([r for r in results if r.model in chosen and r.seeds == options.seeds], options.markdown)


if __name__ == "__main__":
    main()
