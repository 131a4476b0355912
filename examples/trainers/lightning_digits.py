"""PyTorch Lightning: train a wrapped network on digits, log what it saves, resume bit for bit.

    python examples/trainers/lightning_digits.py [--epochs 3] [--out runs/lightning] [--resume]

Needs `pip install brevitas-bp[trainers]`. Expect a saved_ratio of 10.6: batches of 50 keep 0.49 MiB.

The wrapper needs no special code. It is an ordinary submodule of the LightningModule, and its keys in
the checkpoint are those of the plain network. `LightningMemory` logs saved bytes. `LightningNoise` keeps
random state in checkpoints.
"""

import argparse
from pathlib import Path

import torch
import torchvision_first  # noqa: F401
from digits import digits, network
from lightning import pytorch as pl
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from brevitas_bp.trainers import LightningMemory, LightningNoise


class Digits(pl.LightningModule):
    """A classifier; only the line that makes the network mentions the wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def train(
        out: Path, epochs: int, *, checkpoint: Path | None = None, limit: int | None = None,
        noise: LightningNoise | None = None) -> tuple[Digits, pl.Trainer]:
    """Trains, from a checkpoint if one is given; writes `last.ckpt` to `out`."""
    pl.seed_everything(0, verbose=False)
    model = Digits()
    callbacks: list[pl.Callback] = [
        pl.callbacks.ModelCheckpoint(out, save_last=True, save_top_k=0, save_on_train_epoch_end=True),
        LightningMemory(), noise or LightningNoise()]
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(
        model, DataLoader(digits(True, limit), batch_size=50, shuffle=True),
        DataLoader(digits(False, limit), batch_size=99), ckpt_path=checkpoint,
        weights_only=True if checkpoint else None)
    return model, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", action="store_true", help="resume from last.ckpt")
    options = parser.parse_args()
    checkpoint = options.out / "last.ckpt" if options.resume else None
    _, trainer = train(options.out, options.epochs, checkpoint=checkpoint)
    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {float(value):.3f}")


if __name__ == "__main__":
    main()
