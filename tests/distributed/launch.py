"""Starts jobs of several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a job on this machine, one thread for each process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # Loopback only: processes find each other without a name service.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        [*launch, str(processes), *command], cwd=ROOT, text=True, capture_output=True,
        timeout=600, check=False, env=environment)
