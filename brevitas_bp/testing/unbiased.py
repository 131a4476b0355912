"""Tests that the mean of what was rounded is the value, and computes the bias that would be seen."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from torch import Tensor, nn

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.random import derive, seeded
from brevitas_bp.testing.checks import PowerError
from brevitas_bp.testing.limits import bernstein, empirical_bernstein, rounding_variance

_WHERE = "brevitas_bp.testing.assert_unbiased"

#: A function of values and a seed that returns them rounded.
Draw = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Bias:
    """What :func:`assert_unbiased` measured, in the unit of the values (for a rounding: steps).

    Attributes:
        mean: mean error of each element, float64.
        limit: largest mean error of each element that an unbiased subject may have.
        overall: mean error of all elements.
        overall_limit: its limit.
        error: root mean square of single errors.
        visible: a bias of any element of this size or more is seen for certain (as certain as there is
            no false alarm).
        draws: independent draws of each element.
    """

    mean: Tensor
    limit: Tensor
    overall: float
    overall_limit: float
    error: float
    visible: float
    draws: int

    def __str__(self) -> str:
        return (
            f"mean error {self.overall:.2g} (limit {self.overall_limit:.2g}), of single elements up to "
            f"{float(self.mean.abs().max()):.2g} (limit {float(self.limit.max()):.2g}), after "
            f"{self.draws} draws of error {self.error:.2g}; a bias of {self.visible:.2g} would be seen")


@dataclass
class _Sums:
    """Running sums of errors."""

    n: int
    first: Tensor
    second: Tensor
    overall: list[float]
    largest: float
    neighbours: bool


def assert_unbiased(
        subject: Any, values: Tensor, *,
        draws: int = 4096,
        copies: int = 1,
        detects: float | None = None,
        largest_error: float | None = None,
        variance: Tensor | float | None = None,
        seed: int = 0) -> Bias:
    """Asserts that the expectation of each rounded element is the element.

    Each element is rounded ``draws`` times with independent seeds. Its mean error is compared with a
    bound that holds for every number of draws: Bernstein's if the variance is known, else the empirical
    one of Maurer and Pontil. The mean over all elements is compared as well; elements need not be
    independent of each other. The false-alarm probability is 1e-9 for the whole call.

    What is known about the errors of a subject, unless you say otherwise:

    * A rounding (a module that gives integers): errors below one step, variance ``a (1 - a)`` with the
      fraction ``a``. A code that is no neighbour of its value fails.
    * A rounding whose noise is subtracted again (with ``draw`` and ``restore``): within half a step.
    * A bucket quantizer without transform, as config, module or codec: errors of at most one step.
    * Anything else: errors of at most ``2 max|values|``. If this is far too large, many draws are
      needed, and the error message says so: pass ``largest_error``.

    The default of ``detects`` is half of the root mean square error. For stochastic rounding, this is a
    fifth of a step.

    Args:
        subject: a Brevitas config, a ``tensor_quant`` or another module, a rounding such as
            ``StochasticRound()``, a codec, or a function of values and a seed.
        values: what is rounded [any shape]; for a rounding, positions in steps.
        draws: independent draws of each element.
        copies: how many copies of ``values`` one call gets, stacked in a new first dimension. It saves
            time. Choose more than 1 only if copies are rounded independently of each other, and values
            fill whole buckets, so that each copy gets the same scale.
        detects: the bias that the test must be able to see.
        largest_error: bound on every single error.
        variance: variance of each element's error; None: see above, or measured.
        seed: seed of the draws.

    Raises:
        AssertionError: the subject is biased, or an error exceeds ``largest_error``.
        ValueError: the draws cannot see a bias of ``detects``, nothing was rounded, or an argument is
            out of range.

    >>> from brevitas_bp import StochasticRound
    >>> bias = assert_unbiased(StochasticRound(), torch.linspace(0, 3, 20))
    >>> bias.visible < 0.15  # of a step
    True
    >>> try:
    ...     assert_unbiased(lambda x, seed: x.round(), torch.linspace(0, 3, 20))
    ... except AssertionError as error:
    ...     print("rounding is biased" in str(error))
    True
    """
    values, calls = _checked(values, draws, copies, detects, largest_error)
    draw, codec = _draw_of(subject)
    sums = _drawn(draw, values, calls, copies, seed)
    dithered = isinstance(subject, nn.Module) and hasattr(subject, "restore")
    rounding = not dithered and isinstance(subject, nn.Module) and _is_rounding(subject, values)
    # Rounding to the dtype of the result, and four operations in the compute dtype.
    reach = float(values.abs().max().double())
    if rounding or dithered:
        if rounding and not sums.neighbours and largest_error is None:
            raise AssertionError(
                f"{_WHERE}: expected one of the two integers next to each value, got another one; at an "
                "end of the range it would be clipped, and clipping is biased")
        bound = (0.5 if dithered else 1.0) if largest_error is None else largest_error
        if variance is None and largest_error is None:
            variance = 1 / 12 if dithered else rounding_variance(values.double())
        slack = 2.0**-23 if rounding else 4 * torch.finfo(torch.float32).eps * max(reach, 1.0)
    else:
        bound = _largest_error(subject, codec, values, seed) if largest_error is None else largest_error
        narrow = torch.finfo(values.dtype).eps / 2 if values.dtype.itemsize == 2 else 0.0
        slack = (4 * torch.finfo(compute_dtype(values.dtype)).eps + narrow) * (reach + bound)
    if not sums.largest <= bound + slack:
        raise AssertionError(
            f"{_WHERE}: expected errors of at most {bound:.4g}, got {sums.largest:.4g}; the subject "
            "clips (and clipping is biased), or largest_error must be larger")
    return _judged(sums, values, bound, variance, slack, detects, codec)


def _judged(
        sums: _Sums, values: Tensor, bound: float, variance: Tensor | float | None, slack: float,
        detects: float | None, codec: Codec | None) -> Bias:
    n, tests = sums.n, values.numel() + 1
    mean = sums.first / n
    if variance is None:
        measured = ((sums.second - n * mean.square()) / (n - 1)).clamp(min=0)
        # An interval of length 2 * bound holds all errors.
        limit = 2 * bound * empirical_bernstein(measured / (2 * bound)**2, n, tests)
    else:
        given = torch.as_tensor(variance, dtype=torch.float64, device=mean.device).expand(mean.shape)
        limit = bound * bernstein(given / bound**2, n, tests)
    limit = limit + slack
    each = torch.tensor(sums.overall, dtype=torch.float64)
    overall_limit = slack + 2 * bound * float(
        empirical_bernstein(each.var() / (2 * bound)**2, n, tests))
    error = math.sqrt(float(sums.second.mean()) / n)
    bias = Bias(
        mean, limit, float(mean.mean()), overall_limit, error, 2 * float(limit.max()), n)
    hint = _hint(mean, sums)
    if (mean.abs() > limit).any():
        worst = int((mean.abs() - limit).argmax())
        raise AssertionError(
            f"{_WHERE}: expected a mean error within {float(limit.view(-1)[worst]):.3g} of 0 for the "
            f"value {float(values.reshape(-1)[worst]):.6g} (flat index {worst}) after {n} draws, got "
            f"{float(mean.view(-1)[worst]):.3g}: rounding is biased{hint}")
    if abs(bias.overall) > overall_limit:
        raise AssertionError(
            f"{_WHERE}: expected a mean error of all elements within {overall_limit:.3g} of 0 after {n} "
            f"draws, got {bias.overall:.3g}: rounding is biased{hint}")
    exact = sums.largest <= slack
    if exact and (codec is None or codec.lossy):
        raise ValueError(
            f"{_WHERE}: every draw gave the value itself, so nothing was tested; choose values between "
            "two levels")
    wanted = error / 2 if detects is None else detects
    if not exact and bias.visible > wanted:
        more = math.ceil(n * (bias.visible / wanted)**2 / 64) * 64
        raise PowerError(
            f"{_WHERE}: {n} draws see a bias of {bias.visible:.3g} or more, expected to see "
            f"detects={wanted:.3g}; take draws={more}, or a smaller bound than largest_error="
            f"{bound:.3g} if you know one (the largest error here is {sums.largest:.3g})")
    return bias


def _hint(mean: Tensor, sums: _Sums) -> str:
    same = (sums.second - sums.n * mean.square()).abs().max() <= 1e-9 * sums.second.max()
    return (
        "; all draws are alike, so it rounds to nearest, or does not take its noise from "
        "torch.ops.brevitas_bp.noise_like" if same else "")


def _checked(
        values: Tensor, draws: int, copies: int, detects: float | None,
        largest_error: float | None) -> tuple[Tensor, int]:
    """Returns the values, and the number of calls."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or not values.numel():
        raise ValueError(
            f"{_WHERE}: values must be a float tensor with elements, got "
            f"{values.dtype if isinstance(values, Tensor) else values!r}")
    if not values.isfinite().all():
        raise ValueError(f"{_WHERE}: values must be finite, got NaN or Inf; they have no mean error")
    if copies < 1 or draws < 2 or draws % copies:
        raise ValueError(
            f"{_WHERE}: draws must be >= 2 and a multiple of copies, got draws={draws} and "
            f"copies={copies}")
    for name, number in (("detects", detects), ("largest_error", largest_error)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{_WHERE}: {name} must be > 0 and finite, got {number}")
    return values.detach(), draws // copies


def _draw_of(subject: Any) -> tuple[Draw, Codec | None]:
    """Returns how a subject rounds, and its codec if it has one."""
    if hasattr(subject, "fused_activation_quant_proxy") or (
            inspect.isclass(subject) and issubclass(subject, ExtendedInjector)):
        subject = codec_from(subject)
    if isinstance(subject, Codec):
        codec = subject
        return lambda x, seed: codec.at_site(0).encode(x, seed=seed).decode(), codec
    if isinstance(subject, nn.Module):
        return lambda x, seed: _run_module(subject, x, seed), None
    if inspect.isclass(subject) or not callable(subject) or len(_parameters(subject)) != 2:
        raise TypeError(
            f"{_WHERE}: expected a Brevitas config, a module, a codec, or a function of values and a "
            f"seed, got {subject!r}")
    function: Any = subject
    return function, None


def _parameters(function: Any) -> list[str]:
    try:
        return [
            name for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        return []


def _run_module(module: Any, x: Tensor, seed: int) -> Tensor:
    with torch.no_grad(), seeded(seed):
        if hasattr(module, "restore"):
            noise = module.draw(x)
            return module.restore(module(x, noise), noise)
        result = module(x)
        return result if isinstance(result, Tensor) else result[0]


def _is_rounding(module: nn.Module, values: Tensor) -> bool:
    """Whether a module gives integers, and no tuple as a quantizer does."""
    with torch.no_grad(), seeded(0), torch.random.fork_rng():
        result = module(values)
    return isinstance(result, Tensor) and torch.equal(result, result.round())


def _drawn(draw: Draw, values: Tensor, calls: int, copies: int, seed: int) -> _Sums:
    """Rounds ``calls`` times, and sums up the errors."""
    exact = values.double()
    zeros = torch.zeros_like(exact)
    sums = _Sums(calls * copies, zeros, zeros.clone(), [], 0.0, True)
    given = values.expand(copies, *values.shape).contiguous() if copies > 1 else values
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for call in range(calls):
            rounded = draw(given, derive(seed, call))
            if rounded.shape != given.shape:
                raise AssertionError(
                    f"{_WHERE}: expected the shape {list(given.shape)}, got {list(rounded.shape)}")
            rounded = rounded.detach().double()
            error = rounded - exact
            if not error.isfinite().all():
                raise AssertionError(
                    f"{_WHERE}: expected finite results for finite values, got NaN or Inf")
            sums.neighbours &= bool((error.abs() < 1).all())
            sums.largest = max(sums.largest, float(error.abs().max()))
            per_copy = error.view(copies, *exact.shape)
            sums.overall += per_copy.reshape(copies, -1).mean(1).tolist()
            sums.first += per_copy.sum(0)
            sums.second += per_copy.square().sum(0)
    return sums


def _largest_error(subject: Any, codec: Codec | None, values: Tensor, seed: int) -> float:
    """Returns the step of a bucket quantizer without transform; else twice the largest magnitude."""
    whole = 2 * float(values.abs().max().double())
    if codec is None:
        quantizers = [subject] if isinstance(subject, nn.Module) else []
    else:
        quantizers = list(codec.quantizers())
    if len(quantizers) != 1 or not isinstance(quantizers[0], BucketRescalingIntQuant):
        return whole
    quantizer = quantizers[0]
    if quantizer.transform_impl is not None or len(quantizer.bit_widths) > 1:
        return whole
    with torch.no_grad(), seeded(seed):
        value, scale, *_ = quantizer(values)
    # A codec for another use may have other steps than its quantizer.
    alike = codec is None or torch.equal(codec.encode(values, seed=seed).decode(), value)
    return float(scale.max()) if alike else whole
