"""Auxiliary activation learning beside the default policy: bytes and accuracy.

    python examples/studies/auxiliary.py [--data FOLDER] [--minutes 5] [--markdown]

Prints bytes saved for backward (ResNet-18, and a transformer that normalizes last), learning indicators
and directions of gradients at initialization. With ``--data``, the folder of CIFAR-10, it also trains a
narrow ResNet with three seeds for each way of storing. Each run is written to ``--out`` at once; a
stopped study continues where it stopped.

"masks" is the default policy without its quantizer: ReLU stores 1 bit, all other tensors are exact.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from auxiliary_networks import READ_INPUT, narrow_resnet, resnet18, transformer, transformer_runs
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import OpAware, QuantBackwardWrapper, SavedTensor, quant, track_saved_memory
from brevitas_bp.allocate import plan_bit_widths
from brevitas_bp.backward.saved import Decision
from brevitas_bp.nn import (
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
    resnet_runs,
    watch_learning_indicators,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from data import Source, load_dataset

TWO, FOUR = quant.RotatedNormal2DynamicActPerBucketFloat, quant.RotatedNormal4DynamicActPerBucketFloat
TRAIN, TEST, EPOCHS, BATCH, RATE = 10_000, 2_000, 3, 128, 0.1
SEEDS = (0, 1, 2)


class Masks(OpAware):
    """Stores masks and indices in few bits, like the default policy, and all other tensors exact."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        quantized = decision.codec is not None and decision.codec.bit_widths
        return decision._replace(codec=None, reason="exact here") if quantized else decision

    def rewrite(self, function: Any) -> None:
        return None


Make = Callable[[nn.Module], nn.Module]


def masks(network: nn.Module) -> nn.Module:
    return QuantBackwardWrapper(network, policy=Masks())


def default(bits: int = 2) -> Make:
    return lambda network: QuantBackwardWrapper(network, bit_width=bits)


def residual(codec: Any = None, blocks: int | None = None) -> Make:
    return lambda network: convert_to_auxiliary_residual(
        network, resnet_runs(network, blocks), codec=codec)


def signs(network: nn.Module) -> nn.Module:
    """All convolutions within blocks: all of them are behind a ReLU."""
    return convert_to_auxiliary_sign(network, ["*.conv?", "*.downsample.0"], relu=True)


def post_norm(codec: Any = None) -> Make:
    return lambda network: convert_to_auxiliary_residual(
        network, transformer_runs(network, 4), layers=READ_INPUT, codec=codec)


def signs_of(*names: str) -> Make:
    return lambda network: convert_to_auxiliary_sign(network, [f"*.{name}" for name in names])


def both(*made: Make) -> Make:
    def make(network: nn.Module) -> nn.Module:
        for one in made:
            network = one(network)
        return network

    return make


def plain(network: nn.Module) -> nn.Module:
    return network


#: Way of storing -> how the network is made.
RESNET: dict[str, Make] = {
    "exact": plain,
    "ARA": residual(),
    "ASA": signs,
    "masks": masks,
    "ARA, masks": both(residual(), masks),
    "ARA at 4 bits, masks": both(residual(FOUR), masks),
    "ARA at 2 bits, masks": both(residual(TWO), masks),
    "ASA, masks": both(signs, masks),
    "default policy, 8 bits": default(8),
    "default policy, 2 bits": default(),
    "ARA, default policy, 2 bits": both(residual(), default()),
    "ASA, default policy, 2 bits": both(signs, default())}
TRANSFORMER: dict[str, Make] = {
    "exact": plain,
    "ARA": post_norm(),
    "ARA at 4 bits": post_norm(FOUR),
    "ARA at 2 bits": post_norm(TWO),
    "ASA of down": signs_of("down"),
    "ASA of up, down, out, query, key, value": signs_of("up", "down", "out", "query", "key", "value"),
    "default policy, 2 bits": default(),
    "ARA, default policy, 2 bits": both(post_norm(), default()),
    "ASA of all six, default policy, 2 bits": both(
        signs_of("up", "down", "out", "query", "key", "value"), default())}
