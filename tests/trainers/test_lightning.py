"""PyTorch Lightning: the wrapper in a LightningModule, and a callback that saves the noise."""

from pathlib import Path
from typing import Any

import lightning_digits
import pytest
import torch
from digits import digits
from lightning_digits import BackwardMemory, Digits, train

from brevitas_bp import QuantBackwardWrapper, UnknownNameError
from tests.trainers.support import same_parameters

pytestmark = [
    pytest.mark.filterwarnings(rf"ignore:{message}:{category}:lightning\..*") for message, category in [
        (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "FutureWarning"),
        ("The '.*_dataloader' does not have many workers", "UserWarning"),
        ("Checkpoint directory .* exists and is not empty", "UserWarning"),
        ("Consider setting `persistent_workers=True`", "UserWarning")]]

STEPS = 4 * 50


class OnlyTorch(BackwardMemory):
    """The control: torch's random state is restored, but the noise is not."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])


@pytest.mark.parametrize(("memory", "same"), [(BackwardMemory, True), (OnlyTorch, False)])
def test_a_resumed_run_is_the_uninterrupted_one(
        memory: type[BackwardMemory], same: bool, tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", 2, limit=STEPS, memory=memory())
    train(tmp_path / "parts", 1, limit=STEPS, memory=memory())
    resumed, trainer = train(
        tmp_path / "parts", 2, limit=STEPS, memory=memory(), checkpoint=tmp_path / "parts/last.ckpt")
    assert trainer.current_epoch == 2
    assert same_parameters(resumed, whole) is same


def test_what_is_saved_is_logged(tmp_path: Path) -> None:
    _, trainer = train(tmp_path, 1, limit=STEPS)
    logged = trainer.callback_metrics
    assert logged["saved_ratio"] > 8
    # At least outputs of convolutions and norms are saved: 50 images, 64 pixels, 32 + 64 + 64 channels.
    floats = 2 * 50 * 64 * 160
    assert logged["saved_mib"] * logged["saved_ratio"] > 4 * floats / 2**20


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
