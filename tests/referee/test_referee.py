"""PyTorch's own gradient samples through the wrapper: one of each operator and module.

All samples run under the exact policy. The names are divided into three parts; each other check runs one
part, and together they cover all names. To run everything, see ``tests/referee/run.py``. The samples run
in their own process, because importing PyTorch's internal test modules forbids changes of backend flags
and loads a hypothesis profile.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.kernels.gpu_worker import Worker
from tests.referee.cases import Selection
from tests.referee.run import ALL_VARIANTS, referee

FORWARD = ["function", "module"]
# Samples whose arguments are computed from one another test roundings only.
COMPUTED = ["function of itself"]
OTHERS = [variant for variant in ALL_VARIANTS if variant not in (*FORWARD, *COMPUTED)]
EVERYTHING = Selection()
THIRDS = [Selection(part=part, parts=3) for part in range(3)]

#: Least number of names. PyTorch 2.13 has 540 functions, 459 of them in bfloat16.
LEAST: defaultdict[tuple[str, str], int] = defaultdict(lambda: 100, {
    ("function", "float32"): 400, ("function", "float64"): 400, ("function", "bfloat16"): 350,
    ("function of views", "float32"): 400, ("method", "float32"): 200, ("module", "bfloat16"): 1})


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker(OMP_NUM_THREADS="1")
    yield process
    process.close()


def run(
        worker: Worker, policy: str, selection: Selection, dtype: str = "float32",
        variants: Sequence[str] = FORWARD) -> dict[str, Any]:
    report = worker.run(referee, policy, dtype, variants, 1, selection)
    for variant in variants:
        assert report["variants"][variant]["ops"] > LEAST[variant, dtype] / selection.parts
    return report


# One of three policies quantizes each operator; each check has its own part.
@pytest.mark.parametrize(("policy", "dtype", "variants", "selection"), [
    ("exact", "float32", FORWARD, EVERYTHING), ("exact", "float32", OTHERS, THIRDS[0]),
    ("exact", "bfloat16", FORWARD, THIRDS[1]), ("op_aware", "float32", [*FORWARD, *OTHERS], THIRDS[0]),
    ("all", "float32", FORWARD, THIRDS[1]), ("linear", "float64", FORWARD, THIRDS[2]),
    ("linear", "float64", COMPUTED, EVERYTHING)],
    ids=["exact", "exact variants", "exact bfloat16", "op_aware", "all", "linear", "of itself"])
def test_nothing_fails(
        worker: Worker, policy: str, dtype: str, variants: Sequence[str],
        selection: Selection) -> None:
    report = run(worker, policy, selection, dtype, variants)
    assert report["failures"] == []


def test_the_parts_are_all() -> None:
    names = [f"operator {i}" for i in range(300)]
    assert all([name in part for part in THIRDS].count(True) == 1 for name in names)
    assert all(name in EVERYTHING for name in names)


def test_naive_hooks_are_caught(worker: Worker) -> None:
    # Of all 654 names, 293 fail: the others save no floats, or integers that two bits hold.
    assert len(run(worker, "naive hooks", THIRDS[2])["failing_ops"]) > 250 / 3


def test_overwriting_under_hooks_that_keep_is_caught(worker: Worker) -> None:
    overwritten = ["function", "in place after it was saved"]
    report = run(worker, "identity hooks", THIRDS[0], variants=overwritten)
    assert report["variants"]["function"]["failed"] == 0
    assert report["variants"]["in place after it was saved"]["failed"] > 100 / 3


def test_one_rounding_that_meets_itself_is_caught(worker: Worker) -> None:
    report = worker.run(
        referee, "linear, all shared", "float64", COMPUTED, 1, EVERYTHING)
    assert {"nn.functional.linear", "mul", "matmul", "mv", "div.no_rounding_mode"} <= set(
        report["failing_ops"])


def test_rounding_what_backward_is_not_linear_in_is_caught(worker: Worker) -> None:
    curved = ["nn.GELU", "nn.Softmax", "nn.LSTMCell"]
    report = worker.run(
        referee, "linear, of all", "float64", ["module"], 1, Selection([*curved, "nn.Linear"]))
    assert report["failing_ops"] == sorted(curved)