#: Way -> the way that has its bytes, if bits are to be planned.
TRAINED: dict[str, str | None] = {
    "exact": None, "ARA, masks": None, "ARA at 2 bits, masks": None, "ASA, masks": None,
    "default policy, 2 bits": None,
    "ARA, default policy, 2 bits": None, "ASA, default policy, 2 bits": None,
    "default policy, planned": "ASA, default policy, 2 bits"}


def bytes_of(model: nn.Module, x: Tensor) -> int:
    """Returns the bytes that the graph of one forward pass keeps."""
    with track_saved_memory(model) as report:
        loss = model(x).square().mean()
    assert loss.requires_grad
    return report.stored_bytes


def memory_rows(ways: dict[str, Make], make: Callable[[], nn.Module], x: Tensor) -> list[list[str]]:
    """Returns the rows of one network."""
    rows, exact = [], 0
    for way, convert in ways.items():
        torch.manual_seed(0)
        stored = bytes_of(convert(make()), x)
        exact = exact or stored
        rows.append([way, f"{stored / 2**20:.2f}", f"{exact / stored:.2f}"])
    return rows


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Data:
    """Part of CIFAR-10, normalized."""

    def __init__(self, folder: Path) -> None:
        data = load_dataset("cifar10", Source(folder, False, 32, TRAIN, TEST))
        self.images, self.tests = (
            (split.images.float() - data.mean) / data.std for split in (data.train, data.test))
        self.labels, self.answers = data.train.labels, data.test.labels


def model_of(way: str, seed: int, data: Data) -> nn.Module:
    """Returns a network with the initial weights of a seed."""
    torch.manual_seed(seed)
    network = narrow_resnet()
    like = TRAINED[way]
    if like is None:
        return RESNET[way](network)
    batch = data.images[:BATCH], data.labels[:BATCH]
    budget = bytes_of(model_of(like, seed, data), batch[0])
    plan = plan_bit_widths(
        network, batch, loss_of, budget=budget, sensitivity="closed_form", method="greedy")
    return QuantBackwardWrapper(network, plan=plan)


