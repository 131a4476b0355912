"""Trains for thousands of steps with exceptions and interrupts, and counts what they leave behind.

    python -m tests.robustness.soak --steps 5000 --faults 2000

Prints figures. Fails if a gradient is wrong, an object stays installed or memory grows.
"""

import argparse
import copy
import ctypes
import gc
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import Codec, Packed, QuantBackwardWrapper
from brevitas_bp.codec.layout import TensorLayout
from tests.backward.test_isolation import installed


class FaultError(Exception):
    """Raised on purpose."""


@dataclass
class Trigger:
    """Raises at the ``n``-th pass through one kind of place."""

    place: str = ""
    left: int = 0

    def passing(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                raise FaultError(place)


class Mine(nn.Module):
    """Passes the trigger before and after its operation, and in its backward."""

    def __init__(self, inner: nn.Module, trigger: Trigger) -> None:
        super().__init__()
        self.inner, self.trigger = inner, trigger

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mine":
        return Mine(copy.deepcopy(self.inner, memo), self.trigger)

    def forward(self, x: Tensor) -> Tensor:
        self.trigger.passing("before an operation")
        y = self.inner(x)
        self.trigger.passing("after an operation")
        if y.requires_grad:
            y.register_hook(lambda grad: self.trigger.passing("hook of a gradient"))
        return y


class Raising(Codec):
    """Copies tensors, and passes the trigger in encode and decode."""

    name = "raising"
    compresses = False

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        self.trigger.passing("pack")
        layout = TensorLayout.of(x)
        return Packed(self, (layout.flatten(x.detach()).clone(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        self.trigger.passing("unpack")
        return packed.layout.restore_flat(packed.tensors[0])


#: Places where exceptions are raised -> how often one step passes there.
PLACES = {
    "before an operation": 5, "after an operation": 5, "hook of a gradient": 5, "pack": 8, "unpack": 8}


class Attention(nn.Module):
    """Scaled dot-product attention of a tensor with itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def network(trigger: Trigger) -> nn.Module:
    """Linear, norm, smooth and piecewise linear activations, attention, dropout."""
    layers = [
        nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), nn.GELU(), nn.Dropout(0.2), Attention(),
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True))]
    return nn.Sequential(*[Mine(layer, trigger) for layer in layers])


@dataclass
class Soak:
    """A plain network and wrapped copies of it, stepped on the same data.

    Attributes:
        counts: events and their numbers.
        left: kinds of objects found installed after an interrupt, before the next step.
    """

    policy: str
    trigger: Trigger = field(default_factory=Trigger)
    counts: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.plain = network(self.trigger)
        codec = Raising(self.trigger)
        policy: Any = {"exact": lambda saved: codec}.get(self.policy, self.policy)
        self.model = QuantBackwardWrapper(copy.deepcopy(self.plain), policy=policy, seed=1)
        self.batches = [torch.randn(4, 16, 32) for _ in range(4)]
        self.expected = [self.gradients(self.plain, i) for i in range(4)]

    def gradients(self, model: nn.Module, i: int) -> list[Tensor]:
        """Returns the gradients of batch ``i``, with dropout masks of that batch."""
        torch.manual_seed(i)
        x = self.batches[i].clone().requires_grad_()
        return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))

    def step(self, i: int) -> None:
        """Runs a step without a fault, and compares it with plain autograd."""
        grads = self.gradients(self.model, i % 4)
        expected = self.expected[i % 4]
        assert len(grads) == len(expected)
        if self.policy == "exact":
            assert all(torch.equal(a, b) for a, b in zip(grads, expected)), "a gradient is wrong"
        else:
            assert all(a.shape == b.shape and a.isfinite().all() for a, b in zip(grads, expected))
        assert not installed(), installed()
        assert torch.is_grad_enabled()
        self.counts["steps"] += 1

    def exception(self, rng: random.Random) -> None:
        """Raises an exception at a random place of a step."""
        place = rng.choice(list(PLACES))
        if self.policy != "exact" and place in ("pack", "unpack"):
            place = "after an operation"
        self.trigger.place, self.trigger.left = place, rng.randint(1, PLACES[place])
        try:
            self.gradients(self.model, rng.randrange(4))
        except FaultError:
            self.counts[f"exceptions: {place}"] += 1
        else:
            raise AssertionError(f"the step never came to {self.trigger}")
        finally:
            self.trigger.place = ""
        assert not installed(), installed()

    def interrupt(self, rng: random.Random, interrupting: "Interrupting") -> None:
        """Interrupts a step at a random moment."""
        i = rng.randrange(4)
        try:
            with interrupting(rng.uniform(0, 2500e-6)):
                self.gradients(self.model, i)
                self.counts["interrupts that came after the step"] += 1
        except KeyboardInterrupt as error:
            where = [entry.tb_frame.f_code.co_filename for entry in _entries(error)]
            ours = "brevitas_bp" in where[-1].replace("brevitas_bp_", "")
            self.counts["interrupts in our code" if ours else "interrupts in other code"] += 1
            names = {entry.tb_frame.f_code.co_name for entry in _entries(error)}
            if "_engine_run_backward" in names:
                self.counts["interrupts in backward"] += 1
            error.__traceback__ = None
        for thing in installed():
            self.left[f"{type(thing).__name__} {getattr(thing, '__name__', '')}"] += 1
        torch.set_grad_enabled(True)


def _entries(error: BaseException) -> Iterator[Any]:
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


Interrupting = Callable[[float], Any]


@contextmanager
def by_signal(delay: float) -> Iterator[None]:
    """Sends Ctrl-C after ``delay`` seconds, if the block still runs."""
    try:
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def by_thread(delay: float) -> Iterator[None]:
    """Calls ``PyThreadState_SetAsyncExc`` from another thread after ``delay`` s, if the block runs."""
    target, done, lock = ctypes.c_ulong(threading.get_ident()), threading.Event(), threading.Lock()

    def send() -> None:
        done.wait(delay)
        with lock:
            if not done.is_set():
                interrupt = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, interrupt)
                done.set()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        with lock:
            done.set()
        sender.join()


def _raise_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def alarms() -> Iterator[None]:
    """Within the block, timer signals are interrupts, and threads switch often."""
    before, interval = signal.signal(signal.SIGALRM, _raise_interrupt), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGALRM, before)


def live() -> tuple[int, int, int]:
    """Returns counts of tensors, of their bytes, and of the library's other tracked objects."""
    gc.collect()
    tensors = nbytes = ours = 0
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, Tensor):
            tensors, nbytes = tensors + 1, nbytes + thing.numel() * thing.element_size()
        elif str(kind.__module__).startswith("brevitas_bp"):
            ours += 1
    return tensors, nbytes, ours


def resident() -> int:
    """Returns bytes of physical memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(steps: int, faults: int, policies: tuple[str, ...] = ("exact", "op_aware")) -> Counter[str]:
    """Runs ``steps`` steps, ``faults`` exceptions and as many interrupts, for each policy in turn."""
    total: Counter[str] = Counter()
    for policy in policies:
        state, rng = Soak(policy), random.Random(0)
        for i in range(10):
            state.step(i)
            state.exception(rng)
        state.step(0)
        before = live()
        for i in range(steps // len(policies)):
            state.step(i)
        assert live() == before, (live(), before)
        with alarms():
            for i in range(faults // len(policies)):
                state.exception(rng)
                state.interrupt(rng, by_thread if i % 8 == 0 else by_signal)
                state.step(i)
        assert live() == before, (live(), before)
        total += state.counts
        total += Counter({f"left, gone with the next step: {k}": n for k, n in state.left.items()})
    return total


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=2000)
    arguments = parser.parse_args()
    soak(100, 50)
    before = resident()
    for name, count in sorted(soak(arguments.steps, arguments.faults).items()):
        print(f"{count:7} {name}")
    print(f"{(resident() - before) / 2**20:+7.1f} MiB of resident memory")


if __name__ == "__main__":
    main()
