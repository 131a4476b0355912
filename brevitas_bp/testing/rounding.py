"""Checks of everything that a rounding, which fills ``float_to_int_impl``, must keep."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.format.random import derive, seeded, seeded_rows
from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloat
from brevitas_bp.testing.checks import Check, found, run_checks
from brevitas_bp.testing.limits import hoeffding
from brevitas_bp.testing.subject import differing, largest, same_bits, same_payload
from brevitas_bp.testing.tensors import DTYPES, dtype_name, normals
from brevitas_bp.testing.unbiased import assert_unbiased

_BUCKET = 64
# Draws of one call, which are independent: an earlier check asserts it.
_ROWS = 32
#: Fractions of positions between two codes.
FRACTIONS = (2.0**-9, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1 - 2.0**-9)


@dataclass(frozen=True)
class Rounding:
    """A rounding, and what it promises.

    Attributes:
        module: the rounding.
        unbiased: whether its expectation is the position.
        draws: calls of each test of a mean.
        straight_through: whether its gradient is that of the identity.
        dtypes: dtypes of its input.
    """

    module: Any
    unbiased: bool
    draws: int
    straight_through: bool
    dtypes: tuple[torch.dtype, ...]

    @property
    def subtracts(self) -> bool:
        """Whether the noise is subtracted again: the codes alone are not what it decodes to."""
        return hasattr(self.module, "restore")

    def __call__(self, u: Tensor, seed: int = 1) -> Tensor:
        """Returns codes."""
        with torch.no_grad(), seeded(seed):
            return self.module(u, self.module.draw(u)) if self.subtracts else self.module(u)

    @cached_property
    def quantizer(self) -> BucketRescalingIntQuant:
        """A 4-bit quantizer with this rounding."""
        config: Any = ShiftedUint4DynamicActPerBucketFloat
        (quantizer,) = codec_from(config, bucket_size=_BUCKET).quantizers()
        assert isinstance(quantizer, BucketRescalingIntQuant)
        quantizer.int_quant.float_to_int_impl = self.module
        return quantizer

    @cached_property
    def codec(self) -> Codec:
        """The codec of :attr:`quantizer`."""
        return codec_from(self.quantizer)


def positions(dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns positions between the codes 0 to 7, ascending, among them all of :data:`FRACTIONS`."""
    grid = torch.arange(7, dtype=torch.float64).unsqueeze(-1) + torch.tensor(FRACTIONS)
    return grid.reshape(-1).to(dtype)


def _gives_integers(rounding: Rounding) -> None:
    for dtype in rounding.dtypes:
        u = positions(dtype).view(7, -1)
        codes, case = rounding(u), f"positions of {dtype_name(dtype)}"
        if codes.dtype != dtype:
            found(case, f"codes of {dtype_name(dtype)}", dtype_name(codes.dtype))
        if codes.shape != u.shape:
            found(case, f"the shape {list(u.shape)}", list(codes.shape))
        if not torch.equal(codes, codes.round()):
            found(case, "integers", f"{float(codes[codes != codes.round()][0])!r}")


def _keeps_integers(rounding: Rounding) -> None:
    for dtype in rounding.dtypes:
        u = torch.arange(-256, 257).to(dtype).view(27, -1)
        for seed in range(64):
            codes = rounding(u, seed)
            if not torch.equal(codes, u):
                found(f"integers of {dtype_name(dtype)}, seed {seed}", "the same integers",
                      differing(codes, u))


def _takes_neighbours(rounding: Rounding) -> None:
    for dtype in rounding.dtypes:
        u = positions(dtype).view(7, -1)
        for seed in range(64):
            codes = rounding(u, seed)
            beyond = (codes != u.floor()) & (codes != u.ceil())
            if beyond.any():
                found(f"positions of {dtype_name(dtype)}, seed {seed}",
                      f"the integer below or above {float(u[beyond][0]):.6g}",
                      f"{float(codes[beyond][0]):g}")


def _passes_bad_values(rounding: Rounding) -> None:
    for dtype in rounding.dtypes:
        for bad in (torch.nan, torch.inf, -torch.inf):
            u = torch.full((2, 8), 0.5, dtype=dtype)
            u[1, 3] = bad
            codes, case = rounding(u), f"one {bad} of {dtype_name(dtype)}"
            if codes[1, 3].isfinite():
                found(case, "NaN or Inf in its place", float(codes[1, 3]))
            if int(codes.isfinite().sum()) != 15:
                found(case, "15 finite codes beside it", int(codes.isfinite().sum()))


