"""Bytes that BERT, GPT-2 and Llama save for backward, and the part that stays exact.

    python examples/trainers/transformers_memory.py [--only bert] [--batch 8] [--tokens 128] [--markdown]

Models have random weights; nothing is downloaded. Body and loss are wrapped at the default policy
(2 bits, bucket 256, bfloat16 metadata). Bytes are those of the whole model with its loss. The column
"most of what is stored" names the operations that keep most. Needs `pip install brevitas-bp[trainers]`,
and enough memory for a GPT-2. Expect the table of docs/trainers.md.
"""

import argparse
import gc
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision_first  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)
from transformers_trainer import wrap

from brevitas_bp import OpAware, SavedMemoryReport, track_saved_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from tables import show_table

CONFIGS: dict[str, Any] = {
    "bert, 2 x 128": lambda: BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
    "bert, 12 x 768": BertConfig,
    "gpt2, 12 x 768": GPT2Config,
    "gpt2, 12 x 768, fused GELU": lambda: GPT2Config(activation_function="gelu_pytorch_tanh"),
    "llama, 4 x 512": lambda: LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8),
    "llama, 8 x 768": lambda: LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4),
}
POLICIES = {
    "default": OpAware(),
    "q and k exact": OpAware(attention_bits=None),
}


def build(config: Any, attention: str, policy: OpAware) -> PreTrainedModel:
    """Builds a model with random weights, and wraps its body and its loss."""
    config._attn_implementation = attention
    causal = not isinstance(config, BertConfig)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = wrap(
        auto.from_config(config), policy=policy, bucket_size=256, metadata_dtype=torch.bfloat16, seed=0)
    return model.train()


def measure(
        model: PreTrainedModel, batch: int, tokens: int, autocast: bool) -> SavedMemoryReport:
    """Measures the saved bytes of one forward pass."""
    ids = torch.randint(0, 1000, (batch, tokens))
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    labels = ids if causal else torch.zeros(batch, dtype=torch.long)
    with track_saved_memory(model) as report, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert kept.loss.isfinite()
    return report


def largest(report: SavedMemoryReport, count: int = 3) -> str:
    """Names the operations that store most, and their part of the stored bytes."""
    stored: defaultdict[str, int] = defaultdict(int)
    for row in report.rows:
        stored[row.op] += row.stored_bytes
    most = sorted(stored, key=lambda op: -stored[op])[:count]
    return ", ".join(f"{op} {stored[op] / report.stored_bytes:.0%}" for op in most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="part of the name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    cells = []
    for name, config in CONFIGS.items():
        for attention in ("sdpa", "eager"):
            for policy in POLICIES if attention == "sdpa" else ["default"]:
                if options.only not in name:
                    continue
                torch.manual_seed(0)
                report = measure(
                    build(config(), attention, POLICIES[policy]), options.batch, options.tokens,
                    options.autocast)
                cells.append([
                    name, attention, policy, f"{report.exact_bytes / 2**20:.1f}",
                    f"{report.stored_bytes / 2**20:.1f}", f"{report.ratio:.2f}", largest(report),
                    ", ".join(report.unknown_operations) or "-"])
                gc.collect()
    show_table(
        ["model", "attention", "policy", "saved MiB", "stored MiB", "ratio", "most of what is stored",
         "no rule"], cells, options.markdown)


if __name__ == "__main__":
    main()
