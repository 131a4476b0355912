"""H23, FSDP2: parameters are sharded, gathered, freed and gathered again; none is packed."""

import pytest

from tests.distributed.fsdp import OPTIONS, ORDERS
from tests.distributed.support import Facts
from tests.distributed.test_replicas import assert_alike, assert_right

CASES = [f"{order} {option}" for order in ORDERS for option in OPTIONS]


@pytest.mark.parametrize("case", CASES)
def test_as_plain_fsdp_and_as_one_process(facts: dict[str, list[Facts]], case: str) -> None:
    assert_right([found[case] for found in facts["fsdp compare"]])


def test_as_ddp(facts: dict[str, list[Facts]]) -> None:
    """With two processes a sum has only one order: even the noise equals DDP's."""
    sharded, replicated = facts["fsdp compare"][0], facts["ddp compare"][0]
    assert sharded["outside reshard"]["bits"] == replicated["outside plain"]["bits"]


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_precision(facts: dict[str, list[Facts]], order: str) -> None:
    first, second = (found[order] for found in facts["fsdp bfloat16"])
    for found in (first, second):
        assert_alike(found["bits"])
        # Before: 2 bytes per value. Derivatives take 4 bits plus metadata: 3.7 times less.
        assert found["ratio"] > 3.7
    assert first["bits"]["quantized"][1:] == second["bits"]["quantized"][1:]


def test_gathered_parameters_are_never_packed(facts: dict[str, list[Facts]]) -> None:
    for found in facts["fsdp parameters"]:
        controls, counts = found["controls"], found["counts"].values()
        assert controls["naive"] == 3
        assert controls["naive frozen"] == 5
        assert controls["not looked up"][0] == 6  # the frozen weight and its halves, in two steps
        assert len(counts) == 12
        assert all(parameters == 0 and tensors > 0 for parameters, tensors in counts)


def test_a_failure_leaves_nothing_behind(facts: dict[str, list[Facts]]) -> None:
    for found in facts["fsdp failure"]:
        assert found["after"] == [False, False, 0]
        assert found["grads"][0] == found["grads"][1]
