"""After exceptions and interrupts nothing stays installed, memory is flat, the gradient is right.

Thousands of each: ``python -m tests.robustness.soak --steps 5000 --faults 2000``.
"""

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper
from tests.backward.support import identity_hooks
from tests.backward.test_isolation import installed
from tests.robustness.counting import COUNTS
from tests.robustness.soak import Soak, live, resident


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Makes the collector, and so ``live``, skip objects of other tests: there may be millions.

    Do not use it with interrupts. Garbage that they leave may be linked to older objects, and would then
    not be collected.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


#: Functions that install or remove something, and their files: every bytecode is interrupted once.
FILES = (
    "backward/hooks.py", "backward/location.py", "backward/wrapper.py", "torch/overrides.py",
    "torch/nn/modules/module.py", "torch/autograd/graph.py", "torch/utils/hooks.py")
INSTALLING = {
    "__enter__", "__exit__", "forward", "close", "enter", "leave", "_watch_modules", "_unwatch_modules",
    "_remove", "_remove_hooks", "_remove_mode", "_push_mode", "_pop_mode",
    "_get_current_function_mode_stack", "register_module_forward_pre_hook",
    "register_module_forward_hook"}


class InterruptAt:
    """Raises before the ``n``-th bytecode of the watched files."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name in INSTALLING and file.endswith(FILES):
            frame.f_trace_opcodes = True
            return self.count
        return None

    def count(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt
        return self.count


def interrupted_everywhere(step: Callable[[], object]) -> Iterator[int]:
    """Runs ``step`` again and again, interrupted one bytecode later each time, until it completes."""
    n = 0
    while True:
        n += 1
        before = sys.gettrace()
        sys.settrace(InterruptAt(n))
        try:
            step()
        except KeyboardInterrupt:
            sys.settrace(before)
            yield n
        else:
            return
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("policy", ["exact", "op_aware"])
def test_an_interrupt_before_any_bytecode_leaves_nothing(policy: str, nested: bool) -> None:
    inner: nn.Module = nn.Sequential(nn.GELU())
    if nested:
        inner = nn.Sequential(QuantBackwardWrapper(inner, policy=policy), nn.Tanh())
    model = QuantBackwardWrapper(inner, policy=policy)
    x = torch.randn(16, 32, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(model(x).sum(), x)[0]

    right = gradient()
    for n in interrupted_everywhere(gradient):
        assert not installed(), n
        if n % 20 == 0 and policy == "exact":
            assert torch.equal(gradient(), right)
        COUNTS["interrupts, one before each bytecode of a step"] += 1
    assert n > 300 and not installed()


def test_torchs_own_hooks_stay_where_an_interrupt_falls_between() -> None:
    # The control: the same interrupts, without the library's order of cleaning up.
    def step() -> None:
        with identity_hooks():
            torch.ones(3, requires_grad=True).sin()

    left = 0
    for _ in interrupted_everywhere(step):
        while installed():
            torch._C._autograd._pop_saved_tensors_default_hooks()  # pyright: ignore
            left += 1
    assert left > 0


def test_soak() -> None:
    # In a process of its own: objects that other tests have left may go while the soak runs. Ctrl-C
    # inside a destructor (torch's weak references have one) is reported and ignored.
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.soak", "--steps", "100", "--faults", "100"],
        capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines() if "MiB" not in line)
    counts = {name: int(count) for count, name in lines}
    for name, count in counts.items():
        COUNTS[f"soak: {name}"] += count
    assert counts["steps"] >= 200
    assert sum(n for name, n in counts.items() if name.startswith("exceptions")) >= 100
    assert sum(n for name, n in counts.items() if name.startswith("interrupts")) >= 100


def test_resident_memory_does_not_grow_with_steps(only_new_objects: None) -> None:
    state = Soak("op_aware")
    saved = 4 * 16 * 32 * 4  # bytes of one activation
    for i in range(50):
        state.step(i)
    before = resident()
    for i in range(200):
        state.step(i)
    # If each step leaked one activation: 200 * 8 KiB. The allocator may keep a few more pages.
    assert resident() - before < 200 * saved


def test_a_leak_of_one_tensor_a_step_is_seen(only_new_objects: None) -> None:
    # The control of ``live``.
    state = Soak("exact")
    state.step(0)
    before, kept = live(), []
    for i in range(3):
        kept.append(state.gradients(state.model, i)[0])
    assert live()[0] == before[0] + 3 and live()[1] == before[1] + 3 * kept[0].numel() * 4
