"""Errors of gradients as rows: for a parameter, a module or the network. For print and for JSON."""

import math
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any, Literal

from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.text import table

Quantity = Literal["bias", "noise", "signal", "cosine", "sampling_noise"]
_QUANTITIES: tuple[Quantity, ...] = ("signal", "bias", "noise", "cosine", "sampling_noise")


@dataclass(frozen=True)
class GradientErrorRow:
    """Error of one parameter's gradient, or of several parameters' gradients taken as one vector.

    g is the exact gradient, g~ is a compressed gradient, and m is the mean of g~ over the draws.

    Attributes:
        name: of the parameter or module; "total" for the network.
        elements: number of elements.
        size: ``|g|``.
        variance: total variance ``E |g~ - E g~|^2`` over the roundings of one batch.
        offset: estimate of ``|E g~ - g|^2``. It is ``|m - g|^2`` minus the part that a finite number of
            draws leaves by chance. Without bias it is below 0 about as often as above.
        along: ``<m - g, g>``.
        cosine: mean of the cosine between one g~ and g; NaN if ``negligible``.
        sampling_variance: total variance of the exact gradient from batch to batch; None for one batch.
        negligible: the exact gradient is zero up to rounding, so nothing is divided by its size.
    """

    name: str
    elements: int
    size: float
    variance: float
    offset: float
    along: float
    cosine: float
    sampling_variance: float | None
    negligible: bool

    @property
    def bias(self) -> float:
        """``|E g~ - g| / |g|``; 0 if chance explains all of it."""
        return self._relative(max(self.offset, 0.0) ** 0.5)

    @property
    def noise(self) -> float:
        """``sqrt(variance) / |g|``."""
        return self._relative(self.variance**0.5)

    @property
    def signal(self) -> float:
        """``<m, g> / |g|^2``: the share of the gradient that remains; 1 if rounding is unbiased."""
        return 1 + self._relative(self._relative(self.along))

    @property
    def sampling_noise(self) -> float:
        """Standard deviation from batch to batch over ``|g|``; NaN for one batch."""
        variance = math.nan if self.sampling_variance is None else self.sampling_variance
        return self._relative(variance**0.5)

    def to_dict(self) -> dict[str, Any]:
        """Returns attributes and relative quantities for JSON; undefined numbers are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {quantity: getattr(self, quantity) for quantity in _QUANTITIES}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()}

    def _relative(self, x: float) -> float:
        return math.nan if self.negligible else x / self.size


@dataclass(frozen=True)
class GradientError:
    """The result of :func:`measure_gradient_error`. ``print`` it for a table over the modules.

    Attributes:
        draws: compressed gradients for each batch.
        batches: number of batches.
        parameters: one row for each parameter that has a gradient, in the order of the model.
        modules: one row for each module that directly holds such parameters, taken as one vector.
        total: all parameters as one vector.
        sources: the same for "activations" (saved tensors) and "gradients" alone, if asked for. The
            squares of their noise add up to that of both, except for the products of the two errors.
    """

    draws: int
    batches: int
    parameters: list[GradientErrorRow]
    modules: list[GradientErrorRow]
    total: GradientErrorRow
    sources: dict[str, "GradientError"] = field(default_factory=dict)

    def median(self, quantity: Quantity) -> float:
        """Returns the median over the parameters that are not negligible."""
        return median([getattr(row, quantity) for row in self._compared()] or [math.nan])

    def largest(self, quantity: Quantity) -> float:
        """Returns the maximum over the parameters that are not negligible."""
        return max((getattr(row, quantity) for row in self._compared()), default=math.nan)

    def table(self, by: Literal["module", "parameter"] = "module") -> str:
        """Returns text with one line per module or parameter; ``-`` if the gradient is negligible."""
        if by not in ("module", "parameter"):
            raise UnknownNameError(
                f"brevitas_bp.allocate: by must be 'module' or 'parameter', got {by!r}"
                f"{nearest(str(by), ['module', 'parameter'])}")
        shown: list[Quantity] = list(_QUANTITIES if self.batches > 1 else _QUANTITIES[:-1])
        lines = [(by, "elements", "size", *(q.replace("_", " ") for q in shown))]
        for row in [*(self.modules if by == "module" else self.parameters), self.total]:
            numbers = (f"{getattr(row, q):.4f}".replace("nan", "-") for q in shown)
            lines.append((row.name or "(root)", str(row.elements), f"{row.size:.3g}", *numbers))
        return "\n".join([table(lines, left=1, total=True), self._summary()])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {
            "draws": self.draws, "batches": self.batches,
            "parameters": [row.to_dict() for row in self.parameters],
            "modules": [row.to_dict() for row in self.modules], "total": self.total.to_dict(),
            "sources": {source: error.to_dict() for source, error in self.sources.items()}}

    def _compared(self) -> list[GradientErrorRow]:
        return [row for row in self.parameters if not row.negligible]

    def _summary(self) -> str:
        compared = self._compared()
        text = (
            f"{self.draws} draws x {self.batches} batches, {len(compared)} parameters; "
            f"{len(self.parameters) - len(compared)} more have a gradient of zero")
        for quantity in ("bias", "noise") if compared else ():
            worst = max(compared, key=lambda row: getattr(row, quantity))
            text += (
                f"\n{quantity}: median {self.median(quantity):.4f}, largest "
                f"{self.largest(quantity):.4f} ({worst.name})")
        if self.sources:
            parts = [f"{name} {error.total.noise:.4f}" for name, error in self.sources.items()]
            if self.batches > 1:
                parts.insert(0, f"batch {self.total.sampling_noise:.4f}")
            text += "\nnoise of the whole gradient by source: " + ", ".join(parts)
        return text
