"""PyTorch Lightning: the wrapper in a LightningModule, and a callback that saves the noise."""

import pickle
from pathlib import Path
from typing import Any

import lightning_digits
import pytest
import torch
from digits import digits
from lightning_digits import Digits, train
from torch.nn.functional import cross_entropy

from brevitas_bp import QuantBackwardWrapper, UnknownNameError, track_saved_memory
from brevitas_bp.private import function_modes
from brevitas_bp.trainers import LightningMemory, LightningNoise
from tests.trainers.support import same_parameters

pytestmark = [
    pytest.mark.filterwarnings(rf"ignore:{message}:{category}:lightning\..*") for message, category in [
        (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "FutureWarning"),
        ("The '.*_dataloader' does not have many workers", "UserWarning"),
        ("Checkpoint directory .* exists and is not empty", "UserWarning"),
        ("Consider setting `persistent_workers=True`", "UserWarning")]]

STEPS = 4 * 50


class OnlyTorch(LightningNoise):
    """The control: torch's random state is restored, but the noise is not."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])


@pytest.mark.parametrize(("noise", "same"), [(LightningNoise, True), (OnlyTorch, False)])
def test_a_resumed_run_is_the_uninterrupted_one(
        noise: type[LightningNoise], same: bool, tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", 2, limit=STEPS, noise=noise())
    train(tmp_path / "parts", 1, limit=STEPS, noise=noise())
    resumed, trainer = train(
        tmp_path / "parts", 2, limit=STEPS, noise=noise(), checkpoint=tmp_path / "parts/last.ckpt")
    assert trainer.current_epoch == 2
    assert same_parameters(resumed, whole) is same


def test_what_is_saved_is_logged(tmp_path: Path) -> None:
    model, trainer = train(tmp_path, 2, limit=STEPS)
    (memory,) = [c for c in trainer.callbacks if isinstance(c, LightningMemory)]
    assert memory.report is not None
    assert (memory.report.steps, memory.report.live_bytes) == (8, 0)
    images, labels = digits(True, 50).tensors
    with track_saved_memory(model.train()) as alone:
        loss = cross_entropy(model.network(images), labels)
    assert loss.requires_grad
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Lightning keeps float32.
    assert logged["saved_mib"] == pytest.approx(alone.stored_bytes / 2**20, rel=1e-6)
    assert logged["saved_ratio"] == pytest.approx(alone.ratio, rel=1e-6)
    assert logged["saved_peak_mib"] == logged["saved_mib"]
    assert alone.ratio > 8


def test_an_exception_ends_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Digits, batch: Any, batch_idx: int) -> Any:
        assert len(function_modes()) > len(before)  # the control: it tracks
        raise ArithmeticError

    before = function_modes()
    monkeypatch.setattr(Digits, "training_step", fails)
    with pytest.raises(ArithmeticError):
        train(tmp_path, 1, limit=STEPS)
    assert function_modes() == before


def test_figures_have_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'saved_mib'"):
        LightningMemory(["saved_mb"])


def test_callbacks_are_pickled_by_name() -> None:
    memory = pickle.loads(pickle.dumps(LightningNoise()))
    assert type(memory) is LightningNoise


def test_checkpoints_fit_the_plain_network(tmp_path: Path) -> None:
    wrapped, _ = train(tmp_path, 1, limit=STEPS)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = Digits()
    assert isinstance(plain.network, QuantBackwardWrapper)
    plain.network = plain.network.module
    assert plain.state_dict().keys() == saved.keys()
    plain.load_state_dict(saved)
    images = digits(False, 20).tensors[0]
    assert torch.equal(plain.eval().network(images), wrapped.eval().network(images))


def test_a_checkpoint_of_other_wrappers_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, limit=STEPS)
    make = lightning_digits.network
    monkeypatch.setattr(lightning_digits, "network", lambda: QuantBackwardWrapper(make()))
    with pytest.raises(UnknownNameError, match="wrap the same modules as when it was saved"):
        train(tmp_path, 2, limit=STEPS, checkpoint=tmp_path / "last.ckpt")
