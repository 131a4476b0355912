"""Measures one model, plain and wrapped: equality, error of the gradient, and bytes kept."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from public_models_subject import Subject, Unmeasured, differentiable
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat as TwoBits
from brevitas_bp.quant import RotatedNormal8DynamicActPerBucketFloat as EightBits

MEASURED = "measured"


@dataclass(frozen=True)
class Row:
    """Measurements of one model, or the reason for having none.

    Attributes:
        model: source and name.
        status: "measured", or what prevented the measurement.
        detail: more about the status.
        inputs: shapes of the inputs.
        parameters: number of parameters.
        differs: results that are not bit-identical to the plain model's, each with its run.
        error_2, error_8: ``|g~ - g| / |g|`` of the whole gradient, one draw at 2 and at 8 bits.
        worst: the parameter whose gradient has most of the squared error at 2 bits.
        worst_share: this parameter's part of the squared error.
        exact_bytes, stored_bytes: bytes saved for backward, plain and at 2 bits.
        kept: operation -> bytes of tensors that stay exact at 2 bits.
        seconds: time for everything, building included.
    """

    model: str
    status: str = MEASURED
    detail: str = ""
    inputs: str = ""
    parameters: int = 0
    differs: list[str] = field(default_factory=list)
    error_2: float = math.nan
    error_8: float = math.nan
    worst: str = ""
    worst_share: float = 0.0
    exact_bytes: int = 0
    stored_bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """Results of one forward and backward pass."""

    outputs: list[Tensor]
    buffers: list[Tensor]
    random: tuple[Any, ...]
    gradients: dict[str, Tensor | None]
    report: SavedMemoryReport | None


def seed_all(seed: int) -> None:
    """Seeds the generators that dropout, drop path and samplers draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> tuple[Any, ...]:
    """Returns the state that :func:`seed_all` sets."""
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), rest, random.getstate()


class Stepper:
    """Runs a subject again and again from the same buffers and random state."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.buffers = [(buffer, buffer.clone()) for buffer in subject.module.buffers()]

    def restore(self) -> None:
        """Restores buffers and random state to those of the first step; removes gradients."""
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        self.subject.module.zero_grad(set_to_none=True)
        seed_all(self.seed)

    def __call__(self, model: nn.Module, track: bool = False) -> Step:
        """Runs one step.

        The loss is the sum of ``<y, r> / sqrt(numel(y))`` over all outputs ``y`` that need a gradient;
        ``r`` is normal and fixed. The loss itself is not computed: its gradient is passed to backward.
        """
        self.restore()
        with track_saved_memory(model) if track else nullcontext() as report:
            output = self.subject.call(model)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        wanted = differentiable(output)
        if not wanted:
            raise Unmeasured("no gradient", "no output needs a gradient")
        generator = torch.Generator().manual_seed(self.seed)
        torch.autograd.backward(wanted, [
            (torch.randn(y.shape, generator=generator) / max(y.numel(), 1) ** 0.5).to(y.dtype)
            for y in wanted])
        module = self.subject.module
        return Step(
            [leaf.detach().clone() for leaf in leaves], [b.clone() for b in module.buffers()],
            random_state(), {name: p.grad for name, p in module.named_parameters()}, report)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = dense(a), dense(b)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def all_same(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> bool:
    """Whether two lists of tensors are equal and equally long."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(same, a, b))


def differences(plain: Step, other: Step, run: str, gradients: bool = False) -> list[str]:
    """Returns the parts of two steps that are not bit-identical."""
    equal = {
        "outputs": all_same(plain.outputs, other.outputs),
        "buffers": all_same(plain.buffers, other.buffers),
        "random state": plain.random == other.random,
        "gradients": not gradients or all_same(plain.gradients.values(), other.gradients.values()),
    }
    return [f"{what}, {run}" for what, is_equal in equal.items() if not is_equal]


