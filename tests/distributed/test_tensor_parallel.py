"""Tensor parallelism: shards of DTensors are stored, and copies of parameters stay equal."""

import pytest

from tests.distributed.support import Facts
from tests.distributed.tensor_parallel import STRATEGIES
from tests.distributed.test_replicas import LEAST_RATIO, assert_alike


def test_exact_is_as_one_process(facts: dict[str, list[Facts]]) -> None:
    for found in facts["tp compare"]:
        assert found["integers"]["plain"] == found["integers"]["exact"] == found["single"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_plain_tensor_parallelism(facts: dict[str, list[Facts]], strategy: str) -> None:
    both = [found[strategy]["bits"] for found in facts["tp compare"]]
    for bits in both:
        assert_alike(bits)
        # A rounding is the same, whether it is stored early or late.
        assert bits["late"] == bits["quantized"]
    assert both[0]["quantized"][1:] == both[1]["quantized"][1:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_take_less_memory(facts: dict[str, list[Facts]], strategy: str) -> None:
    for found in (f[strategy] for f in facts["tp compare"]):
        assert found["ratio"] > LEAST_RATIO
        assert found["saved"][0] == found["plain saved"][0] == found["exact saved"][1]
        assert found["ratio without shards"] < 3  # the control: DTensors are kept exact


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_knows_the_operations(facts: dict[str, list[Facts]], strategy: str) -> None:
    for found in facts["tp stored"]:
        stored = {
            (module, op): name for module, op, name, *_ in found[strategy]
            if name not in ("exact", "not kept")}
        # The output of a ReLU may be an ordinary tensor.
        stored = {place: name.partition(",")[0] for place, name in stored.items()}
        assert stored == {
            ("0", "layer_norm"): "2-bit rotated", ("1", "linear"): "2-bit rotated",
            ("2", "gelu"): "4-bit dithered", ("3", "linear"): "2-bit rotated",
            ("4", "relu"): "relu mask", ("6", "linear"): "2-bit rotated"}
        exact = [(module, op, kept) for module, op, name, _, kept in found[strategy]
                 if name == "exact"]
        # Statistics of 64 rows. The mean of a DTensor is kept, that of an ordinary tensor is not.
        assert exact == [("0", "layer_norm", 512 if strategy == "sequence" else 256)]


def test_parameters_are_never_packed(facts: dict[str, list[Facts]]) -> None:
    """Also not frozen ones, whose transposes have no history, nor their copies under autocast."""
    for found in facts["tp parameters"]:
        assert found["naive"] == 3
        counts = [v for name, v in found.items() if name.split()[0] in STRATEGIES]
        assert len(counts) == 4 * len(STRATEGIES)
        assert all(parameters == 0 and tensors > 0 for parameters, tensors in counts)


def test_copies_of_parameters_do_not_drift(facts: dict[str, list[Facts]]) -> None:
    first, second = facts["tp drift"]
    assert first["own noise"] != second["own noise"]  # the control: each process has its own rank
    for name in ("default", "given", "plain"):
        assert first[name] == second[name]
    assert first["default"] == first["given"] != first["plain"]


def test_groups_are_recognised(facts: dict[str, list[Facts]]) -> None:
    for rank, found in enumerate(facts["tp groups"]):
        assert {name: found[name] for name in found if name not in ("seconds", "warnings")} == {
            "plain": [], "parallel": [0, 1], "fsdp": [], "hybrid fsdp": [],
            "fsdp and parallel": [0, 1], "fsdp, parallel of one": [rank], "gathered": 0,
            "several": []}
        (message,) = found["warnings"]
        assert "several device meshes" in message
        assert "Pass rank=" in message


@pytest.mark.parametrize("name", ["replicated", "rows", "columns", "empty shard", "summands"])
def test_a_dtensor_comes_back_as_it_was(facts: dict[str, list[Facts]], name: str) -> None:
    sizes = set()
    for found in facts["tp shards"]:
        *same, partial, numel = found[name]
        assert same == [True] * 4
        assert partial == (name == "summands")
        sizes.add(numel)
    assert (len(sizes) > 1) == (name in ("rows", "columns", "empty shard"))  # uneven


def test_a_dtensor_is_encoded_once_while_it_is_the_same(facts: dict[str, list[Facts]]) -> None:
    for found in facts["tp once"]:
        assert (found["same"], found["changed"]) == (1, 2)


def test_a_kept_dtensor_is_watched(facts: dict[str, list[Facts]]) -> None:
    for found in facts["tp change"]:
        assert [found[k] for k in ("exact", "small", "late")] == ["ModifiedInPlaceError"] * 3
        assert found["encoded"] == ""


def test_losses_of_dtensors_run_as_they_are(facts: dict[str, list[Facts]]) -> None:
    for found in facts["tp losses"]:
        assert (found["cross entropy"], found["mse"]) == (0, 0)
        assert "works on DTensors" in found["gradients"]


def test_derivatives_of_what_a_collective_makes(facts: dict[str, list[Facts]]) -> None:
    for found in facts["tp gathered"]:
        # Two processes add up: one of 255 steps each, of a range below 1.3.
        assert all(0 < found[name] < 0.02 for name in ("silu", "gelu", "tanh"))
