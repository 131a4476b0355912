"""Measures bytes and the error of the gradient for the networks of ``step_time.py``, stored in few bits.

    python examples/studies/bytes_and_error.py [--models resnet50,gpt] [--draws 4] [--markdown]

The error is ``E |g~ - g|^2 / |g|^2`` of all gradients, taken as one vector. Stochastic rounding with two
bits and exact query and key is the row to compare with. The networks are fresh; the head of the ViT gets
random weights, because torchvision's zeros would let no gradient through.
"""

import argparse
import sys
from pathlib import Path

import torch
from tables import show_table

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp.allocate import measure_gradient_error

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from networks import MORE_TASKS, TASKS
from variants import quantizer, saved_bytes

#: Name -> bits, whether rounding is stochastic, policy.
WAYS: dict[str, tuple[int, bool, OpAware]] = {
    "2 bits, stochastic, q and k exact": (2, True, OpAware(attention_bits=None)),
    "2 bits": (2, False, OpAware()),
    "2 bits, without hints": (2, False, OpAware(hints=False)),
    "2 bits, factors 3, q and k 7": (2, False, OpAware(multiplier_bits=3, attention_bits=7)),
    "1 bit, norms 2": (1, False, OpAware(norm_bits=2)),
    "1 bit": (1, False, OpAware()),
    "1 bit, without hints": (1, False, OpAware(hints=False)),
    "1 bit, factors 3": (1, False, OpAware(multiplier_bits=3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    cells = []
    for name in options.models.split(","):
        torch.manual_seed(0)
        make, batch = MORE_TASKS[name]
        task = make(batch, 32)
        if name == "vit":
            torch.nn.init.normal_(task.model.heads.head.weight, std=0.02)  # type: ignore[union-attr]
        exact = saved_bytes(QuantBackwardWrapper(task.model, policy="exact"), task.inputs)
        for way in options.ways:
            bits, stochastic, policy = WAYS[way]
            model = QuantBackwardWrapper(task.model, quantizer(bits, stochastic), policy=policy)
            stored = saved_bytes(model, task.inputs)
            total = measure_gradient_error(
                model, lambda m, inputs=task.inputs: m(inputs).logsumexp(-1).mean(),
                draws=options.draws).total
            error = (total.variance + max(total.offset, 0.0)) / total.size**2
            cells.append([name, way, f"{stored / 2**20:.1f}", f"{exact / stored:.1f}", f"{error:.3f}"])
            print(*cells[-1], sep=" | ", file=sys.stderr, flush=True)
    show_table(["network", "stored as", "MiB", "ratio", "error"], cells, options.markdown)


if __name__ == "__main__":
    main()
