"""H23, DistributedDataParallel and what builds on it: two processes get the gradients of one."""

import pytest

from tests.distributed.ddp import OPTIONS, ORDERS
from tests.distributed.support import Facts

CASES = [f"{order} {option}" for order in ORDERS for option in OPTIONS]

#: Every encoding here is at least 7.5 times smaller (4 bits, and 8 bytes per 256 values of 4 bytes). 512
#: bytes of statistics stay exact: 106752 / (106752 / 7.5 + 512) = 7.2 for the smallest network.
LEAST_RATIO = 7.0


def assert_right(facts: list[Facts]) -> None:
    """Asserts what holds for every engine, on facts of :func:`~tests.distributed.ddp.compare_one`."""
    for found in facts:
        # Plain and exact runs give the bits of one process on the whole batch.
        assert found["integers"]["plain"][1] == found["single"]
        assert found["integers"]["exact"] == found["integers"]["plain"]
        assert_alike(found["bits"])
        assert found["ratio"] > LEAST_RATIO
    # After several steps, gradients and parameters are equal on all processes; outputs are not.
    first, second = (found["bits"]["quantized"] for found in facts)
    assert first[1:] == second[1:]
    assert first[0] != second[0]


def assert_alike(bits: dict[str, list[str]]) -> None:
    """Exact: all bits are plain's. Quantized: outputs are, gradients are not; a seed repeats them."""
    assert bits["exact"] == bits["plain"]
    assert bits["quantized"][0] == bits["plain"][0]
    assert bits["quantized"][1] != bits["plain"][1]
    assert bits["again"] == bits["quantized"]


@pytest.mark.parametrize("case", CASES)
def test_ddp_is_as_plain_ddp_and_as_one_process(facts: dict[str, list[Facts]], case: str) -> None:
    assert_right([found[case] for found in facts["ddp compare"]])


def test_parameters_are_never_packed(facts: dict[str, list[Facts]]) -> None:
    for found in facts["ddp parameters"]:
        assert found["naive"] == 3  # the control: naive hooks pack each weight
        for order in ORDERS:
            for default in (False, True):
                parameters, tensors = found[f"{order} {default}"]
                assert parameters == 0
                assert tensors > 0


def test_ranks_draw_different_noise(facts: dict[str, list[Facts]]) -> None:
    """The noise shows in gradients before they are reduced, on equal data everywhere."""
    first, second = facts["ddp accumulate"]
    assert first["own noise"][0] != second["own noise"][0]
    assert first["shared noise"] == second["shared noise"]  # the control
    for found in (first, second):
        assert found["again"] == found["own noise"]
        assert found["other seed"] != found["own noise"]


def test_accumulation_without_synchronisation(facts: dict[str, list[Facts]]) -> None:
    first, second = facts["ddp accumulate"]
    assert first["plain"][0] != second["plain"][0]
    for found in (first, second):
        assert found["exact"] == found["plain"]
    for name in ("exact", "own noise"):
        assert first[name][1] == second[name][1]


@pytest.mark.parametrize("hook", ["fp16", "power"])
def test_gradient_compression_is_unaffected(facts: dict[str, list[Facts]], hook: str) -> None:
    first, second = (found[hook] for found in facts["ddp communication hooks"])
    for found in (first, second):
        assert found["exact"] == found["plain"]
        assert found["quantized"][0] == found["plain"][0]
    assert first["quantized"][1:] == second["quantized"][1:] != first["plain"][1:]
    # The control: compression does change the gradients or, with its second step, the parameters.
    uncompressed = facts["ddp compare"][0]["inside plain"]["bits"]["plain"]
    assert first["plain"][2] != uncompressed[2]


def test_a_failure_leaves_nothing_behind(facts: dict[str, list[Facts]]) -> None:
    """A failure in all processes, and in one of them."""
    for found in facts["ddp failure"]:
        assert found["before"] == found["after [0, 1]"] == found["after [1]"] == [False, False, 0]
        assert found["grads [0, 1]"] == found["grads [1]"] == found["untouched"]


def test_batch_norms(facts: dict[str, list[Facts]]) -> None:
    """PyTorch has SyncBatchNorm for GPUs only; its error is the same with and without the wrapper."""
    for found in facts["ddp batch norm"]:
        plain, wrapped = found["messages"]
        assert plain == wrapped
        assert "GPU" in plain
        assert found["installed"] == [False, False, 0]
        assert found["buffers"][0] == found["buffers"][1]


def test_zero_redundancy_optimizer(facts: dict[str, list[Facts]]) -> None:
    for found in facts["zero"]:
        assert_alike(found)
    first, second = (found["quantized"] for found in facts["zero"])
    assert first[1:] == second[1:]


def test_pipeline(facts: dict[str, list[Facts]]) -> None:
    """A wrapper for each stage."""
    for found in facts["pipeline"]:
        assert found["exact"] == found["plain"] == found["single"]
        assert found["quantized"] == found["again"] != found["plain"]


def test_nothing_is_warned_of(facts: dict[str, list[Facts]]) -> None:
    warned = {name: found[0]["warnings"] for name, found in facts.items() if found[0]["warnings"]}
    assert list(warned) == ["tp groups"]
