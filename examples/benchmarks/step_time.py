"""A training step: plain, wrapped, checkpointed, offloaded; in turns, in one run.

    python examples/benchmarks/step_time.py [--model efficientnet_v2_s] [--batch 32] [--rounds 5]

Every variant runs the same step (forward, loss, backward) on the same batch. "x plain" is the ratio of
the smallest times; saved bytes are those of live tensors.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, show
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint_sequential

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp import quant as configs
from brevitas_bp.models import efficientnet_v2

WIDTHS = (2, 4, 8)


def step(model: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Forward, loss, backward."""
    model(images).logsumexp(1).mean().backward()


def checkpointed(model: Any, segments: int) -> Callable[[Tensor], Tensor]:
    """The model with its feature blocks recomputed in backward."""
    blocks = nn.Sequential(*(layer for part in model.features for layer in part))

    def forward(images: Tensor) -> Tensor:
        features = checkpoint_sequential(blocks, segments, images, use_reentrant=False)
        return model.classifier(torch.flatten(model.avgpool(features), 1))

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet_v2_s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step_time.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = getattr(efficientnet_v2, options.model)(num_classes=10, stem_stride=1)
    images = torch.randn(options.batch, 3, options.size, options.size)
    wrapped = {
        f"ours, {bits} bits": QuantBackwardWrapper(
            model, getattr(configs, f"ShiftedUint{bits}DynamicActPerBucketFloatStochastic"),
            metadata_dtype=torch.bfloat16) for bits in WIDTHS}
    recompute = checkpointed(model, segments=6)

    def offloaded() -> None:
        with save_on_cpu():
            step(model, images)

    variants: dict[str, Callable[[], None]] = {"plain": lambda: step(model, images)}
    for name, wrapper in wrapped.items():
        variants[name] = lambda wrapper=wrapper: step(wrapper, images)
    variants["torch.utils.checkpoint, 6 segments"] = lambda: step(recompute, images)
    variants["save_on_cpu"] = offloaded
    seconds = interleaved(variants, options.rounds)

    def saved(name: str) -> int:
        with track_saved_memory(wrapped.get(name, model)) as report:
            loss = (recompute if "checkpoint" in name else wrapped.get(name, model))(images).sum()
        stored = report.stored_bytes
        del loss
        return stored

    plain_bytes = saved("plain")
    rows = []
    for name, time in seconds.items():
        stored = saved(name)
        rows.append({
            "variant": name, "ms": time * 1e3, "x plain": time / seconds["plain"],
            "saved MiB": stored / 2**20, "bytes ratio": plain_bytes / stored})
    title = f"{options.model}, batch {options.batch}, {options.size} px, {options.threads} threads"
    show(title, rows, options.out)


if __name__ == "__main__":
    main()
