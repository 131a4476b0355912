"""Settings of quantizers as functions of the training step."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from brevitas_bp.backward.seam import act_quant_of, wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

Settings = Mapping[str, Any]
Stages = Mapping[int, Settings]
_WHERE = "brevitas_bp.allocate.QuantizerSchedule"


class QuantizerSchedule:
    """Changes bit width, bucket size, mix probability, or any other setting, while a model trains.

    The schedule applies to ``act_quant`` of every :class:`QuantBackwardWrapper` that a module is or
    contains, including nested ones. Quantizers in ``overrides`` and those of the policy keep their
    settings. A tensor that is already stored decodes as it was encoded.

    Schedules of ``mix_prob`` (``linear``, ``cosine``, ...) are in :mod:`brevitas_bp.core.bit_width`.
    If you also use a :class:`MixProbScheduler`, step it last: a change of another setting restores the
    configured probability.

    Args:
        root: a wrapper, or a model that contains wrappers.
        schedule: one of two forms. A mapping step -> settings: the settings hold from that step on, and
            each stage adds to the earlier ones. Or a function of the step that returns all current
            settings. A setting that is not named has its configured value.

    Call :meth:`step` once per training step.

    Raises:
        ValueError: nothing would change: no wrapper quantizes, the schedule is empty, or a stage equals
            the one before it.
        TypeError: a wrapper got a quantizer that was already built.
        UnknownNameError: a quantizer does not know a setting. All stages of a mapping are tried now.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
    >>> model = QuantBackwardWrapper(nn.Tanh(), Uint2)
    >>> schedule = QuantizerSchedule(model, {0: {"bit_width": 8}, 2: {"bucket_size": 64}})
    >>> [dict(schedule.step()) for _ in range(2)]
    [{'bit_width': 8}, {'bit_width': 8, 'bucket_size': 64}]
    """

    def __init__(self, root: nn.Module, schedule: Stages | Callable[[int], Settings]) -> None:
        self.root = root
        self.steps = 0
        if isinstance(schedule, Mapping):
            schedule = _Table(schedule)
            for settings in schedule.stages.values():
                self._try(settings)
        elif not callable(schedule):
            raise TypeError(
                f"{_WHERE}: schedule must map steps to settings, for instance "
                f"{{1000: {{'bit_width': 2}}}}, or be a function step -> settings, got {schedule!r}")
        self._settings_at = schedule
        self._apply()

    def step(self) -> Settings:
        """Advances by one step and returns the current settings."""
        self.steps += 1
        return self._apply()

    def state_dict(self) -> dict[str, int]:
        """Returns the number of steps taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from :meth:`state_dict`."""
        self.steps = int(state["steps"])
        self._apply()

    def _apply(self) -> Settings:
        settings = self._settings_at(self.steps)
        for wrapper in self._wrappers():
            wrapper.configure(**settings)
        return settings

    def _try(self, settings: Settings) -> None:
        for wrapper in self._wrappers():
            act_quant_of(wrapper).built(dict(settings))

    def _wrappers(self) -> list[QuantBackwardWrapper]:
        """Finds the wrappers anew each time, because models are wrapped, copied and rebuilt."""
        found = [w for _, w in wrappers_in(self.root) if not act_quant_of(w).is_exact]
        if not found:
            raise ValueError(
                f"{_WHERE}: {type(self.root).__name__} neither is nor contains a QuantBackwardWrapper "
                "with a quantizer, so the schedule would do nothing; wrap the model first")
        return found


class _Table:
    """Returns the settings at a step, from a table of changes."""

    def __init__(self, changes: Stages) -> None:
        self.stages: dict[int, Settings] = {}
        settings: Settings = {}
        if not changes:
            raise ValueError(f"{_WHERE}: an empty schedule would do nothing; name a step and settings")
        for step in changes:
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"{_WHERE}: steps must be integers from 0 on, got {step!r}")
        for step in sorted(changes):
            changed = {**settings, **changes[step]}
            if changed == settings:
                raise ValueError(
                    f"{_WHERE}: the settings of step {step}, {dict(changes[step])}, are in force "
                    "already and would do nothing; remove them")
            self.stages[step] = settings = changed

    def __call__(self, step: int) -> Settings:
        reached = [first for first in self.stages if first <= step]
        return self.stages[reached[-1]] if reached else {}
