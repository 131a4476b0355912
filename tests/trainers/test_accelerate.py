"""Hugging Face Accelerate: precision, accumulation, clipping, and states that resume bit for bit."""

import dataclasses
from pathlib import Path

import accelerate
import accelerate_digits
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from accelerate_digits import Knobs, train
from digits import digits, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.trainers.support import same_parameters

KNOBS = Knobs(epochs=2, limit=200)


class WithoutNoise:
    """The control: takes the place of the noise state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kept", [True, False], ids=["with its noise", "without"])
def test_a_resumed_run_is_the_uninterrupted_one(
        kept: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(accelerate_digits, "NoiseState", WithoutNoise)
    knobs = dataclasses.replace(KNOBS, precision=precision)
    whole, _ = train(tmp_path / "whole", knobs)
    train(tmp_path / "parts", dataclasses.replace(knobs, epochs=1))
    resumed, _ = train(tmp_path / "parts", knobs, resume=True)
    assert same_parameters(resumed, whole) is kept


def step(model: nn.Module, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns a prepared model's loss, and gradients after accumulating two batches and clipping."""
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(0)
    images, labels = digits(True, 100).tensors
    for part in (slice(50), slice(50, 100)):
        with accelerator.accumulate(prepared):
            loss = cross_entropy(prepared(images[part]), labels[part])
            accelerator.backward(loss)
    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
    assert accelerator.sync_gradients
    assert isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer)
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def pair(policy: str) -> tuple[nn.Module, QuantBackwardWrapper]:
    """Returns one network twice; the second is wrapped."""
    torch.manual_seed(0)
    plain = network().module
    torch.manual_seed(0)
    return plain, QuantBackwardWrapper(network().module, policy=policy, seed=1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_models_have_the_losses_and_gradients_of_plain_ones(precision: str) -> None:
    for policy, same in (("exact", True), ("op_aware", False)):
        plain, wrapped = pair(policy)
        (loss, grads), (ours, our_grads) = step(plain, precision), step(wrapped, precision)
        assert grads.keys() == our_grads.keys()
        assert all(torch.equal(g, our_grads[n]) for n, g in grads.items()) is same
        assert torch.equal(loss, ours) or not same
        total = torch.stack([g.square().sum() for g in our_grads.values()]).sum().sqrt()
        # Clipping divides by the norm + 1e-6; the sums are in float32.
        assert float(total) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_unwrapping_gives_the_users_wrapper_back(precision: str, tmp_path: Path) -> None:
    wrapped = network()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared = accelerator.prepare(wrapped)
    images = digits(True, 50).tensors[0]
    with track_saved_memory(prepared) as report:
        kept = prepared(images)
    assert report.ratio > 4
    assert kept.dtype == torch.float32
    for unwrapped in (
            accelerator.unwrap_model(prepared), extract_model_from_parallel(prepared),
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)):
        assert unwrapped is wrapped
    accelerator.save_model(prepared, str(tmp_path), safe_serialization=True)
    from safetensors.torch import load_file
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == wrapped.module.state_dict().keys()
