"""Compares the thesis' memory table with what autograd really saves.

    python examples/efficientnet_v2/thesis_memory.py [--batch 128]

Table 4.1 of Li (2025) counts one output per stage at nominal bits: 12,976,128 elements at batch 128,
49.50 MiB in float32, 6.19 MiB at 4 bits and 3.09 MiB at 2 bits. Autograd saves many tensors per stage.
The last columns are bytes of live tensors: codes, padding and metadata included.

Expect 3590 MiB saved in float32, 463 MiB at 4 bits and 238 MiB at 2 bits.
"""

import argparse
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.models import (
    nominal_megabytes,
    stage_output_elements,
    thesis_efficientnet_v2,
)
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)


def saved_by_stage(report: SavedMemoryReport, stages: dict[str, str]) -> dict[str, list[int]]:
    """Return exact and stored bytes of each stage; a row's module name starts with its stage's name."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in report.rows:
        stage = next(
            (s for s, name in stages.items() if f"{row.module}.".startswith(f"{name}.")), "rest")
        totals[stage][0] += row.exact_bytes
        totals[stage][1] += row.stored_bytes
    return totals


def measure(model: nn.Module, images: torch.Tensor) -> SavedMemoryReport:
    """Measure the saved memory of one forward pass."""
    with track_saved_memory(model) as report:
        loss = model(images).logsumexp(1).mean()
    del loss
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = thesis_efficientnet_v2()
    shape = (options.batch, 3, 32, 32)
    elements = stage_output_elements(model, shape)
    names = {id(module): name for name, module in model.named_modules()}
    stages = {stage: names[id(module)] for stage, module in model.named_stages().items()}
    images = torch.randn(shape)
    configs = {
        2: ShiftedUint2DynamicActPerBucketFloatStochastic,
        4: ShiftedUint4DynamicActPerBucketFloatStochastic}
    saved = {bits: saved_by_stage(measure(QuantBackwardWrapper(
        model, config, policy="all", metadata_dtype=torch.bfloat16), images), stages)
        for bits, config in configs.items()}
    table = Table(title=f"Thesis network, batch {options.batch}, MB of 2**20 bytes")
    for column in ("stage", "elements", "nominal fp32", "nominal 4 bit", "nominal 2 bit",
                   "saved fp32", "saved 4 bit", "saved 2 bit"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in [*elements, "rest"]:
        count = elements.get(stage, 0)
        nominal = [nominal_megabytes(count, bits) for bits in (32, 4, 2)]
        measured = [saved[2][stage][0], saved[4][stage][1], saved[2][stage][1]]
        table.add_row(stage, f"{count:,}", *(f"{n:.3f}" for n in nominal),
                      *(f"{b / 2**20:.3f}" for b in measured))
    total = sum(elements.values())
    sums = [sum(s[i] for s in saved[bits].values()) for bits, i in ((2, 0), (4, 1), (2, 1))]
    table.add_section()
    table.add_row("total", f"{total:,}", *(f"{nominal_megabytes(total, b):.2f}" for b in (32, 4, 2)),
                  *(f"{b / 2**20:.2f}" for b in sums))
    Console().print(table)


if __name__ == "__main__":
    main()
