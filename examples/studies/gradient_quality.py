"""Measures bias and noise of whole networks' gradients, per parameter, over many roundings.

    python examples/studies/gradient_quality.py [--models gpt,vit] [--seeds 500] [--markdown]

For each network and way of storing, the script measures the stored bytes. For each parameter, g is the
exact gradient, m is the mean of the rounded gradients over the seeds, and V is their total variance. The
table prints medians over the parameters:

    signal = <m, g> / |g|^2: the part of the gradient that is left; 1 if rounding is unbiased,
    noise  = sqrt(V) / |g| / signal,
    bias   = sqrt(max(|m - g|^2 - V / seeds, 0)) / |g|: the difference, less the part that is due to
             finitely many seeds. The largest bias is printed too.

"beaten" counts the parameters whose noise is above that of the op-aware way named beside it, which takes
no more bytes. The script appends each result at once. A stopped run continues where it stopped. The
study takes about an hour on 2 cores.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from small_gpt import SmallGPT
from small_llama import SmallLlama
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.backward import OpAware
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from vision import import_torchvision

Ways = dict[str, dict[str, Any]]
Models = dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor | None]]]

#: Way of storing -> options of the wrapper. Codes are rotated unless the way says otherwise. The policy
#: "all" never rotates.
WAYS: Ways = {
    "op-aware, 2 bits": {},
    "op-aware, 1 bit, norms 2": {"bit_width": 1, "policy": OpAware(norm_bits=2)},
    "op-aware, 2 bits, norms 4": {"policy": OpAware(norm_bits=4)},
    "op-aware, 2 bits, q and k exact": {"policy": OpAware(attention_bits=None)},
    "op-aware, 2 bits, q and k 4": {"policy": OpAware(attention_bits=4)},
    "op-aware, 3 bits": {"bit_width": 3},
    "op-aware, 2 bits, stochastic": {"act_quant": Uint2},
    "all, 2 bits, stochastic": {"policy": "all", "act_quant": Uint2},
    "all, 4 bits, stochastic": {"policy": "all", "act_quant": Uint2, "bit_width": 4},
}


#: Ways whose bias is measured with all seeds. A fifth of the seeds shows the noise of the other ways.
UNBIASED = {
    "op-aware, 2 bits", "op-aware, 1 bit, norms 2", "op-aware, 2 bits, q and k exact",
    "op-aware, 2 bits, stochastic"}


def ways_of(model: str) -> list[str]:
    """Returns the ways that make a difference for a network: only some have attention or small norms."""
    other = "norms 4" if model in ("gpt", "vit") else "q and k"
    return [way for way in WAYS if other not in way]


def vision(name: str, batch: int, size: int, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a torchvision model with images and labels."""
    import_torchvision()
    model = import_torchvision("torchvision.models").get_model(
        name, weights=None, num_classes=10, **options)
    return model, torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a ViT of four blocks, images and labels."""
    import_torchvision()
    transformer = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        32, 4, 4, 4, 128, 512, num_classes=10)
    # The head starts at zero, which would make every other gradient zero.
    nn.init.normal_(transformer.heads.head.weight, std=0.1)
    return transformer, torch.randn(8, 3, 32, 32), torch.randint(10, (8,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a GPT of four blocks, tokens and labels."""
    tokens = torch.randint(256, (8, 65))
    return SmallGPT(), tokens[:, :-1], tokens[:, 1:].flatten()


def llama() -> tuple[nn.Module, Tensor, None]:
    """Returns a Llama of four blocks that computes its loss itself, and tokens."""
    return SmallLlama(), torch.randint(256, (8, 65)), None


MODELS: Models = {
    "gpt": gpt, "llama": llama, "vit": vit, "resnet50": lambda: vision("resnet50", 8, 64),
    "efficientnet_v2_s": lambda: vision("efficientnet_v2_s", 8, 64, dropout=0.0),
}


