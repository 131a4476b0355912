"""PyTorch's own gradient samples through the wrapper: one of each operator and module.

All samples: see ``tests/referee/run.py``. They run in a process of their own, because PyTorch's internal
test modules forbid changes of backend flags and load a hypothesis profile when they are imported.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.kernels.gpu_worker import Worker
from tests.referee.run import ALL_VARIANTS, referee

FORWARD = ["function", "module"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker(OMP_NUM_THREADS="1")
    yield process
    process.close()


def run(
        worker: Worker, policy: str, dtype: str = "float32",
        variants: Sequence[str] = FORWARD) -> dict[str, Any]:
    report = worker.run(referee, policy, dtype, variants, 1)
    # 540 in PyTorch 2.13, 459 of them in bfloat16.
    assert report["variants"]["function"]["ops"] > 400
    return report


@pytest.mark.parametrize(("policy", "dtype", "variants"), [
    ("exact", "float32", ALL_VARIANTS), ("exact", "bfloat16", FORWARD),
    ("op_aware", "float32", ALL_VARIANTS), ("all", "float32", FORWARD),
    ("linear", "float64", FORWARD)])
def test_nothing_fails(
        worker: Worker, policy: str, dtype: str, variants: Sequence[str]) -> None:
    report = run(worker, policy, dtype, variants)
    assert report["failures"] == []


def test_naive_hooks_are_caught(worker: Worker) -> None:
    # 293 of 654 names: the others save no floats, or integers that two bits hold.
    assert len(run(worker, "naive hooks")["failing_ops"]) > 250


def test_overwriting_under_hooks_that_keep_is_caught(worker: Worker) -> None:
    overwritten = ["function", "in place after it was saved"]
    report = run(worker, "identity hooks", variants=overwritten)
    assert report["variants"]["function"]["failed"] == 0
    assert report["variants"]["in place after it was saved"]["failed"] > 100


def test_rounding_what_backward_is_not_linear_in_is_caught(worker: Worker) -> None:
    curved = ["nn.GELU", "nn.Softmax", "nn.LSTMCell"]
    report = worker.run(
        referee, "linear, of all", "float64", ["module"], 1, [*curved, "nn.Linear"])
    assert report["failing_ops"] == sorted(curved)
