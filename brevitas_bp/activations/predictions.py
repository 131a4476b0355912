"""What the derivative of an activation function tells about its output.

The derivative of SiLU or GELU is stored anyway. It nearly determines the output: only the noise of its
code is missing, and which of the few inputs beyond the largest derivative it was. So the output can be
stored as its difference from a prediction, in the same bits and with a fraction of the error.

A prediction is a polynomial in ``d - 1/2`` without a constant, because the derivative is 1/2 where the
output is 0. It is the least-squares fit for normal inputs (deviation 1.25 for SiLU, 1 for GELU) and
derivatives ``d`` in four dithered bits. Any polynomial would be right: the gradient stays unbiased
whatever is predicted. The fit decides only how small the difference is.
"""

from dataclasses import dataclass

from brevitas_bp.activations.functions import ACTIVATIONS

#: The derivative is cut to this range, beyond which the polynomials would grow without need.
LEAST, MOST = -0.125, 1.125
#: Derivative of both functions at zero.
CENTRE = 0.5


@dataclass(frozen=True)
class Prediction:
    """A polynomial without a constant.

    Attributes:
        coefficients: coefficients of the powers 1, 2, ...
        spared: bits by which the difference of a factor may be narrower than the factor. For normal
            inputs of SiLU with a deviation up to 2, its error is then smaller all the same.
    """

    coefficients: tuple[float, ...]
    spared: int = 0

    @property
    def five(self) -> tuple[float, ...]:
        """Five coefficients, for kernels; missing ones are zero, and change nothing."""
        return (*self.coefficients, *[0.0] * (5 - len(self.coefficients)))


#: Name of a derivative in :mod:`~brevitas_bp.activations.derivatives` -> prediction of the output.
PREDICTIONS: dict[str, Prediction] = {
    name: Prediction(entry.prediction, entry.spared)
    for name, entry in ACTIVATIONS.items() if entry.prediction}