@dataclass(frozen=True)
class Result:
    """Results for one network stored in one way."""

    model: str
    way: str
    seeds: int
    stored_bytes: int
    exact_bytes: int
    parameters: list[str]
    signal: list[float]
    noise: list[float]
    bias: list[float]

    @property
    def ratio(self) -> float:
        """Returns exact bytes divided by stored bytes."""
        return self.exact_bytes / self.stored_bytes

    @property
    def per_signal(self) -> list[float]:
        """Returns noise divided by signal."""
        return [n / max(s, 1e-9) for n, s in zip(self.noise, self.signal)]


def prepare(
        name: str,
        models: Models = MODELS) -> tuple[nn.Module, Tensor, Callable[[nn.Module], Tensor]]:
    """Returns a network, the same at each call, with its inputs and a function for the loss."""
    torch.manual_seed(0)
    model, inputs, labels = models[name]()
    return model.train(), inputs, lambda network: network(inputs) if labels is None else (
        F.cross_entropy(network(inputs).flatten(0, -2), labels))


def wrap(model: nn.Module, **options: Any) -> QuantBackwardWrapper:
    """Wraps a model with the bucket size and metadata of all studies."""
    return QuantBackwardWrapper(model, bucket_size=256, metadata_dtype=torch.bfloat16, **options)


def saved(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> SavedMemoryReport:
    """Reports what one forward pass keeps."""
    with track_saved_memory(model) as report:
        loss = run(model)
    del loss
    return report


def measure(
        name: str, way: str, seeds: int, models: Models = MODELS, ways: Ways = WAYS) -> Result:
    """Measures bytes, and ``seeds`` rounded gradients against the exact gradients."""
    model, _, run = prepare(name, models)
    wrapped = wrap(model, **ways[way])
    report = saved(wrapped, run)
    print(f"{name}, {way}", file=sys.stderr)
    error = measure_gradient_error(wrapped, run, draws=seeds, progress=True)
    kept = [row for row in error.parameters if not row.negligible]
    return Result(
        name, way, seeds, report.stored_bytes, report.exact_bytes, [row.name for row in kept],
        [row.signal for row in kept], [row.noise for row in kept], [row.bias for row in kept])


def load(path: Path) -> list[Result]:
    """Returns results of earlier runs."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def beaten(result: Result, rival: Result) -> int:
    """Counts the parameters whose noise is above the rival's."""
    return sum(a > b for a, b in zip(result.per_signal, rival.per_signal))


def best_rival(result: Result, results: list[Result]) -> Result | None:
    """Returns the op-aware way with no more bytes that beats the result at the most parameters."""
    rivals = [
        r for r in results if r.model == result.model and r.way.startswith("op-aware")
        and r.stored_bytes <= result.stored_bytes]
    return max(rivals, key=lambda r: beaten(result, r), default=None)


def show(results: list[Result], markdown: bool) -> None:
    """Prints the table, on the console or as Markdown."""
    titles = [
        "network", "stored as", "seeds", "ratio", "signal", "noise", "bias", "largest bias", "beaten"]
    cells = []
    for r in results:
        rival = None if r.way.startswith("op-aware") else best_rival(r, results)
        lost = "-" if rival is None else (
            f"{beaten(r, rival)} of {len(r.noise)}, by {rival.way} ({rival.ratio:.2f})")
        cells.append([
            r.model, r.way, str(r.seeds), f"{r.ratio:.2f}", f"{median(r.signal):.3f}",
            f"{median(r.per_signal):.3f}", f"{median(r.bias):.4f}", f"{max(r.bias):.3f}", lost])
    show_table(titles, cells, markdown, width=150)


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
        parser.error(f"unknown models {sorted(unknown)}; expected some of {sorted(MODELS)}")
    results = load(options.out)
    for name in chosen:
        for way in ways_of(name):
            seeds = options.seeds if way in UNBIASED else -(-options.seeds // 5)
            if any((r.model, r.way) == (name, way) for r in results):
                continue
            results.append(measure(name, way, seeds))
            with options.out.open("a") as file:
                file.write(json.dumps(asdict(results[-1])) + "\n")
    order = {(name, way): i for i, (name, way) in enumerate(
        (name, way) for name in chosen for way in ways_of(name))}
    results = [r for r in results if (r.model, r.way) in order]
    show(sorted(results, key=lambda r: order[r.model, r.way]), options.markdown)


if __name__ == "__main__":
    main()
