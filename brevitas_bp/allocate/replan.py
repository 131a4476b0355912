"""Updates the bit plan while a network trains."""

from collections.abc import Mapping
from typing import Any

from brevitas_bp.allocate.plan import BitPlan, check_budget
from brevitas_bp.allocate.planning import plan_bit_widths
from brevitas_bp.allocate.profile import LossFn
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

_WHERE = "brevitas_bp.allocate.Replanner"


class Replanner:
    """Plans widths at the first step and then every few steps, from the gradients at that time.

    Args:
        model: the wrapper that follows the plans.
        loss_fn: ``(model, batch) -> scalar loss``.
        every: steps from one plan to the next.
        **options: of :func:`plan_bit_widths`: ``budget`` or ``average_bits``, ``candidates``, ...

    Call :meth:`step` before each forward pass. A plan costs as much as :func:`plan_bit_widths`; a part
    of the batch is enough.

    Raises:
        TypeError: the model is no wrapper.
        ValueError: ``every`` is not positive.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
        >>> replanner = Replanner(
        ...     model, lambda m, x: m(x).square().mean(), every=100, average_bits=3)
        >>> x = torch.randn(64, 64)
        >>> replanner.step(x) is None, replanner.step(x) is None  # planned once
        (False, True)
    """

    def __init__(
            self, model: QuantBackwardWrapper, loss_fn: LossFn, *, every: int,
            **options: Any) -> None:
        if not isinstance(model, QuantBackwardWrapper):
            raise TypeError(
                f"{_WHERE}: model must be a QuantBackwardWrapper, which obeys plans, got "
                f"{type(model).__name__}")
        if every < 1:
            raise ValueError(f"{_WHERE}: every must be a positive number of steps, got {every}")
        check_budget(options.get("budget"), options.get("average_bits"))
        self.model, self.loss_fn, self.every, self.options = model, loss_fn, every, options
        self.steps = 0
        self.plan: BitPlan | None = None

    def step(self, batch: Any) -> BitPlan | None:
        """Counts a step. If a plan is due, makes it with ``batch`` and returns it, else returns None."""
        due = self.steps % self.every == 0
        if due:
            self.plan = plan_bit_widths(self.model, batch, self.loss_fn, **self.options)
            self.model.use_plan(self.plan)
        self.steps += 1
        return self.plan if due else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and the current plan, as plain values."""
        return {"steps": self.steps, "plan": None if self.plan is None else self.plan.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self.steps = int(state["steps"])
        self.plan = None if state["plan"] is None else BitPlan.from_dict(state["plan"])
        self.model.use_plan(self.plan)
