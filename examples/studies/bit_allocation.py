"""Do planned bits lose less of the gradient than uniform bits at equal bytes? Measured on CIFAR-10.

    python examples/studies/bit_allocation.py [--models efficientnet_v2_tiny,resnet18] [--draws 16]

Measures for each network, after a few steps of training:

1. The rank correlation, over its saved tensors, of two errors of the gradient at 2 bits: the error that
   each estimator predicts, and the error measured with other draws.
2. The error of the whole gradient, E |g~ - g|^2 / |g|^2, at uniform bits and at plans that take as many
   live bytes.
3. Plans at an average of 1.5 bits, with candidates below one bit (Average Quantization) and without.

The plan predicts its errors; measured errors are means over draws that no plan has seen. The script
appends each result at once. A stopped run continues where it stopped.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from tables import show_table
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, quant, track_saved_memory
from brevitas_bp.allocate import BitPlan, Candidate, Empirical, measure_gradient_error
from brevitas_bp.allocate.planning import CANDIDATES, plan_bit_widths
from brevitas_bp.allocate.profile import Profile
from brevitas_bp.allocate.sensitivity import ESTIMATORS
from brevitas_bp.errors import InfeasibleBudgetError
from brevitas_bp.models import efficientnet_v2

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from data import Source, load_dataset
from train import CACHE
from vision import import_torchvision

Batch = tuple[Tensor, Tensor]
OPTIONS: dict[str, Any] = {"bucket_size": 256, "metadata_dtype": torch.bfloat16}
#: Uniform bits -> quantizer.
UNIFORM = {
    "2 bits": "RotatedNormal2DynamicActPerBucketFloat",
    "2 bits, stochastic": "ShiftedUint2DynamicActPerBucketFloatStochastic",
    "3 bits": "RotatedNormal3DynamicActPerBucketFloat",
    "2/4 bits, mixed at 0.5": "RotatedNormal2Mix4DynamicActPerBucketFloat",
}
PLAIN = tuple(c for c in CANDIDATES if Candidate.parse(c).average_size == 1)
# Number of tensors whose error is measured one by one.
SAMPLE = 40


def torchvision_model(name: str) -> nn.Module:
    """Returns a torchvision model for ten classes."""
    import_torchvision()
    return import_torchvision("torchvision.models").get_model(name, weights=None, num_classes=10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_v2_tiny": lambda: efficientnet_v2.efficientnet_v2_tiny(stem_stride=2),
    "efficientnet_v2_s": lambda: efficientnet_v2.efficientnet_v2_s(num_classes=10),
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
}


def batches(count: int, size: int) -> list[Batch]:
    """Returns CIFAR-10, normalised."""
    data = load_dataset("cifar10", Source(CACHE, False, 32, count * size, size))
    images = (data.train.images.float() - data.mean) / data.std
    return list(zip(images.split(size), data.train.labels.split(size)))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(name: str, steps: list[Batch]) -> nn.Module:
    """Returns a network after a few steps of AdamW."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in steps:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def live_bytes(model: nn.Module, batch: Batch) -> int:
    """Returns the bytes that a forward pass keeps."""
    with track_saved_memory(model) as report:
        kept = loss(model, batch)
    del kept
    return report.stored_bytes


def ranks(model: nn.Module, batch: Batch, draws: int) -> dict[str, float]:
    """Returns the rank correlation of predicted and measured errors, for each estimator."""
    torch.manual_seed(1)
    profile = Profile(QuantBackwardWrapper(model, **OPTIONS), batch, loss)
    chosen = sorted(random.Random(0).sample(
        range(len(profile.groups)), min(SAMPLE, len(profile.groups))))
    two, exact = Candidate(2), profile.exact
    predicted = {
        name: [errors[i][0] for i in chosen]
        for name, e in ESTIMATORS.items() for errors in [e.errors(profile, [two])]}
    measured = []
    for i in chosen:
        # The estimators used draws 0 and 1.
        found = [profile.gradients({i: two}, 2 + draw) for draw in range(draws)]
        measured.append(sum(
            float((a - b).double().square().sum()) for g in found for a, b in zip(g, exact)
            if a is not None and b is not None))
    return {name: float(spearmanr(row, measured).statistic) for name, row in predicted.items()}


