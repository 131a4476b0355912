"""Jobs are saved and resumed, with as many processes or with another number."""

import pytest

from tests.distributed.state import ENGINES
from tests.distributed.support import Facts


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_in_a_job_of_the_same_size(facts: dict[str, list[Facts]], engine: str) -> None:
    """Parameters, optimizer, noise and generators continue bit for bit."""
    both = [found[engine] for found in facts["state resume"]]
    for found in both:
        assert found["loaded"] == [found["saved"], found["noise"]]
        assert found["resumed"] == found["straight"]
        assert found["forgetful"] != found["straight"]  # the control: the noise starts again
    assert both[0] == both[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_in_fewer_and_in_more_processes(
        facts: dict[str, list[Facts]], engine: str) -> None:
    """Two processes, then one, then two; the next results of each job are reproducible."""
    before, (alone,) = facts["state resume"][0][engine], facts["state alone"]
    assert alone[engine]["loaded"] == before["saved"]
    assert alone[engine]["noise"] == before["noise"]
    after = [found[engine] for found in facts["state in two"]]
    for found in after:
        assert found["loaded"] == alone[engine]["saved"]
        assert found["noise"] == alone[engine]["left"] != alone[engine]["noise"]
    assert after[0]["next"] == after[1]["next"]
    for found in (alone[engine], *after):
        assert found["next"][0] == found["next"][1] != found["loaded"]


def test_one_state_serves_all_processes_that_have_one_seed(facts: dict[str, list[Facts]]) -> None:
    first, second = facts["state seeds"]
    assert first["7"] == second["7"]
    assert first["None"] != second["None"]  # torch was seeded differently
