"""What the callbacks for Lightning do. Their classes also derive from Lightning's ``Callback``."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from brevitas_bp.backward import NoiseState
from brevitas_bp.memory import SavedMemoryReport, track_saved_memory
from brevitas_bp.trainers.figures import USUAL, check_names, figures_of


class MemoryHooks:
    """Logs what training saves for backward, after each batch, through ``LightningModule.log``.

    It tracks the LightningModule from the start of training to its end, or to an exception.

    Args:
        figures: some of "saved_mib", "saved_exact_mib", "saved_ratio", "saved_peak_mib",
            "saved_live_mib".
        prog_bar: whether Lightning shows the figures in its progress bar.

    Attributes:
        report: the report, once training has begun; it stays after training.

    Raises:
        UnknownNameError: there is no such figure.
    """

    def __init__(self, figures: Sequence[str] = USUAL, prog_bar: bool = False) -> None:
        super().__init__()
        self.figures = check_names("brevitas_bp.trainers.LightningMemory", figures)
        self.prog_bar = prog_bar
        self.report: SavedMemoryReport | None = None
        self._tracking = ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to track."""
        self._tracking.close()
        self.report = self._tracking.enter_context(track_saved_memory(pl_module))

    def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the figures of the batch."""
        if self.report is not None and (found := figures_of(self.report, self.figures)):
            pl_module.log_dict(found, prog_bar=self.prog_bar)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends tracking."""
        self._tracking.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends tracking."""
        self._tracking.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends tracking."""
        self._tracking.close()


class NoiseHooks:
    """Keeps the noise of the wrappers, and torch's random state, in Lightning's checkpoints.

    Lightning saves weights and optimizer, but no random state. Without this callback, a resumed run is
    valid, but not bit-identical.
    """

    def __init__(self) -> None:
        super().__init__()
        self._noise: NoiseState | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finds the wrappers.

        Raises:
            ValueError: the LightningModule contains none.
        """
        self._noise = NoiseState(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the noise, and of torch's generator for the CPU."""
        return {
            "noise": {} if self._noise is None else self._noise.state_dict(),
            "torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues both.

        Raises:
            UnknownNameError: the checkpoint is that of a model with other wrappers.
        """
        assert self._noise is not None
        self._noise.load_state_dict(state_dict["noise"])
        torch.set_rng_state(state_dict["torch"])
