"""What the callbacks for Transformers' ``Trainer`` do. Their classes also derive from its classes."""

from collections.abc import Sequence
from typing import Any

from brevitas_bp.backward import NoiseState
from brevitas_bp.memory import SavedMemoryReport
from brevitas_bp.trainers.figures import USUAL, check_names, figures_of

_WHERE = "brevitas_bp.trainers.TransformersMemory"


class MemoryHooks:
    """Adds what training saves for backward to everything that ``Trainer`` logs while it trains.

    ``Trainer`` tells callbacks of no exception. So the block that tracks is yours::

        with track_saved_memory(model) as report:
            memory = TransformersMemory(report)
            trainer = Trainer(model, ..., callbacks=[memory])
            trainer.train()

    The figures are in ``trainer.state.log_history``, and every callback after this one gets them. The
    callbacks of ``report_to`` (TensorBoard and others) come before yours. ``memory.add_to(trainer)``
    puts it before them.

    Args:
        report: of :func:`~brevitas_bp.track_saved_memory`.
        figures: some of "saved_mib", "saved_exact_mib", "saved_ratio", "saved_peak_mib",
            "saved_live_mib".

    Raises:
        TypeError: ``report`` is not a report.
        UnknownNameError: there is no such figure.
    """

    def __init__(self, report: SavedMemoryReport, figures: Sequence[str] = USUAL) -> None:
        super().__init__()
        if not isinstance(report, SavedMemoryReport):
            raise TypeError(
                f"{_WHERE}: expected the report of track_saved_memory, got {type(report).__name__}; "
                "wrap trainer.train() in `with track_saved_memory(model) as report`")
        self.report = report
        self.figures = check_names(_WHERE, figures)

    def add_to(self, trainer: Any) -> None:
        """Adds this callback before all others, in place of ``trainer.add_callback``."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None,
            **kwargs: Any) -> None:
        """Adds the figures to the logs of training, not to those of evaluation."""
        if logs is None or any(key.startswith("eval_") for key in logs):
            return
        found = figures_of(self.report, self.figures)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


class NoiseHooks:
    """Keeps the noise of the wrappers in ``trainer_state.json`` of each checkpoint, and resumes it.

    ``Trainer`` saves torch's random state itself. Without this callback, a resumed run is valid, but not
    bit-identical.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noise: NoiseState | None = None

    def state(self) -> dict[str, Any]:
        """Returns the state of the noise, for ``Trainer``."""
        streams = None if self.noise is None else self.noise.state_dict()
        return {"args": {}, "attributes": {"streams": streams}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the wrappers, and continues their noise if a checkpoint has it.

        Raises:
            UnknownNameError: the checkpoint is that of a model with other wrappers.
            ValueError: the model contains no wrapper.
        """
        self.noise = NoiseState(kwargs["model"])
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]["streams"]
        if saved is not None:
            self.noise.load_state_dict(saved)
