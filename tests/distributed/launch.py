"""Starts jobs of several processes."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

#: For every process: one thread, and loopback only, so that no name service is needed.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})}

#: Seconds after which a job counts as deadlocked.
TIMEOUT = 600


class Done(NamedTuple):
    """The exit status of a job, and its output on both streams."""

    returncode: int
    output: str


def torchrun(processes: int, *command: str) -> Done:
    """Runs a job on this machine, as users do."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, str(processes), *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False, env={**os.environ, **ENVIRONMENT})
    return Done(done.returncode, done.stdout)


def forked(processes: int, target: Callable[[list[str]], int], arguments: list[str]) -> Done:
    """Runs a job in copies of this process, which share its imports: importing takes longer than a job.

    Each job has new processes. Call this where nothing but imports has happened (no threads, no
    backward), for instance in a :class:`~tests.kernels.gpu_worker.Worker`.
    """
    fork = get_context("fork")
    with tempfile.TemporaryFile() as log:
        port = _free_port()
        ranks = [
            fork.Process(target=_rank, args=(target, arguments, log, {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}))
            for rank in range(processes)]
        for process in ranks:
            process.start()
        waiting = {process.sentinel: process for process in ranks}
        while waiting:
            ended = wait(list(waiting), TIMEOUT)
            failed = not ended or any(waiting[end].exitcode for end in ended)  # pyright: ignore
            for end in ended:
                del waiting[end]  # pyright: ignore[reportArgumentType]
            if failed:
                # The other processes may wait for the failed one.
                for process in waiting.values():
                    process.kill()
        for process in ranks:
            process.join()
        log.seek(0)
        return Done(max(abs(p.exitcode or 0) for p in ranks), log.read().decode())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(
        target: Callable[[list[str]], int], arguments: list[str], log: Any,
        environment: dict[str, str]) -> None:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    os.environ.update(environment)
    sys.exit(target(arguments))
