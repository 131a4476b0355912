"""The training loop: steps, epochs, evaluation, and their complete state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from batches import Batches
from checkpoint import random_state, set_random_state
from data import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from brevitas_bp import QuantBackwardWrapper, check_gradients, track_saved_memory
from brevitas_bp.allocate import Empirical, GradientCheck, Replanner

StepHook = Callable[["Progress"], object]


@dataclass
class Progress:
    """Position of the run, with the sums of the current epoch.

    Attributes:
        epoch: Complete epochs.
        step: Steps done in the current epoch.
        loss_sum: Sum of the losses of those steps.
        seconds: Duration of each of those steps, without the tracked step.
        memory: `SavedMemoryReport.to_dict()` of the epoch's first step.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    lr: float = 0.0
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOptions:
    """Settings of a training step, besides model and data."""

    device: torch.device
    label_smoothing: float
    clip_norm: float
    bfloat16: bool
    channels_last: bool


@dataclass
class Trainer:
    """A model with all state that changes while it trains."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    dataset: Dataset
    batches: Batches
    options: StepOptions
    progress: Progress = field(default_factory=Progress)
    replanner: Replanner | None = None

    def plan(self, budget: str, every: int) -> None:
        """Plan bits within `budget`, again every `every` steps, from the batch of that step."""
        assert isinstance(self.model, QuantBackwardWrapper)
        self.replanner = Replanner(
            self.model,
            lambda _, batch: self._loss(*batch),
            every=every,
            budget=budget,
            sensitivity=Empirical(draws=1),
            candidates=(0.25, 0.5, "2avg2", "1@1024", 1, 2, 3, 4, 6, 8, "exact"),
        )

    def train_epoch(self, on_step: StepHook, stop: Callable[[], bool]) -> bool:
        """Finish the current epoch; return False if `stop` asked to leave before its end."""
        if self.progress.step == 0:
            self.batches.start_epoch()
        self.model.train()
        while self.progress.step < len(self.batches):
            self._step()
            on_step(self.progress)
            if stop():
                return False
        return True

    def _step(self) -> None:
        """Run one optimizer step; the first step of an epoch is tracked for memory, not timed."""
        images, labels = self.batches.next()
        start = self._now()
        self.optimizer.zero_grad(set_to_none=True)
        if self.replanner is not None:
            self.replanner.step((images, labels))
        loss = (
            self._tracked_loss(images, labels)
            if self.progress.step == 0
            else self._loss(images, labels)
        )
        loss.backward()
        if self.options.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.progress.lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.progress.loss_sum += loss.item()
        if self.progress.step > 0:
            self.progress.seconds.append(self._now() - start)
        self.progress.step += 1

    def check_gradients(self) -> GradientCheck | None:
        """Measure how rounding changes the first images' gradient; return None if nothing is rounded."""
        if not isinstance(self.model, QuantBackwardWrapper):
            return None
        train, size = self.dataset.train, self.batches.batch_size
        self.model.train()
        batch = train.images[:size], train.labels[:size]
        return check_gradients(self.model, batch, lambda _, batch: self._loss(*batch), top=0)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._logits(images)
        target = labels.to(self.options.device)
        return F.cross_entropy(logits, target, label_smoothing=self.options.label_smoothing)

    def _tracked_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with track_saved_memory(self.model) as report:
            loss = self._loss(images, labels)
        self.progress.memory = report.to_dict()
        return loss

    def _logits(self, images: Tensor) -> Tensor:
        """Return class scores, float32, of uint8 images."""
        inputs = self._normalise(images.to(self.options.device))
        with torch.autocast(self.options.device.type, torch.bfloat16, self.options.bfloat16):
            return self.model(inputs).float()

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (t.to(images.device) for t in (self.dataset.mean, self.dataset.std))
        inputs = (images.float() - mean) / std
        return (
            inputs.to(memory_format=torch.channels_last) if self.options.channels_last else inputs
        )

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return mean loss and accuracy in percent over the test split."""
        self.model.eval()
        split, size = self.dataset.test, 4 * self.batches.batch_size
        loss, correct = 0.0, 0
        for start in range(0, len(split), size):
            logits = self._logits(split.images[start : start + size])
            labels = split.labels[start : start + size].to(logits.device)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
        return loss / len(split), 100 * correct / len(split)

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate, return the epoch's log row, and begin the next epoch."""
        done = self.progress
        test_loss, test_accuracy = self.evaluate()
        total = done.memory["total"]
        self.progress = Progress(epoch=done.epoch + 1)
        return {
            "epoch": done.epoch + 1,
            "train_loss": done.loss_sum / done.step,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": done.lr,
            "exact_bytes": total["exact_bytes"],
            "stored_bytes": total["stored_bytes"],
            "seconds_per_step": statistics.median(done.seconds) if done.seconds else None,
        }

    def _now(self) -> float:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        return time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a bit-exact continuation needs, also in the middle of an epoch."""
        wrapper = self.model if isinstance(self.model, QuantBackwardWrapper) else None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "random": random_state(self.options.device),
            "noise": None if wrapper is None else wrapper.noise_state(),
            "plan": None if self.replanner is None else self.replanner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was saved."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        self.progress = Progress(**state["progress"])
        set_random_state(state["random"], self.options.device)
        if isinstance(self.model, QuantBackwardWrapper):
            self.model.set_noise_state(state["noise"])
        if self.replanner is not None:
            self.replanner.load_state_dict(state["plan"])
