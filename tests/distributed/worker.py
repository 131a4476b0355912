"""Runs scenarios in one process of a job, and writes their facts as JSON.

By hand: python -m torch.distributed.run --standalone --nproc-per-node 2 \\
    -m tests.distributed.worker FOLDER SCENARIO...
"""

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import ddp, dtensors, engines, fsdp, state, tensor_parallel
from tests.distributed.support import Facts

SCENARIOS = {
    **ddp.SCENARIOS, **fsdp.SCENARIOS, **tensor_parallel.SCENARIOS, **dtensors.SCENARIOS,
    **engines.SCENARIOS, **state.SCENARIOS}


def run(name: str, folder: Path) -> Facts:
    """Runs one scenario; an error is a fact too."""
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            facts = SCENARIOS[name](folder)
        except Exception:
            facts = {"error": traceback.format_exc()}
    ours = [str(w.message) for w in caught if "brevitas_bp" in str(w.message)]
    return {"warnings": ours, "seconds": time.monotonic() - start, **facts}


def main(arguments: list[str]) -> int:
    """Runs all scenarios, in order, in one process group; the first error ends the job."""
    folder, *names = arguments
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    results: dict[str, Facts] = {}
    for name in names:
        results[name] = run(name, Path(folder))
        if "error" in results[name]:
            # The other processes may wait for this one in a collective.
            print(f"{name}:\n{results[name]['error']}", file=sys.stderr, flush=True)
            break
    rank, size = dist.get_rank(), dist.get_world_size()
    Path(folder, f"{size}-{rank}.json").write_text(json.dumps(results))
    if any("error" in facts for facts in results.values()):
        os._exit(1)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
