"""Trains one network, with one seed and data order, with nine ways to keep saved tensors.

    python examples/efficientnet_v2/demo.py                                  # digits, make demo
    python examples/efficientnet_v2/demo.py --dataset cifar10 --model efficientnet_v2_tiny \
        --epochs 5 --batch-size 128 --only fp32,stochastic-2bit --seeds 0 --out runs/cifar10

Prints one table and writes `comparison.png` and `results.json`. Ctrl-C leaves runs that can be resumed:
the same command continues where it stopped, and never repeats a finished run.

Expect on two CPU cores, in about three minutes (accuracies vary by a point or two between
machines and seeds; the accuracy of the per-tensor baseline varies by ten):

    saved tensors         accuracy     exact    stored  ratio
    FP32                    96.7 %  26.22 MiB  26.22 MiB   1.0x
    2-bit per tensor, all   90.5 %  26.22 MiB   1.65 MiB  15.9x
    2-bit stochastic, all   96.4 %  26.22 MiB   1.85 MiB  14.2x
    2-bit nearest           96.7 %  26.22 MiB   2.50 MiB  10.5x
    2-bit stochastic        96.7 %  26.22 MiB   2.50 MiB  10.5x
    2/4-bit mix             97.5 %  26.22 MiB   3.04 MiB   8.6x
    2-bit rotated           97.2 %  26.22 MiB   2.47 MiB  10.6x
    1-bit stochastic        89.1 %  26.22 MiB   1.96 MiB  13.4x
    1-bit rotated           96.1 %  26.22 MiB   1.93 MiB  13.6x
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from checkpoint import refuse_other_config
from cli import add_knobs, from_arguments, identity
from comparison import Entry, Finished, plot_comparison, print_table, write_results
from faults import InputError, exit_status
from quantizers import find_quantizer
from run_folder import RunFolder
from train import Knobs, run

from brevitas_bp.errors import nearest


@dataclass(frozen=True)
class Variant:
    """One way to keep saved tensors: its name in table and figure, quantizer, colour and policy."""

    label: str
    quant: str
    color: str
    policy: Literal["op_aware", "all"] | None = None
    budget: str = ""


VARIANTS: Mapping[str, Variant] = {
    "fp32": Variant("FP32", "none", "#3f4650"),
    # The deterministic baseline of the thesis: one symmetric scale for the whole tensor, and the same
    # rounding for every tensor.
    "thesis-2bit": Variant(
        "2-bit per tensor, all", "ThesisInt2DynamicActPerTensorFloat", "#b4413c", "all"
    ),
    "stochastic-2bit-all": Variant(
        "2-bit stochastic, all",
        "ShiftedUint2DynamicActPerBucketFloatStochastic",
        "#8a5fb0",
        "all",
    ),
    "nearest-2bit": Variant(
        "2-bit nearest", "ShiftedUint2DynamicActPerBucketFloat", "#d9902b"
    ),
    "stochastic-2bit": Variant(
        "2-bit stochastic", "ShiftedUint2DynamicActPerBucketFloatStochastic", "#2f6db5"
    ),
    "mix-2-4bit": Variant(
        "2/4-bit mix", "ShiftedUint2Mix4DynamicActPerBucketFloatStochastic", "#2a8f7b"
    ),
    "rotated-2bit": Variant("2-bit rotated", "RotatedNormal2DynamicActPerBucketFloat", "#1b6f6a"),
    # With 1 bit, stochastic rounding collapses. A rotated code still trains.
    "stochastic-1bit": Variant(
        "1-bit stochastic", "ShiftedUint1DynamicActPerBucketFloatStochastic", "#9db7dc"
    ),
    "rotated-1bit": Variant("1-bit rotated", "RotatedNormal1DynamicActPerBucketFloat", "#6bb5a9"),
}
#: Runs that only `--only` can select.
MORE_VARIANTS: Mapping[str, Variant] = {
    "average-0.5bit": Variant(
        "0.5-bit averages", "ShiftedUint2Avg4DynamicActPerBucketFloatStochastic", "#c05299"
    ),
    "planned-5%": Variant(
        "planned, 1/20",
        "RotatedNormal2DynamicActPerBucketFloat",
        "#1d8348",
        budget="5%",
    ),
    "planned-9%": Variant(
        "planned, 1/11",
        "RotatedNormal2DynamicActPerBucketFloat",
        "#7d9d2c",
        budget="9%",
    ),
}
ALL = {**VARIANTS, **MORE_VARIANTS}
SET_HERE = ("quant", "quant_override", "seed", "out", "resume", "overwrite")


@dataclass(frozen=True)
class Plan:
    """What to run and where."""

    knobs: Knobs
    only: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    overwrite: bool

    def knobs_of(self, name: str, seed: int) -> Knobs:
        """Return the knobs of one run."""
        variant, out = ALL[name], str(self.out / f"{name}-seed{seed}")
        knobs = replace(self.knobs, quant=variant.quant, seed=seed, out=out)
        if variant.policy is not None:
            knobs = replace(knobs, policy=variant.policy)
        if variant.budget:
            knobs = replace(knobs, budget=variant.budget)
        if variant.quant == "none":  # these knobs require a quantizer
            knobs = replace(knobs, policy="op_aware", storage="save_quantized")
        return knobs


def compare(plan: Plan) -> list[Entry]:
    """Run every run of the plan, or the unfinished part of it."""
    todo = [(name, plan.knobs_of(name, seed)) for name in plan.only for seed in plan.seeds]
    for _, knobs in todo:  # report every mistake before the first run starts
        find_quantizer(knobs.quant)
        if not plan.overwrite:
            _finished(knobs)
    entries = {name: Entry(ALL[name].label, ALL[name].color) for name in plan.only}
    for number, (name, knobs) in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {ALL[name].label}, seed {knobs.seed}", flush=True)
        entries[name].runs.append(_do(knobs, plan.overwrite))
    return list(entries.values())


def _finished(knobs: Knobs) -> Finished | None:
    """Return the run if it is finished; raise an `InputError` if it was made with other knobs."""
    folder = RunFolder(knobs.folder(), identity(knobs))
    result = folder.result()
    if result is None:
        return None
    refuse_other_config(folder.path, result["config"], folder.config)
    return Finished(knobs.seed, result, folder.rows())


def _do(knobs: Knobs, overwrite: bool) -> Finished:
    """Reuse, resume or start one run."""
    done = None if overwrite else _finished(knobs)
    if done is not None:
        print("  finished before; --overwrite runs it again", flush=True)
        return done
    resume = not overwrite and (knobs.folder() / "checkpoint.pt").is_file()
    run(replace(knobs, resume=resume, overwrite=not resume))
    done = _finished(knobs)
    assert done is not None
    return done


def _parser() -> argparse.ArgumentParser:
    text, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--only", default=",".join(VARIANTS), help="runs, separated by commas")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--out", default="runs/demo", help="output folder [default: runs/demo]")
    parser.add_argument("--overwrite", action="store_true", help="repeat finished runs")
    add_knobs(parser, Knobs, skip=SET_HERE)
    return parser


def _plan(parsed: argparse.Namespace) -> Plan:
    only = tuple(dict.fromkeys(parsed.only.split(",")))
    for name in only:
        if name not in ALL:
            hint = nearest(name, ALL)
            raise InputError(f"--only {name}: expected some of {', '.join(ALL)}{hint}")
    try:
        seeds = tuple(dict.fromkeys(int(word) for word in parsed.seeds.split(",")))
    except ValueError as error:
        raise InputError(f"--seeds {parsed.seeds}: expected integers, as in 0,1,2") from error
    knobs = from_arguments(Knobs, parsed, out="", overwrite=False)
    return Plan(knobs, only, seeds, Path(parsed.out), parsed.overwrite)


def _write(plan: Plan, entries: list[Entry]) -> None:
    """Write the table, the figure and the JSON file."""
    knobs = plan.knobs
    title = f"{knobs.model} on {Path(knobs.dataset).name}"
    seeds = (
        f"{len(plan.seeds)} seeds, mean ± standard deviation" if len(plan.seeds) > 1 else "1 seed"
    )
    recipe = f"{knobs.epochs} epochs, batch {knobs.batch_size}, {seeds}"
    subtitle = f"{recipe}; same initial weights, data order and augmentation for every line"
    print_table(entries, title)
    settings: dict[str, Any] = {**identity(knobs), "seeds": list(plan.seeds)}
    for key in ("quant", "quant_override", "seed"):
        del settings[key]
    write_results(plan.out / "results.json", entries, settings)
    plot_comparison(entries, title, subtitle).savefig(plan.out / "comparison.png", dpi=160)
    print(f"written to {plan.out}: comparison.png, results.json, and a folder for each run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser, words = _parser(), sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(words)

    def body() -> None:
        plan = _plan(parsed)
        _write(plan, compare(plan))

    again = [word for word in words if word != "--overwrite"]
    return exit_status(body, parser.prog, [sys.executable, sys.argv[0], *again])


if __name__ == "__main__":
    sys.exit(main())