def train(way: str, seed: int, data: Data) -> dict[str, Any]:
    """Trains one network: SGD with momentum, cosine schedule, flips."""
    start = time.monotonic()
    model = model_of(way, seed, data)
    optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4, nesterov=True)
    steps = EPOCHS * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(seed)
    stored = bytes_of(model, data.images[:BATCH])
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(TRAIN, generator=generator)
        for chosen in order.split(BATCH)[:TRAIN // BATCH]:
            images = data.images[chosen]
            flipped = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
            optimizer.zero_grad()
            loss = loss_of(model, (images, data.labels[chosen]))
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(data.tests).argmax(1) == data.answers
    return {
        "way": way, "seed": seed, "accuracy": 100 * right.double().mean().item(), "bytes": stored,
        "seconds": time.monotonic() - start}


def training(options: argparse.Namespace) -> list[list[str]]:
    """Runs what is missing, as long as there is time, and returns the rows of what there is."""
    path: Path = options.out
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    done = {(run["way"], run["seed"]) for run in found}
    data, start = Data(options.data), time.monotonic()
    for way, seed in ((way, seed) for seed in SEEDS for way in TRAINED):
        if (way, seed) in done or time.monotonic() - start > 60 * options.minutes:
            continue
        found.append(train(way, seed, data))
        print(found[-1], file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
    rows, exact = [], 0.0
    for way in TRAINED:
        runs = [run for run in found if run["way"] == way]
        if runs:
            stored = mean(run["bytes"] for run in runs)
            exact = exact or stored
            each = ", ".join(f"{run['accuracy']:.1f}" for run in runs)
            accuracy = mean(run["accuracy"] for run in runs)
            rows.append([
                way, f"{stored / 2**20:.2f}", f"{exact / stored:.2f}", f"{accuracy:.1f} %", each])
    return rows


def indicator_rows() -> list[list[str]]:
    """Returns mean learning indicators at initialization, by place in the run."""
    torch.manual_seed(0)
    subjects: dict[str, tuple[nn.Module, Tensor]] = {
        "ResNet-18, ARA": (residual()(resnet18()), torch.randn(8, 3, 64, 64)),
        "ResNet-18, ASA": (signs(resnet18()), torch.randn(8, 3, 64, 64)),
        "transformer, ARA": (post_norm()(transformer()), torch.randn(4, 32, 256)),
        "transformer, ASA": (signs_of("up", "down", "out")(transformer()), torch.randn(4, 32, 256))}
    rows = []
    for name, (network, x) in subjects.items():
        with watch_learning_indicators(network) as found:
            network(x)
        means = [float(values.mean()) for values in found.values()]
        above = [float((values > 0).double().mean()) for values in found.values()]
        rows.append([
            name, str(len(means)), f"{mean(means):.3f}", f"{min(means):.3f}", f"{max(means):.3f}",
            f"{100 * mean(above):.0f} %"])
    return rows


class AddsSigns:
    """A forward pre-hook: the input that a layer with auxiliary signs has, for ordinary layers."""

    def __call__(self, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + 0.01 * (args[0] > 0),)


def gradient_rows(draws: int = 32) -> list[list[str]]:
    """Returns cosines between gradients of weights and the exact gradients of the same function."""
    torch.manual_seed(0)
    network, batch = narrow_resnet(), (torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,)))

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact, rows = gradients(network), []
    with_signs = copy.deepcopy(network)
    converted = signs(copy.deepcopy(network))
    names = [name for name, layer in converted.named_modules() if hasattr(layer, "signs")]
    for name in names:
        with_signs.get_submodule(name).register_forward_pre_hook(AddsSigns())
    ways = {
        "ARA": (residual()(copy.deepcopy(network)), exact),
        "ASA": (converted, gradients(with_signs)),
        "default policy, 2 bits": (default()(copy.deepcopy(network)), exact)}
    for way, (model, expected) in ways.items():
        drawn = [gradients(model) for _ in range(draws if "policy" in way else 1)]
        one, mean_of_all = [], []
        for name in (f"{n}.weight" for n in names):
            total = torch.stack([found[name] for found in drawn]).mean(0)
            # The first block of a run is exact.
            if way != "ARA" or not torch.allclose(total, expected[name], rtol=1e-3):
                for found, values in ((drawn[0][name], one), (total, mean_of_all)):
                    values.append(float(F.cosine_similarity(
                        found.flatten(), expected[name].flatten(), dim=0)))
        rows.append([way, str(len(one)), *(f"{f:.3f}" for f in (
            median(one), min(one), median(mean_of_all), min(mean_of_all)))])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it, nothing is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/auxiliary.json"))
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after so long")
    parser.add_argument("--only", choices=("memory", "train"), help="one part of the study")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.only != "train":
        titles = ["saved by", "MiB", "ratio"]
        print("ResNet-18, batch 8, 224x224")
        show_table(titles, memory_rows(RESNET, resnet18, torch.randn(8, 3, 224, 224)), options.markdown)
        print("Transformer, post-norm, 4 layers of width 256, 16 x 128 tokens")
        x = torch.randn(16, 128, 256)
        show_table(titles, memory_rows(TRANSFORMER, transformer, x), options.markdown)
        print("Learning indicators at initialization: means of layers")
        titles = ["network", "layers", "mean", "least", "largest", "share above 0"]
        show_table(titles, indicator_rows(), options.markdown)
        print("Cosines of gradients with exact ones, narrow ResNet at initialization")
        titles = ["gradient of", "weights", "median", "least", "mean of 32: median", "least"]
        show_table(titles, gradient_rows(), options.markdown)
    if options.only != "memory" and options.data is not None:
        titles = ["saved by", "MiB", "ratio", "accuracy", "of each seed"]
        show_table(titles, training(options), options.markdown)


if __name__ == "__main__":
    main()