def _rounds_independently(rounding: Rounding) -> None:
    u, calls = torch.full((64, _BUCKET), 0.5), 32
    products = torch.zeros(2, dtype=torch.float64)
    for call in range(calls):
        # Signs of the errors, +1 or -1 with equal probability.
        signs = (rounding(u, derive(3, call)).double() * 2 - 1).reshape(-1)
        for i, distance in enumerate((_BUCKET, 1)):
            products[i] += (signs[distance:] * signs[:-distance]).mean() / calls
    # Products of neighbours in a chain of independent signs are independent, in an interval of length 2.
    limit = 2 * hoeffding(calls * (u.numel() - _BUCKET), tests=2)
    for name, product in zip(("in the same place of two buckets", "next to each other"), products):
        if abs(product) > limit:
            found(f"positions of 0.5 {name}", f"a correlation within {limit:.2g} of 0",
                  f"{float(product):.2g}")


def _has_the_right_mean(rounding: Rounding) -> None:
    for dtype in rounding.dtypes:
        try:
            assert_unbiased(
                rounding.module, positions(dtype), draws=rounding.draws * _ROWS, copies=_ROWS)
        except AssertionError as error:
            found(f"positions of {dtype_name(dtype)}", "E[q] = u", str(error))


def _is_monotone(rounding: Rounding) -> None:
    u = positions()
    total = torch.zeros(len(u), dtype=torch.float64)
    for call in range(rounding.draws):
        total += rounding(u.expand(_ROWS, -1).contiguous(), derive(2, call)).double().sum(0)
    draws = rounding.draws * _ROWS
    mean = total / draws
    before = mean.cummax(0).values
    # A code is one of two neighbours: draws from a unit interval.
    limit = 2 * hoeffding(draws, tests=len(u))
    falls = before - mean
    if (falls > limit).any():
        worst = int(falls.argmax())
        found(f"position {float(u[worst]):.4g}, {draws} draws",
              f"a mean of at least {float(before[worst]) - limit:.4g}, as of a position below it",
              f"{float(mean[worst]):.4g}")


def _draws_from_the_seed(rounding: Rounding) -> None:
    u = torch.full((8, _BUCKET), 0.5)
    state, codes = torch.get_rng_state(), rounding(u)
    if not torch.equal(torch.get_rng_state(), state):
        found("one call within brevitas_bp.seeded", "torch's global generator as it was",
              "another state")
    torch.manual_seed(1)
    first = rounding(u)
    torch.manual_seed(2)
    for again in (first, rounding(u)):
        if not torch.equal(again, codes):
            found("calls with the same seed, after torch.manual_seed(1) and (2)", "the same codes",
                  "other codes")
    if rounding.unbiased and all(torch.equal(rounding(u, seed), codes) for seed in (2, 3, 1 << 40)):
        found("calls with other seeds", "other codes, because unbiased is True", "the same codes")


def _works_by_buckets(rounding: Rounding) -> None:
    u = torch.linspace(0, 7, 8 * _BUCKET).view(8, _BUCKET)
    whole = rounding(u, 5)
    with torch.no_grad(), seeded_rows(5, slice(2, 5)):
        part = rounding.module(u[2:5], rounding.module.draw(u[2:5])) if rounding.subtracts else (
            rounding.module(u[2:5]))
    if not torch.equal(part, whole[2:5]):
        found("buckets 2 to 4 of 8, rounded alone", "the codes that they have among all buckets",
              differing(part, whole[2:5]))


def _fits_into_a_quantizer(rounding: Rounding) -> None:
    quantizer, codec = rounding.quantizer, rounding.codec
    for dtype in rounding.dtypes:
        x = normals((5, 3 * _BUCKET)).to(dtype)
        case = f"a 4-bit quantizer of buckets of {_BUCKET} {dtype_name(dtype)}"
        packed, decoded = codec.encode(x, seed=3), codec.encode(x, seed=3).decode()
        with torch.no_grad(), seeded(3):
            value, scale, *_ = quantizer(x)
        if not same_bits(decoded, value):
            found(f"{case}, as codec and as module", "the same values", differing(decoded, value))
        error = largest(decoded.double() - x.double())
        # One step; the result is rounded to its dtype at last.
        step = float(scale.max()) + 4 * torch.finfo(dtype).eps * largest(x)
        if error > step:
            found(case, f"errors of at most a step, {step:.4g}", f"{error:.4g}")
        if not quantizer.decoding_draws:
            plain = ModuleCodec(quantizer).encode(x, seed=3)
            if not same_payload(packed, plain):
                found(f"{case}, through its bucket_stage and through its module", "the same bytes",
                      "other bytes: the row of the stage table computes something else")


