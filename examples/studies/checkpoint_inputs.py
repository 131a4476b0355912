"""Measures the cost to the gradient, and the bytes saved, of recomputing blocks from rounded inputs.

    python examples/studies/checkpoint_inputs.py [--models gpt,vit] [--draws 20] [--markdown]

The study stores four networks (those of gradient_quality.py) in these ways:

- Every block checkpointed.
- Every block checkpointed, the inputs of the blocks rounded to 8, 4 or 2 bits, and all else exact.
- Every block checkpointed, block inputs at 4 bits, and 2 bits for everything else (stem, head, loss).
- No checkpointing, everything at 2 bits.

At 2 bits, batch norms take 4 bits. Bytes are those that autograd keeps after the forward pass. Backward
needs the saved tensors of the block that it recomputes on top of them. Signal, noise and bias are
medians over the parameters; the largest bias is given too. "cosine" is the average cosine between one
gradient of the whole network and the exact gradient. The script appends each result at once, and does
not measure it again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gradient_quality import prepare, saved, wrap
from tables import show_table
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp import quant as configs
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.backward.saved import Decision, SavedTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from networks import Checkpointed, Task

#: Network -> its blocks. Checkpointing recomputes them one by one.
BLOCKS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "gpt": lambda model: list(model.blocks),
    "vit": lambda model: list(model.encoder.layers),
    "resnet50": lambda model: [
        block for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
        for block in stage],
    # All stages but the stem and the last convolution.
    "efficientnet_v2_s": lambda model: [block for stage in model.features[1:-1] for block in stage],
}


class InputsOnly(OpAware):
    """Rounds the inputs of checkpointed blocks, and keeps all else exact."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        return decision if saved.op == "checkpoint" else decision._replace(codec=None)

    def rewrite(self, function: Any) -> None:
        return None


@dataclass(frozen=True)
class Way:
    """One way to store a network.

    Attributes:
        checkpointed: whether blocks are recomputed.
        input_bits: bits of the blocks' inputs; None: exact.
        rest_bits: bits of all other saved tensors; None: exact.
    """

    checkpointed: bool = True
    input_bits: int | None = None
    rest_bits: int | None = None

    def wrapped(self, name: str, model: nn.Module, inputs: Tensor) -> QuantBackwardWrapper:
        """Returns a network of :data:`BLOCKS`, stored in this way."""
        if self.checkpointed:
            model = Checkpointed(Task(model, inputs, BLOCKS[name](model)))
        aware = OpAware(
            norm_bits=None if name in ("gpt", "vit") else 4,
            checkpoint_quant=None if self.input_bits is None else quantizer(self.input_bits))
        if self.rest_bits is not None:
            return wrap(model, bit_width=self.rest_bits, policy=aware)
        return wrap(model, policy=InputsOnly(checkpoint_quant=aware.checkpoint_quant))


WAYS: dict[str, Way] = {
    "checkpoint": Way(), "checkpoint, 8-bit inputs": Way(input_bits=8),
    "checkpoint, 4-bit inputs": Way(input_bits=4), "checkpoint, 2-bit inputs": Way(input_bits=2),
    "checkpoint, 4-bit inputs, rest 2 bits": Way(input_bits=4, rest_bits=2),
    "no checkpoint, 2 bits": Way(checkpointed=False, rest_bits=2),
}


def quantizer(bits: int) -> type:
    """Returns the rotated quantizer of a width, with the bucket size and metadata of all studies."""
    config = getattr(configs, f"RotatedNormal{bits}DynamicActPerBucketFloat")
    return config.let(bucket_size=256, metadata_dtype=torch.bfloat16)


def measure(name: str, way: str, draws: int) -> dict[str, Any]:
    """Measures bytes and errors of one network stored in one way."""
    model, inputs, run = prepare(name)
    exact_bytes = saved(model, run).exact_bytes
    wrapped = WAYS[way].wrapped(name, model, inputs)
    stored_bytes = saved(wrapped, run).stored_bytes
    print(f"{name}, {way}", file=sys.stderr)
    error = measure_gradient_error(wrapped, run, draws=draws, progress=True)
    return {
        "network": name, "stored as": way, "draws": draws, "MiB": stored_bytes / 2**20,
        "ratio": exact_bytes / stored_bytes, "signal": error.median("signal"),
        "noise": error.median("noise"), "bias": error.median("bias"),
        "largest bias": error.largest("bias"), "cosine": error.total.cosine}


def show(rows: list[dict[str, Any]], markdown: bool) -> None:
    """Prints the table, on the console or as Markdown."""
    formats = {"MiB": ".2f", "ratio": ".2f", "signal": ".3f", "noise": ".3f", "bias": ".4f",
               "largest bias": ".3f", "cosine": ".4f"}
    cells = [[format(value, formats.get(key, "")) for key, value in row.items()] for row in rows]
    show_table(list(rows[0]), cells, markdown, width=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(BLOCKS))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint_inputs.jsonl"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(BLOCKS):
        parser.error(f"unknown models {sorted(unknown)}; expected some of {sorted(BLOCKS)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(row["network"], row["stored as"]): row for row in map(json.loads, lines)}
    for key in ((name, way) for name in chosen for way in WAYS):
        if key not in done:
            done[key] = measure(*key, options.draws)
            with options.out.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
    show([done[name, way] for name in chosen for way in WAYS], options.markdown)


if __name__ == "__main__":
    main()
