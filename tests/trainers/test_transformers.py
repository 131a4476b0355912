"""Hugging Face's Trainer on models whose body is wrapped."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_first  # noqa: F401
from safetensors.torch import load_file
from sentences import LENGTH
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers_trainer import CONFIGS, Knobs, build, data, trainer, wrap

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.trainers import TransformersMemory, TransformersNoise
from tests.trainers.support import same_parameters

KNOBS = Knobs(sentences=64, batch=16, epochs=2)
NAMES = list(CONFIGS)


def batch(name: str, rows: int = 8) -> dict[str, Tensor]:
    found = data(name, rows, seed=3)
    return {key: torch.tensor([row[key] for row in found]) for key in found[0] if key != "sentence"}


def fit(name: str, out: Path, **changes: Any) -> PreTrainedModel:
    knobs = dataclasses.replace(KNOBS, model=name, **{
        key: changes.pop(key) for key in ("epochs", "keep_noise") if key in changes})
    resume = changes.pop("resume", False)
    model = wrap(build(name), seed=0)
    trainer(model, out, knobs, **changes).train(resume_from_checkpoint=resume)
    return model


class StopAfterOne(TrainerCallback):
    """Ends a run of two epochs after the first; the learning rate is that of the whole run."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("kept", [True, False], ids=["with its noise", "without"])
def test_a_resumed_run_is_the_uninterrupted_one(kept: bool, tmp_path: Path) -> None:
    whole = fit("bert", tmp_path / "whole", keep_noise=kept)
    knobs = dataclasses.replace(KNOBS, keep_noise=kept)
    first = trainer(wrap(build("bert"), seed=0), tmp_path / "parts", knobs)
    first.add_callback(StopAfterOne())
    first.train()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-4"]
    resumed = fit("bert", tmp_path / "parts", keep_noise=kept, resume=True)
    assert same_parameters(resumed, whole) is kept


@pytest.mark.parametrize("name", NAMES)
def test_trainer_sees_the_model_it_knows(name: str, tmp_path: Path) -> None:
    model = wrap(build(name))
    run = trainer(model, tmp_path, dataclasses.replace(KNOBS, model=name))
    assert run.label_names == ["labels"]
    assert run.can_return_loss == inspect.signature(
        type(model).forward).parameters.get("return_loss", False)
    metrics = run.evaluate()
    assert metrics["eval_loss"] > 0
    assert "sentence" not in run._signature_columns and "input_ids" in run._signature_columns


def test_wrapped_as_a_whole_trainer_finds_no_columns(tmp_path: Path) -> None:
    """The control for wrapping the body only."""
    run = trainer(QuantBackwardWrapper(build("bert")), tmp_path, KNOBS)
    with pytest.raises(ValueError, match="The batch received was empty"):
        run.train()
    given = trainer(
        QuantBackwardWrapper(build("bert")), tmp_path, KNOBS, remove_unused_columns=False,
        label_names=["labels"], max_steps=1)
    for dataset in (given.train_dataset, given.eval_dataset):
        for row in dataset:
            del row["sentence"]
    given.train()
    assert given.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_are_plain_ones(name: str, tmp_path: Path) -> None:
    model = fit(name, tmp_path, max_steps=2, save_steps=2, save_strategy="steps")
    folder = tmp_path / "checkpoint-2"
    model.save_pretrained(tmp_path / "ours")
    build(name).save_pretrained(tmp_path / "plain")
    keys = load_file(tmp_path / "plain/model.safetensors").keys()
    assert load_file(folder / "model.safetensors").keys() == keys
    assert load_file(tmp_path / "ours/model.safetensors").keys() == keys
    plain = type(model).from_pretrained(folder).eval()
    assert same_parameters(plain, model)
    assert torch.equal(plain(**batch(name)).logits, model.eval()(**batch(name)).logits)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    if name == "gpt2":  # tied weights, so one of the two is left out
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "lm_head.weight" not in keys


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_identical_and_exact_gradients_equal(name: str, attention: str) -> None:
    found: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    for policy in ("plain", "exact", "op_aware"):
        model = build(name).train()
        model.set_attn_implementation(attention)
        if policy != "plain":
            wrap(model, policy=policy, seed=0)
        assert model.config._attn_implementation == attention
        torch.manual_seed(4)
        outputs = model(**batch(name))
        outputs.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[policy] = outputs, grads
    plain, grads = found.pop("plain")
    for policy, (outputs, ours) in found.items():
        assert type(outputs) is type(plain)
        assert torch.equal(outputs.loss, plain.loss) and torch.equal(outputs.logits, plain.logits)
        assert ours.keys() == grads.keys()
        equal = all(torch.equal(ours[n], g) for n, g in grads.items())
        assert equal is (policy == "exact")