def dense(tensor: Tensor) -> Tensor:
    """Returns a dense tensor; gradients of embeddings may be sparse."""
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def square(tensor: Tensor) -> float:
    """Returns the sum of squares, in float64."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return float(real.double().square().sum())


def gradient_error(plain: Step, rounded: Step) -> tuple[float, str, float]:
    """Returns ``|g~ - g| / |g|`` of the whole gradient, and the parameter with most of the error.

    Returns: The error, infinite if a rounded gradient is not finite; the parameter with the largest part
        of the squared error; that part.
    """
    errors: dict[str, float] = {}
    total = 0.0
    for name, exact in plain.gradients.items():
        other = rounded.gradients[name]
        present = exact if exact is not None else other
        if present is None:
            continue
        zero = torch.zeros_like(dense(present))
        g, h = (dense(x) if x is not None else zero for x in (exact, other))
        total += square(g)
        error = square(h.double() - g.double() if not g.is_complex() else h - g)
        errors[name] = error if math.isfinite(error) else math.inf
    worst = max(errors, key=lambda name: errors[name])
    both = sum(errors.values())
    share = errors[worst] / both if 0 < both < math.inf else float(both > 0)
    return math.sqrt(both / total), worst, share


@contextmanager
def failing_as(status: str) -> Iterator[None]:
    """Turns an error raised in the block into the reason for having no figures."""
    try:
        yield
    except Unmeasured:
        raise
    except Exception as error:
        raise Unmeasured(status, f"{type(error).__name__}: {error}") from error


def plain_step(step: Stepper) -> Step:
    """Runs a step of the model alone, and checks that it is reproducible and has a gradient.

    Raises:
        Unmeasured: the step is not reproducible, or its gradient is zero or not finite.
    """
    with failing_as("plain model fails"):
        first, plain = step(step.subject.module), step(step.subject.module)
    if changed := differences(first, plain, "plain", gradients=True):
        raise Unmeasured("plain model not reproducible", "; ".join(changed))
    norm = sum(square(dense(g)) for g in plain.gradients.values() if g is not None)
    if not math.isfinite(norm):
        raise Unmeasured("gradient not finite")
    if norm == 0:
        raise Unmeasured("no gradient", "it is zero")
    return plain


def measure(name: str, build: Callable[[], Subject], *, seed: int, bucket_size: int) -> Row:
    """Builds one model and runs it plain, exact, at 2 and at 8 bits.

    Args:
        name: name of the row.
        build: makes the model, the same at each call.
        seed: seed of dropout, of the loss and of the rounding.
        bucket_size: elements that share a scale.

    Raises:
        Unmeasured: the model cannot be built or run, or fails when it is wrapped.
    """
    seed_all(0)
    with failing_as("not built"):
        subject = build()
    step = Stepper(subject, seed)
    plain = plain_step(step)
    options: dict[str, Any] = {
        "bucket_size": bucket_size, "metadata_dtype": torch.bfloat16, "seed": seed}
    with failing_as("FAILS WRAPPED"):
        exact = step(QuantBackwardWrapper(subject.module, policy="exact", seed=seed))
        differs = differences(plain, exact, "exact", gradients=True)
        del exact
        wrapped = QuantBackwardWrapper(subject.module, TwoBits, **options)
        two = step(wrapped, track=True)
        kept = Counter[str]()
        for site in wrapped.explain().sites.values():
            if site.stored == "exact":
                kept[site.op] += site.stored_bytes
        differs += differences(plain, two, "2 bits")
        error_2, worst, share = gradient_error(plain, two)
        report = two.report
        assert report is not None
        del two
        eight = step(QuantBackwardWrapper(subject.module, EightBits, **options))
        differs += differences(plain, eight, "8 bits")
        error_8 = gradient_error(plain, eight)[0]
    parameters = sum(p.numel() for p in subject.module.parameters())
    return Row(
        name, MEASURED, "", subject.shapes, parameters, differs, error_2, error_8, worst,
        round(share, 3), report.exact_bytes, report.stored_bytes, dict(kept))
