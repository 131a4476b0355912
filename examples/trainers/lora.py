"""Adapters on a frozen model: saved bytes, plain and wrapped, against full fine-tuning.

    python examples/trainers/lora.py [--batch 8] [--tokens 128] [--markdown]

Measures a Llama of 4 layers of width 256 with random weights, with PEFT's LoRA of rank 8. Needs
`pip install brevitas-bp[trainers]` and no download. Expect 86.1 MiB of saved tensors stored in 19.2 MiB
for full fine-tuning, 75.9 MiB in 17.4 MiB for adapters of all linear layers, and 123.7 MiB in 19.2 MiB
for these adapters with dropout.

A frozen layer saves no input: its weight needs no gradient. With adapters, autograd still saves factors
of the gradient that passes through (derivatives, factors, attention) and the inputs of the adapters.
"""

import argparse
import math
from collections.abc import Callable
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


def wrap_body(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Wraps the model without its head, in place."""
    model.model = QuantBackwardWrapper(
        model.model, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0)
    return model


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    ids = torch.randint(0, 1000, (options.batch, options.tokens))
    cells = []
    for name, adapt in WAYS.items():
        model = adapt(wrap_body(base())).train()
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


if __name__ == "__main__":
    main()
