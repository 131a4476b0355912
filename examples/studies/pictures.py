"""Draws the pictures of a report and of a plan that the docs show.

    python examples/studies/pictures.py [--figures docs/figures]

Writes saved_memory.png and plan.png: EfficientNetV2-tiny, 16 random images of 32x32 pixels, a plan for
6 % of the exact bytes after 5 steps of training.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brevitas_bp import QuantBackwardWrapper, plan_bit_widths, track_saved_memory
from brevitas_bp.models import efficientnet_v2_tiny
from brevitas_bp.plots import plot_plan

BUDGET = "6%"


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder to write to")
    options = parser.parse_args()
    torch.manual_seed(0)
    net = efficientnet_v2_tiny()
    batch = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(5):
        loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = QuantBackwardWrapper(net, seed=0)
    with track_saved_memory(model) as report:
        loss = loss_of(model, batch)
    print(report.summary(), f"at a loss of {loss:.2f}")
    report.plot(by="module", top=12, path=options.figures / "saved_memory.png")
    plan = plan_bit_widths(net, batch, loss_of, budget=BUDGET, method="greedy")
    print("\n".join(str(plan).splitlines()[-2:]))
    plot_plan(plan, budget=BUDGET, path=options.figures / "plan.png")


if __name__ == "__main__":
    main()
