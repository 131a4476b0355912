"""Checks of each case. Every check returns what is wrong, or None."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.backward.policy import POLICIES, explained
from tests.backward.support import identity_hooks, naive_hooks
from tests.referee.cases import Case
from tests.referee.forced import Nudge, Recorder, encoding_forced
from tests.referee.outcome import Outcome, Wrap, difference, misfit, outcome_of, strided

#: A bucket size so small that small samples have several buckets.
BUCKET = 16

#: Most tensors of one sample that are moved, one at a time.
MOST_MOVED = 24

#: Size of a move. It need not be small: a linear function is linear at any distance.
STEP = 0.5

#: Operators that give other bits when plain autograd repeats them, for a few of their samples.
IRREPRODUCIBLE = {"linalg.lstsq", "linalg.lstsq.grad_oriented"}


@dataclass
class Tally:
    """Counts for one variant, and the cases that failed."""

    ops: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, str]] = field(default_factory=list)
    irreproducible: Counter[str] = field(default_factory=Counter)

    def note(self, case: Case, expected: Outcome) -> None:
        """Counts the outcome of plain autograd."""
        self.ops.add(case.op)
        self.counts["samples"] += 1
        self.counts["outputs"] += len(expected.outputs)
        self.counts["gradients"] += sum(grad is not None for grad in expected.grads)
        self.counts["raise in plain autograd"] += expected.error is not None
        self.counts["nothing to differentiate"] += expected.error is None and not expected.backward


#: (case, outcome of plain autograd, tally) -> what is wrong, or None.
Check = Callable[[Case, Outcome, Tally], str | None]


def check_exact(case: Case, expected: Outcome, tally: Tally) -> str | None:
    """Under the exact policy everything equals plain autograd, bit for bit."""
    return difference(outcome_of(case, _wrapped("exact")), expected)


def check_hooks(hooks: Callable[[], saved_tensors_hooks]) -> Check:
    """The control: a pair of hooks of a few lines, in place of the wrapper."""
    def check(case: Case, expected: Outcome, tally: Tally) -> str | None:
        return difference(outcome_of(case, lambda module: _UnderHooks(module, hooks)), expected)

    return check


def check_quantized(policy: str) -> Check:
    """Checks a quantizing policy, with every encoding forced.

    Outputs and errors must equal plain autograd's. Gradients must have its shape and dtype, and be
    finite if its gradients are. If no quantizer was used, gradients must be equal bit for bit.
    """
    def check(case: Case, expected: Outcome, tally: Tally) -> str | None:
        recorder = Recorder(explained(POLICIES[policy]))
        with encoding_forced():
            actual = outcome_of(case, _wrapped(recorder, bucket_size=BUCKET))
        tally.counts["samples with rounded tensors"] += bool(recorder.rounded)
        if expected.error is not None and actual.error is None:
            # An encoded tensor may be overwritten. Plain autograd has to refuse; the wrapper need not.
            overwritten = "modified by an inplace operation" in str(expected.error)
            tally.counts["overwritten, and saved by the encoding"] += overwritten
            return None if overwritten else difference(actual, expected)
        untouched = not (recorder.rounded or recorder.replaced)
        tally.counts["samples with bit-equal gradients"] += untouched and expected.backward
        wrong = difference(actual, expected, grads=untouched)
        if wrong or expected.error is not None:
            return wrong
        # The other policies round divisors to zero, for example.
        return misfit(actual.grads, expected.grads, finite=policy == "op_aware")

    return check


def check_linear(policy: str, *, all_shared: bool = False) -> Check:
    """Checks that the gradient is linear in every tensor that a policy rounds.

    The check moves one saved tensor at a time by ``d`` and by ``-d``. The two gradients must average to
    the unmoved gradient. Linearity makes stochastic rounding unbiased: roundings of different tensors
    are independent, and so are roundings that the policy does not share. With ``all_shared``, operations
    share roundings whatever the policy says.
    """
    def check(case: Case, expected: Outcome, tally: Tally) -> str | None:
        if expected.error is not None or not expected.backward:
            return None
        nudged = partial(_nudged, case, policy, all_shared)
        still, recorder, encoded = nudged(None, 0.0)
        tally.counts["tensors of stated bias left out"] += recorder.left_out
        if still.error is not None:
            return difference(still, expected)
        middle = _flat(still)
        wrong = _apart(middle, _flat(expected), middle)
        if wrong:
            return f"with nothing moved, {wrong}"
        for which in range(min(encoded, MOST_MOVED)):
            up, down = (_flat(nudged(which, step)[0]) for step in (STEP, -STEP))
            tally.counts["tensors moved"] += 1
            wrong = _apart([(a + b) / 2 for a, b in zip(up, down)], middle, up)
            if wrong:
                return f"not linear in tensor {which} of those saved by {recorder.rounded}: {wrong}"
        return None

    return check


def _nudged(
        case: Case, policy: str, all_shared: bool, which: int | None,
        step: float) -> tuple[Outcome, Recorder, int]:
    recorder = Recorder(explained(POLICIES[policy]), unbiased_only=True, all_shared=all_shared)
    codec = Nudge(which, step)
    with encoding_forced():
        outcome = outcome_of(
            case, lambda module: QuantBackwardWrapper(module, codec, policy=recorder, seed=1))
    return outcome, recorder, codec.encoded


def _flat(outcome: Outcome) -> list[Tensor]:
    """Returns the gradients as vectors, in any layout; an empty vector for a missing gradient."""
    return [
        torch.empty(0) if grad is None else torch.cat([x.reshape(-1) for x in strided(grad)])
        for grad in outcome.grads]


def _apart(actual: list[Tensor], expected: list[Tensor], terms: list[Tensor]) -> str | None:
    """Returns how far two sets of gradients are apart, if rounding of ``terms`` cannot explain it.

    Samples are float64 with up to some thousands of terms in a sum. 1e4 roundings of 2**-53 each are
    1e-12 of the largest term. A further 1e3 covers cancellation within one operation, and gradients that
    are small because larger ones cancel. A second-order term is of the order of ``STEP ** 2``.
    """
    of_all = max((float(t.abs().nan_to_num(posinf=0).max()) for t in terms if len(t)), default=0.0)
    for ours, theirs, term in zip(actual, expected, terms, strict=True):
        if len(ours) != len(theirs):
            return "a gradient is missing, or there where none was"
        finite = theirs.isfinite() & term.isfinite()
        if not finite.any():
            continue
        largest = max(float(t[finite].abs().max()) for t in (theirs, term))
        error = float((ours - theirs)[finite].abs().max())
        if not error <= max(1e-9 * largest, 1e-12 * of_all):
            return f"gradients are {error:.1e} apart, of at most {largest:.1e}"
    return None


def _wrapped(policy: Any, **options: Any) -> Wrap:
    return lambda module: QuantBackwardWrapper(module, policy=policy, seed=1, **options)


class _UnderHooks(nn.Module):

    def __init__(self, module: nn.Module, hooks: Callable[[], saved_tensors_hooks]) -> None:
        super().__init__()
        self.module = module
        self.hooks = hooks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.hooks():
            return self.module(*args, **kwargs)


#: name -> check. ``--policy`` takes these names.
CHECKS: dict[str, Check] = {
    "exact": check_exact,
    "op_aware": check_quantized("op_aware"),
    "all": check_quantized("all"),
    "all_but_relu": check_quantized("all_but_relu"),
    "linear": check_linear("op_aware"),
    # Controls: their failures show what the checks can see.
    "naive hooks": check_hooks(naive_hooks),
    "identity hooks": check_hooks(identity_hooks),
    "linear, of all": check_linear("all"),
    "linear, all shared": check_linear("op_aware", all_shared=True),
}


def tallies_of(check: Check, cases: Iterable[Case]) -> dict[str, Tally]:
    """Runs every case plain and checked; returns variant -> tally."""
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    for case in cases:
        tally, expected = tallies[case.variant], outcome_of(case)
        tally.note(case, expected)
        wrong = check(case, expected, tally)
        if wrong is None:
            continue
        # Keep the results alive, so that each run gets other memory.
        again = [outcome_of(case) for _ in range(40 if case.op in IRREPRODUCIBLE else 3)]
        if any(difference(other, expected) for other in again):
            tally.irreproducible[case.op] += 1
        else:
            tally.failures.append((case, wrong))
    return tallies