#: Least ratio of saved to stored bytes. Shapes are small, so statistics and heads take a large part.
LEAST = {"bert": 7.0, "gpt2": 6.0, "llama": 5.5}


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_known(name: str) -> None:
    model = wrap(build(name)).train()
    with track_saved_memory(model) as report:
        kept = model(**batch(name, 32))
    assert kept.loss.isfinite()
    assert report.unknown_operations == []
    assert report.ratio > LEAST[name]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_that_of_the_plain_model(name: str) -> None:
    plain, wrapped = build(name).eval(), wrap(build(name)).eval()
    start = batch(name)["input_ids"][:2, :3]
    mask = torch.ones_like(start)
    words = [m.generate(start, attention_mask=mask, max_length=LENGTH, do_sample=False)
             for m in (plain, wrapped)]
    assert torch.equal(*words)
    cached = wrapped(start, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 3
    following = wrapped(start[:, :1], past_key_values=cached.past_key_values)
    assert following.logits.requires_grad


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_is_switched_on_inside(name: str, tmp_path: Path) -> None:
    plain, wrapped = build(name).train(), wrap(build(name), policy="exact").train()
    grads = []
    for model in (plain, wrapped):
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert model.is_activation_checkpointing
        torch.manual_seed(4)
        model(**batch(name), **({"use_cache": False} if name == "llama" else {})).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    fit(name, tmp_path, max_steps=2, activation_checkpointing=True, save_strategy="no")


def test_label_smoothing_and_bfloat16(tmp_path: Path) -> None:
    model = fit(
        "bert", tmp_path, max_steps=2, label_smoothing_factor=0.1, bf16=True, save_strategy="no")
    assert all(p.isfinite().all() for p in model.parameters())
    assert isinstance(model.bert, QuantBackwardWrapper)


def test_noise_is_in_the_state_of_the_trainer(tmp_path: Path) -> None:
    model = fit("bert", tmp_path, epochs=1)
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    (streams,) = state["stateful_callbacks"][TransformersNoise.__name__]["attributes"].values()
    assert streams == {
        "bert": model.bert.noise_state(), "wrapped_loss": model.wrapped_loss.noise_state()}
    assert streams["bert"]["position"] > 0


class Integration(TrainerCallback):
    """Stands for TensorBoard and others, which come before the callbacks of a user."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


@pytest.mark.parametrize("first", [True, False], ids=["added first", "added last"])
def test_what_is_saved_is_logged_by_trainer(first: bool, tmp_path: Path) -> None:
    model = wrap(build("bert"), seed=0)
    run = trainer(
        model, tmp_path, KNOBS, logging_strategy="steps", logging_steps=2, eval_strategy="epoch",
        save_strategy="no")
    integration = Integration()
    run.add_callback(integration)
    with track_saved_memory(model) as report:
        memory = TransformersMemory(report, ("saved_mib", "saved_exact_mib", "saved_live_mib"))
        if first:
            memory.add_to(run)
        else:
            run.add_callback(memory)
        run.train()
    with track_saved_memory(model.train()) as alone:
        kept = model(**batch("bert", KNOBS.batch))
    assert kept.loss.isfinite()
    logged = [row for row in run.state.log_history if "loss" in row]
    assert len(logged) == 4 and report.steps == 8
    for row in logged:
        assert row["saved_mib"] == alone.stored_bytes / 2**20
        assert row["saved_exact_mib"] == alone.exact_bytes / 2**20
        assert row["saved_live_mib"] == 0
    assert not any("saved_mib" in row for row in run.state.log_history if "eval_loss" in row)
    assert all(("saved_mib" in row) is first for row in integration.logged if "loss" in row)


def test_a_report_is_needed() -> None:
    with pytest.raises(TypeError, match="expected the report of track_saved_memory, got str"):
        TransformersMemory("report")  # pyright: ignore[reportArgumentType]