def measured_error(model: QuantBackwardWrapper, batch: Batch, draws: int) -> float:
    """Measures E |g~ - g|^2 / |g|^2."""
    torch.manual_seed(1)
    total = measure_gradient_error(model, lambda m: loss(m, batch), draws=draws, seed=99).total
    return (total.variance + max(total.offset, 0.0)) / total.size**2


def compared(model: nn.Module, batch: Batch, draws: int) -> list[dict[str, Any]]:
    """Measures uniform bits, and plans of as many bytes."""
    start = time.perf_counter()
    torch.manual_seed(1)
    plan = plan_bit_widths(
        model, batch, loss, average_bits=4, sensitivity=Empirical(draws=2), progress=True, **OPTIONS)
    rows: list[dict[str, Any]] = [{
        "stored as": "(planning)", "seconds": time.perf_counter() - start, "passes": plan.passes,
        "tensors": len(plan.tensors)}]

    def add(name: str, wrapped: QuantBackwardWrapper, chosen: BitPlan | None) -> None:
        live = live_bytes(wrapped, batch)
        rows.append({
            "stored as": name, "bytes": live, "ratio": plan.exact_bytes / live,
            "predicted": None if chosen is None else chosen.error,
            "measured": measured_error(wrapped, batch, draws)})

    def planned(name: str, chosen: BitPlan) -> None:
        add(name, QuantBackwardWrapper(model, plan=chosen, **OPTIONS), chosen)

    for name, quantizer in UNIFORM.items():
        uniform = QuantBackwardWrapper(model, getattr(quant, quantizer), **OPTIONS)
        add(name, uniform, None)
        planned(f"plan of as many bytes as {name}", plan.within(budget=rows[-1]["bytes"]))
        planned("same, greedy", plan.within(budget=rows[-2]["bytes"], method="greedy"))
    planned("plan, 1.5 bits", plan.within(average_bits=1.5))
    planned("plan, 1.5 bits, none below 1", plan.only(PLAIN).within(average_bits=1.5))
    for share in (20, 16, 12):
        try:
            chosen = plan.within(budget=plan.exact_bytes // share)
        except InfeasibleBudgetError as error:
            print(f"1/{share}: {error}", file=sys.stderr)
            continue
        planned(f"plan, 1/{share} of the exact bytes", chosen)
        break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="efficientnet_v2_tiny,resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="steps of training before measuring")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/allocation.json"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if options.out.exists():
        done = {r["model"]: r for r in map(json.loads, options.out.read_text().splitlines())}
    for name in options.models.split(","):
        if name not in done:
            *steps, batch = batches(options.steps + 1, options.batch)
            model = trained(name, steps)
            done[name] = {
                "model": name, "ranks": ranks(model, batch, options.draws),
                "rows": compared(model, batch, options.draws)}
            with options.out.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    show(done, options.markdown)


def show(done: dict[str, Any], markdown: bool) -> None:
    """Prints two tables."""
    show_table(
        ["network", *(f"rank correlation, {e}" for e in ESTIMATORS)],
        [[name, *(f"{r['ranks'][e]:.3f}" for e in ESTIMATORS)] for name, r in done.items()], markdown)
    cells = []
    for name, result in done.items():
        for row in result["rows"]:
            if "bytes" not in row:
                cells.append([
                    name, f"{row['tensors']} tensors, {row['passes']} backward passes, "
                    f"{row['seconds']:.0f} s", "", "", "", ""])
                continue
            predicted = "-" if row["predicted"] is None else f"{row['predicted']:.3g}"
            cells.append([
                name, row["stored as"], f"{row['bytes'] / 2**20:.2f}", f"{row['ratio']:.1f}",
                predicted, f"{row['measured']:.3g}"])
    show_table(
        ["network", "stored as", "MiB", "ratio", "predicted error", "measured error"], cells, markdown)


if __name__ == "__main__":
    main()
