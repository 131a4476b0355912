"""Runs PyTorch's own gradient samples through the wrapper; reports counts and failures.

    python -m tests.referee.run --policy exact --json out.json

Policies:

- "exact": all results are bit-equal to plain autograd.
- "op_aware", "all", "all_but_relu": every encoding is forced. Outputs are bit-equal, nothing crashes,
  and gradients are exact if nothing was rounded.
- "linear": backward is linear in every tensor that the default policy rounds (use --dtype float64).
- Other policies are controls: each failure is a case that the comparison caught.
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.referee.cases import VARIANTS, Selection, module_cases, op_cases
from tests.referee.checks import CHECKS, IRREPRODUCIBLE, Tally, tallies_of

MODULE = "module"
ALL_VARIANTS = [*VARIANTS, MODULE]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints a table, and returns 1 if anything failed."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    report = referee(
        options.policy, options.dtype, options.variant or ALL_VARIANTS, options.samples,
        Selection(options.op, *options.part))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    _show(report)
    return int(bool(report["failures"]))


def referee(
        policy: str, dtype: str, variants: Sequence[str], limit: int | None,
        selection: Selection | None = None) -> dict[str, Any]:
    """Returns all counts, ready for JSON.

    Args:
        policy: key of :data:`CHECKS`.
        dtype: dtype of the samples.
        variants: some of :data:`ALL_VARIANTS`.
        limit: most samples of one operator or module; None: all.
        selection: operators and modules to run; None: all.
    """
    in_dtype, selection = getattr(torch, dtype), selection or Selection()
    of_ops = [variant for variant in variants if variant in VARIANTS]
    cases = itertools.chain(
        op_cases(in_dtype, of_ops, limit, selection) if of_ops else (),
        module_cases(in_dtype, limit, selection) if MODULE in variants else ())
    started = time.perf_counter()
    with warnings.catch_warnings():
        # Warnings of PyTorch about how it makes samples.
        warnings.simplefilter("ignore")
        tallies = tallies_of(CHECKS[policy], cases)
    failed = [(case, text) for tally in tallies.values() for case, text in tally.failures]
    unsteady = {op for tally in tallies.values() for op in tally.irreproducible} - IRREPRODUCIBLE
    return {
        "policy": policy, "dtype": dtype, "samples_per_op": limit, "torch": torch.__version__,
        "part": f"{selection.part}/{selection.parts}",
        "seconds": round(time.perf_counter() - started, 1),
        "variants": {variant: _counts(tally) for variant, tally in tallies.items()},
        "failures": [f"{case}: {text}" for case, text in failed] + [
            f"{op}: plain autograd gives other bits each time" for op in sorted(unsteady)],
        "failing_ops": sorted({case.op for case, _ in failed})}


def _counts(tally: Tally) -> dict[str, Any]:
    return {
        "ops": len(tally.ops), **{name: n for name, n in tally.counts.items() if n},
        "failed": len(tally.failures),
        "not reproducible in plain autograd": dict(tally.irreproducible)}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    variants = report["variants"]
    table = Table("", *variants, title=(
        f"policy {report['policy']}, {report['dtype']}, torch {report['torch']}, "
        f"{report['seconds']} s"))
    for name in dict.fromkeys(name for counts in variants.values() for name in counts):
        shown = [counts.get(name, 0) for counts in variants.values()]
        table.add_row(name, *(str(sum(n.values()) if isinstance(n, dict) else n) for n in shown))
    console = Console(width=140, soft_wrap=True)
    console.print(table)
    for line in report["failures"]:
        console.print(f"failed: {line}", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", choices=CHECKS, default="exact")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--variant", action="append", choices=ALL_VARIANTS)
    parser.add_argument("--samples", type=int, help="most samples of one operator")
    parser.add_argument("--op", action="append", default=[], help="full name of one operator")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N",
        help="run only part I, from 0, of N disjoint parts of the operators")
    parser.add_argument("--json", type=Path)
    return parser


def _part(text: str) -> tuple[int, int]:
    part, parts = (int(number) for number in text.split("/"))
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text}")
    return part, parts


if __name__ == "__main__":
    sys.exit(main())
