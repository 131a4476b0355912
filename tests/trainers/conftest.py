"""Makes the trainers' examples importable, offline, on one thread: their computations are small."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

os.environ["HF_HUB_OFFLINE"] = "1"
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / folder) for folder in ("trainers", "studies", "efficientnet_v2")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs a test on one thread, and restores the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process, in singletons and in the environment."""
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(before)
