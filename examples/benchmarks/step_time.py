"""A training step: plain, wrapped, checkpointed, offloaded; in turns, in one run.

    python examples/benchmarks/step_time.py [--model efficientnet_v2_s] [--batch 32] [--rounds 5]

Every variant runs the same step (forward, loss, backward) on the same batch. "x plain" is the ratio of
the smallest times; saved bytes are those of live tensors. Models: efficientnet_v2_s (CIFAR stem),
resnet50, vit (four blocks of width 256), gpt (four blocks of width 256), or "every".
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, show
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory
from brevitas_bp import quant as configs
from brevitas_bp.models import efficientnet_v2

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))
from small_gpt import SmallGPT
from vision import import_torchvision

WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Task:
    """A network, an input, and the parts of the network that checkpointing recomputes."""

    model: nn.Module
    inputs: Tensor
    parts: list[nn.Module]


def efficientnet(batch: int, size: int) -> Task:
    """EfficientNetV2-S with a stem for small images."""
    model: Any = efficientnet_v2.efficientnet_v2_s(num_classes=10, stem_stride=1)
    return Task(
        model, torch.randn(batch, 3, size, size), [layer for part in model.features for layer in part])


def resnet(batch: int, size: int) -> Task:
    """torchvision's ResNet-50."""
    import_torchvision()
    model = import_torchvision("torchvision.models").resnet50(weights=None)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    return Task(model, torch.randn(batch, 3, size, size), [block for s in stages for block in s])


def vit(batch: int, size: int) -> Task:
    """torchvision's ViT of four blocks."""
    import_torchvision()
    transformer = import_torchvision("torchvision.models.vision_transformer").VisionTransformer(
        size, 4, 4, 8, 256, 1024)
    return Task(transformer, torch.randn(batch, 3, size, size), list(transformer.encoder.layers))


def gpt(batch: int, size: int) -> Task:
    """A GPT of four blocks; ``size`` times eight tokens."""
    model = SmallGPT(context=8 * size, width=256, heads=8)
    return Task(model, torch.randint(256, (batch, 8 * size)), list(model.blocks))


#: Name -> task and default batch.
TASKS: dict[str, tuple[Callable[[int, int], Task], int]] = {
    "efficientnet_v2_s": (efficientnet, 32), "resnet50": (resnet, 32), "vit": (vit, 64),
    "gpt": (gpt, 16)}


def step(model: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
    """Forward, loss, backward."""
    model(inputs).logsumexp(-1).mean().backward()


class Checkpointed(nn.Module):
    """Recomputes each part of a network in backward."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.parts = task.model, task.parts

    def forward(self, inputs: Tensor) -> Tensor:
        forwards = [part.forward for part in self.parts]
        for part, forward in zip(self.parts, forwards):
            part.forward = partial(checkpoint, forward, use_reentrant=False)
        try:
            return self.model(inputs)
        finally:
            for part in self.parts:
                del part.forward


def with_rounded_inputs(task: Task) -> QuantBackwardWrapper:
    """Recomputes each part from an input of 2 bits; what the rest saves takes 2 bits too."""
    quantizer = configs.ShiftedUint2DynamicActPerBucketFloatStochastic.let(
        metadata_dtype=torch.bfloat16)
    return QuantBackwardWrapper(
        Checkpointed(task), quantizer, policy=OpAware(checkpoint_quant=quantizer))


def measure(name: str, batch: int | None, size: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way to keep saved tensors."""
    torch.manual_seed(0)
    build, usual = TASKS[name]
    task = build(batch or usual, size)
    models: dict[str, Callable[[Tensor], Tensor]] = {"plain": task.model}
    for bits in WIDTHS:
        quantizer = getattr(configs, f"ShiftedUint{bits}DynamicActPerBucketFloatStochastic")
        models[f"ours, {bits} bits"] = QuantBackwardWrapper(
            task.model, quantizer, metadata_dtype=torch.bfloat16)
    models["ours, 2 bits, policy all"] = QuantBackwardWrapper(
        task.model, policy="all", metadata_dtype=torch.bfloat16)
    models["checkpoint, each block"] = Checkpointed(task)
    models["checkpoint, 2-bit inputs"] = with_rounded_inputs(task)

    def offloaded() -> None:
        with save_on_cpu():
            step(task.model, task.inputs)

    variants = {key: partial(step, model, task.inputs) for key, model in models.items()}
    seconds = interleaved({**variants, "save_on_cpu": offloaded}, rounds)

    def saved(key: str) -> int:
        model = models.get(key, task.model)
        with track_saved_memory(model if isinstance(model, nn.Module) else task.model) as report:
            loss = model(task.inputs).sum()
        stored = report.stored_bytes
        del loss
        return stored

    plain_bytes = saved("plain")
    rows = []
    for key, time in seconds.items():
        stored = saved(key)
        rows.append({
            "model": name, "variant": key, "ms": time * 1e3, "x plain": time / seconds["plain"],
            "saved MiB": stored / 2**20, "bytes ratio": plain_bytes / stored})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet_v2_s", choices=[*TASKS, "every"])
    parser.add_argument("--batch", type=int, help="the model's own by default")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step_time.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(TASKS) if options.model == "every" else [options.model]
    rows = [
        row for name in names
        for row in measure(name, options.batch, options.size, options.rounds)]
    show(f"a training step, {options.size} px, {options.threads} threads", rows, options.out)


if __name__ == "__main__":
    main()
