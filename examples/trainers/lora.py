"""Adapters on a frozen model: saved bytes and the process, plain and wrapped, and full fine-tuning.

    python examples/trainers/lora.py [--batch 8] [--tokens 128] [--markdown]
    python examples/trainers/lora.py --process --batch 16 --tokens 256 [--markdown]

Measures a Llama of 4 layers of width 256 with random weights, with PEFT's LoRA of rank 8. Needs
`pip install brevitas-bp[trainers]` and no download. Model and loss are wrapped.

With ``--process``, each way trains for some steps in its own process under ``brevitas_bp.run``. The
table then has the growth of the resident set over a forward pass, with the loss alive, and the time of
a step. ``MIMALLOC_PURGE_DELAY=0`` makes mimalloc give freed memory back at once.

A frozen layer saves no input: its weight needs no gradient. With adapters, autograd still saves factors
of the gradient that passes through (derivatives, factors, attention) and the inputs of the adapters.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision_first  # noqa: F401
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers_memory import largest, show_table

from brevitas_bp import QuantBackwardWrapper, track_saved_memory

ATTENTION = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LowRankLinear(nn.Module):
    """LoRA by hand: a frozen linear layer plus a trained product of two thin matrices.

    Args:
        frozen: the layer; its parameters get no gradient from now on.
        rank: rank of the product.
        scale: factor on the product.
    """

    def __init__(self, frozen: nn.Linear, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


def base(**changes: Any) -> LlamaForCausalLM:
    """Builds the model without adapters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        **changes}))


def wrapped(model: nn.Module) -> nn.Module:
    """Wraps a model with its loss."""
    return QuantBackwardWrapper(model, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0)


def with_peft(model: nn.Module, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """Adds PEFT's adapters to the layers with these names; all other parameters are frozen."""
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, lora_dropout=dropout))


def by_hand(model: nn.Module, targets: list[str]) -> nn.Module:
    """Adds :class:`LowRankLinear` adapters to the layers with these names."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets:
                setattr(module, name, LowRankLinear(child))
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full fine-tuning": lambda model: model,
    "LoRA, q and v": lambda model: with_peft(model, ATTENTION),
    "LoRA, all linear layers": lambda model: with_peft(model, ALL),
    "LoRA, all, dropout 0.1": lambda model: with_peft(model, ALL, dropout=0.1),
    "LoRA by hand, all": lambda model: by_hand(model, ALL),
}


def resident() -> int:
    """Returns the bytes of the process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def worker(name: str, wrap: bool, batch: int, tokens: int, steps: int) -> dict[str, float]:
    """Trains in this process; returns the growth of a forward pass in MiB and the seconds of a step."""
    model = WAYS[name](base()).train()
    model = wrapped(model) if wrap else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 1000, (batch, tokens))
    growth, seconds, before = 0, [], 0
    # The first two steps compile kernels, and allocate gradients and the optimizer's state.
    for number in range(steps + 2):
        before = before or (resident() if number == 2 else 0)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        if before:
            growth = max(growth, resident() - before)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - start)
        del loss
    return {"growth": growth / 2**20, "seconds": median(seconds[2:])}


def in_process(name: str, wrap: bool, options: argparse.Namespace) -> dict[str, float]:
    """Runs :func:`worker` in its own process, under the allocator of ``brevitas_bp.run``."""
    done = subprocess.run(
        [sys.executable, "-m", "brevitas_bp.run", __file__, "--worker", name, str(int(wrap)),
         str(options.batch), str(options.tokens), str(options.steps)],
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def processes(options: argparse.Namespace) -> None:
    """Prints what the process takes, plain and wrapped."""
    cells = []
    for name in WAYS:
        plain, stored = (in_process(name, wrap, options) for wrap in (False, True))
        cells.append([
            name, f"{plain['growth']:.0f}", f"{stored['growth']:.0f}",
            f"{plain['growth'] / stored['growth']:.1f}",
            f"{stored['seconds'] / plain['seconds']:.2f}"])
    show_table(
        ["what trains", "plain: growth MiB", "wrapped: growth MiB", "ratio", "step, of plain"], cells,
        options.markdown)


def saved_bytes(options: argparse.Namespace) -> None:
    """Prints what autograd saves, plain and wrapped."""
    ids = torch.randint(0, 1000, (options.batch, options.tokens))
    cells = []
    for name, adapt in WAYS.items():
        model = wrapped(adapt(base()).train())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with track_saved_memory(model) as report:
            kept = model(input_ids=ids, labels=ids)
        cells.append([
            name, f"{trained:,}", f"{report.exact_bytes / 2**20:.1f}",
            f"{report.stored_bytes / 2**20:.1f}", f"{report.ratio:.2f}", largest(report)])
        kept.loss.backward()
    show_table(
        ["what trains", "parameters", "plain MiB", "wrapped MiB", "ratio", "most of what is stored"],
        cells, options.markdown)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, *numbers = sys.argv[2:]
        wrap, batch, tokens, steps = map(int, numbers)
        print(json.dumps(worker(name, bool(wrap), batch, tokens, steps)))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--process", action="store_true", help="measure the process")
    parser.add_argument("--steps", type=int, default=10, help="steps of each process")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    (processes if options.process else saved_bytes)(options)


if __name__ == "__main__":
    main()
