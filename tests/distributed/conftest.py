"""Launches the scenarios: all of them in two processes, and some in three successive jobs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import worker
from tests.distributed.launch import ENVIRONMENT, forked
from tests.distributed.support import Facts
from tests.distributed.worker import SCENARIOS
from tests.kernels.gpu_worker import Worker

#: (processes, scenarios) of the jobs. Later jobs start from checkpoints of earlier jobs.
JOBS = [
    (2, [name for name in SCENARIOS if name not in ("state alone", "state in two")]),
    (1, ["state alone"]), (2, ["state in two"])]


@pytest.fixture(scope="session")
def launcher() -> Iterator[Worker]:
    """A process that imports once, and starts jobs as copies of itself."""
    process = Worker(**ENVIRONMENT)
    yield process
    process.close()


def launch(
        launcher: Worker, processes: int, folder: Path,
        scenarios: list[str]) -> dict[str, list[Facts]]:
    """Returns facts of each scenario, one entry per process."""
    done = launcher.run(forked, processes, worker.main, [str(folder), *scenarios])
    assert done.returncode == 0, done.output
    found = [json.loads((folder / f"{processes}-{rank}.json").read_text())
             for rank in range(processes)]
    return {name: [facts[name] for facts in found] for name in scenarios}


@pytest.fixture(scope="session")
def facts(
        tmp_path_factory: pytest.TempPathFactory, launcher: Worker) -> dict[str, list[Facts]]:
    """Returns scenario -> facts of each process."""
    folder = tmp_path_factory.mktemp("distributed")
    found: dict[str, list[Facts]] = {}
    for processes, scenarios in JOBS:
        found |= launch(launcher, processes, folder, scenarios)
    return found