def _passes_gradients(rounding: Rounding) -> None:
    u = positions().view(7, -1).requires_grad_()
    with torch.enable_grad(), seeded(1):
        codes = rounding.module(u, rounding.module.draw(u)) if rounding.subtracts else rounding.module(u)
        if not codes.requires_grad:
            found("positions that require a gradient", "codes with a gradient", "codes without one")
        (grad,) = torch.autograd.grad(codes.sum(), u)
    if not torch.equal(grad, torch.ones_like(u)):
        found("the gradient of the sum of codes", "ones, because straight_through is True",
              f"values from {float(grad.min()):g} to {float(grad.max()):g}")


#: name -> check of a rounding, in the order in which they run.
ROUNDING_CHECKS: dict[str, Check[Rounding]] = {
    "integers": Check(
        "a rounding gives integers in the shape and dtype of its input",
        _gives_integers),
    "fixed points": Check(
        "integers stay as they are", _keeps_integers, lambda rounding: not rounding.subtracts),
    "neighbours": Check(
        "a code is the integer below or above its position; another one would be clipped at the ends "
        "of the range, and clipping is biased", _takes_neighbours,
        lambda rounding: not rounding.subtracts),
    "non-finite": Check("NaN and Inf pass, each in its own place", _passes_bad_values),
    "independence": Check(
        "elements are rounded independently of each other, so that errors cancel in a sum",
        _rounds_independently, lambda rounding: rounding.unbiased),
    "mean": Check(
        "the expectation of a code is its position", _has_the_right_mean,
        lambda rounding: rounding.unbiased),
    "monotone": Check(
        "the expectation does not fall", _is_monotone, lambda rounding: not rounding.subtracts),
    "seed": Check(
        "all randomness comes from brevitas_bp.seeded; torch.ops.brevitas_bp.noise_like does so",
        _draws_from_the_seed),
    "buckets": Check(
        "with bucketwise = True, a bucket gets the codes that it gets among others", _works_by_buckets,
        lambda rounding: bool(getattr(rounding.module, "bucketwise", False))),
    "quantizer": Check(
        "a bucket quantizer with this rounding errs by at most a step, and its codec stores the values "
        "that it computes", _fits_into_a_quantizer),
    "gradient": Check(
        "the gradient is that of the identity", _passes_gradients,
        lambda rounding: rounding.straight_through)}


def check_rounding(
        rounding: nn.Module | type[nn.Module], *,
        unbiased: bool = True,
        straight_through: bool = False,
        draws: int = 256,
        dtypes: Sequence[torch.dtype] = DTYPES,
        without: Collection[str] = ()) -> tuple[str, ...]:
    """Checks that a rounding keeps everything that a bucket quantizer expects of ``float_to_int_impl``.

    The checks are listed in ``docs/testing.md``. A rounding gets positions in steps, [buckets,
    elements], and gives codes. torch's generators are afterwards as they were.

    Args:
        rounding: the module, or its class, which is then made without arguments.
        unbiased: whether the expectation of a code must be its position. False for rounding to nearest.
        straight_through: whether the gradient must be that of the identity, so that the rounding can be
            used in forward as well.
        draws: calls with independent seeds for each test of a mean; each gives 32 draws.
        dtypes: dtypes to try. Bucket quantizers compute in float32 and float64, Brevitas' own in the
            dtype of their input.
        without: names of checks to leave out.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: a check failed; says what was expected, what came, and the invariant.
        UnknownNameError: there is no check of a name in ``without``.
        TypeError: ``rounding`` is no module.
        ValueError: so few draws could not see a bias of a fifth of a step.

    >>> from brevitas_bp import StochasticRound
    >>> "mean" in check_rounding(StochasticRound, straight_through=True)
    True
    """
    where = "brevitas_bp.testing.check_rounding"
    module = rounding() if inspect.isclass(rounding) and issubclass(rounding, nn.Module) else rounding
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{where}: expected a module that rounds, or its class, got {rounding!r}; a config is "
            "tested with check_codec(codec_from(config))")
    if draws < 1:
        raise ValueError(f"{where}: draws must be >= 1, got {draws}; 256 calls see a twelfth of a step")
    name = type(module).__name__
    subject = Rounding(module, unbiased, draws, straight_through, tuple(dtypes))
    return run_checks(where, name, ROUNDING_CHECKS, subject, without)
