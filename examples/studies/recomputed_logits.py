"""Compares recomputed logits with stored probabilities: bytes, time, and error of the gradient.

    python examples/studies/recomputed_logits.py [--markdown]

The network is the Llama of ``small_llama.py`` with the vocabulary of a language model. "Loss" are the
bytes that the cross entropy saves. The time is the shortest of a forward and backward pass. The error is
``|g~ - g| / |g|`` for one draw: of all parameters, of the weight of the head, and of the gradient of the
logits. The last one is measured as the error of a bias, which is added to the head here.
"""

import argparse
import time
from typing import Any

import torch
from small_llama import SmallLlama
from tables import show_table
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory

WAYS: dict[str, Any] = {
    "exact": "exact", "default: 3 bits": OpAware(), "recomputed": OpAware(recompute_logits=True)}


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seconds(model: nn.Module, tokens: Tensor, repeats: int) -> float:
    """Returns the shortest time of a forward and backward pass."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        gradients(model, tokens)
        found.append(time.perf_counter() - start)
    return min(found)


def error(found: dict[str, Tensor], exact: dict[str, Tensor], part: str) -> float:
    off = sum(float((found[n] - g).square().sum()) for n, g in exact.items() if part in n)
    return (off / sum(float(g.square().sum()) for n, g in exact.items() if part in n))**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = SmallLlama(options.vocabulary, options.width)
    model.head.bias = nn.Parameter(torch.zeros(options.vocabulary))
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.tokens + 1))
    exact = gradients(model, tokens)
    cells = []
    for way, policy in WAYS.items():
        wrapped = QuantBackwardWrapper(model, policy=policy, seed=0)
        with track_saved_memory(wrapped) as report:
            loss = wrapped(tokens)
            rows, total = report.rows, report.stored_bytes
        del loss
        of_loss = sum(row.stored_bytes for row in rows if row.op == "cross_entropy")
        found = {n.removeprefix("module."): g for n, g in gradients(wrapped, tokens).items()}
        cells.append([
            way, f"{total / 2**20:.1f}", f"{of_loss / 2**20:.2f}",
            f"{seconds(wrapped, tokens, options.repeats):.2f}",
            *(f"{error(found, exact, part):.3f}" for part in ("", "head.weight", "head.bias"))])
    show_table(
        ["way", "stored MiB", "loss MiB", "seconds", "error, all", "error, head", "error, logits"],
        cells, options.markdown)


if __name__ == "__main__":
    main()
