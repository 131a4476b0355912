"""Hugging Face's Trainer on a BERT, a GPT-2 or a Llama with random weights; resumes bit for bit.

    python examples/trainers/transformers_trainer.py [--model bert] [--epochs 3] [--resume]

Needs `pip install brevitas-bp[trainers]`, and no download. Expect an evaluation loss of 0.004 (bert),
1.29 (gpt2), 1.46 (llama), and saved tensors 5.7, 5.4 and 4.0 times smaller.

The script wraps the *body* and the *loss* of the model, in place. The model stays what Trainer expects:
a PreTrainedModel whose class defines the names of its labels, the columns it takes, and how it is saved.
A wrapper around the whole model has none of these (see docs/trainers.md). The logits of a language model
take most of its memory, so the loss must be wrapped too.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision_first  # noqa: F401
from sentences import LENGTH, WORDS, examples
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.trainers import TransformersMemory, TransformersNoise

_SIZE = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH}
CONFIGS = {
    "bert": BertConfig(**_SIZE, **_SHAPE, intermediate_size=256),
    "gpt2": GPT2Config(**_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH),
    "llama": LlamaConfig(**_SIZE, **_SHAPE, intermediate_size=172, num_key_value_heads=2),
}


@dataclass(frozen=True)
class Knobs:
    """Settings of a run."""

    model: str = "bert"
    epochs: int = 3
    sentences: int = 1000
    batch: int = 32
    keep_noise: bool = True


def build(name: str) -> PreTrainedModel:
    """Builds the plain model."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    return auto.from_config(CONFIGS[name])


class Loss(nn.Module):
    """A loss function as a module, which can be wrapped."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def wrap(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Wraps the body and the loss of a model, in place."""
    options = {"bucket_size": 64, **options}
    body = model.base_model_prefix
    setattr(model, body, QuantBackwardWrapper(getattr(model, body), **options))
    # As a submodule, its noise is saved with that of the body. It has no parameters.
    model.wrapped_loss = QuantBackwardWrapper(Loss(model.loss_function), **options)
    model.loss_function = model.wrapped_loss.__call__
    return model


def data(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Returns sentences; labels of a language model are the words themselves, without padding."""
    rows = examples(count, seed)
    for row in rows if name != "bert" else []:
        row["labels"] = [
            word if real else -100 for word, real in zip(row["input_ids"], row["attention_mask"])]
    return rows


def trainer(model: nn.Module, out: Path, knobs: Knobs, **arguments: Any) -> Trainer:
    """Returns an ordinary Trainer; the callback is the only addition for the wrapper."""
    settings: dict[str, Any] = {
        "num_train_epochs": knobs.epochs, "per_device_train_batch_size": knobs.batch,
        "learning_rate": 2e-3, "save_strategy": "epoch", "logging_strategy": "epoch",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0}
    return Trainer(
        model=model, args=TrainingArguments(output_dir=str(out), **settings | arguments),
        train_dataset=data(knobs.model, knobs.sentences, seed=0),
        eval_dataset=data(knobs.model, 200, seed=1),
        callbacks=[TransformersNoise()] if knobs.keep_noise else [])


def report_bytes(model: PreTrainedModel, rows: list[dict[str, Any]]) -> str:
    """Describes the saved bytes of one batch."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0] if key != "sentence"}
    with track_saved_memory(model.train()) as report:
        kept = model(**batch)
    return (
        f"batch of {len(rows)}, loss {kept.loss.item():.3f}: {report.exact_bytes / 2**20:.2f} MiB in "
        f"{report.stored_bytes / 2**20:.2f}, {report.ratio:.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(CONFIGS), default=Knobs.model)
    parser.add_argument("--epochs", type=int, default=Knobs.epochs)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    options = parser.parse_args()
    knobs = Knobs(model=options.model, epochs=options.epochs)
    model = wrap(build(knobs.model))
    run = trainer(model, options.out / knobs.model, knobs)
    with track_saved_memory(model) as report:
        TransformersMemory(report).add_to(run)
        run.train(resume_from_checkpoint=options.resume)
    print(run.evaluate())
    print(report.summary())
    print(report_bytes(model, data(knobs.model, 32, seed=2)))


if __name__ == "__main__":
    main()
