"""Threads of the compiled CPU kernels: torch's own threads, or a pool if torch's cannot be used."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels.cpu import threads

cpu = pytest.importorskip("brevitas_bp.kernels.cpu.launch")

SPEC = BucketQuantSpec(2, 64, mix_bit_width=5, mix_prob=0.3)
NUMEL = 5 * 2**14 + 3


@pytest.fixture
def four_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def sample() -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))


def bytes_are_the_references(seed: int = 3) -> bool:
    x = sample()
    ours, theirs = cpu.encode(x, SPEC, seed), reference.encode(x, SPEC, seed)
    same = all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors))
    values = cpu.decode(ours, SPEC, seed, NUMEL, x.dtype)
    return same and torch.equal(values, reference.decode(theirs, SPEC, seed, NUMEL, x.dtype))


@pytest.mark.skipif(
    not torch.backends.openmp.is_available(), reason="this build of torch has no OpenMP")
def test_threads_are_those_of_torch(four_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel, asked = threads._openmp(), []
    assert parallel is not None

    def counted(address: int, data: Any, threads: int, flags: int) -> None:
        asked.append(threads)
        parallel(address, data, threads, flags)

    monkeypatch.setattr(threads, "_openmp", lambda: counted)
    assert bytes_are_the_references()
    assert asked == [4, 4]


def test_without_openmp_a_pool_gives_the_same_bytes(
        four_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    pool: Callable[[], Any] = threads._pool
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(threads, "_pool", lambda: used.append(1) or pool())
    assert bytes_are_the_references()
    assert used  # the control: the pool ran


def test_a_missing_chunk_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launch: Callable[..., None] = threads.launch

    def all_but_the_last(kernel: Any, numbers: Any, most: int) -> None:
        numbers[2] -= 1
        launch(kernel, numbers, most)

    monkeypatch.setattr(cpu, "launch", all_but_the_last)
    # Use another seed: reused memory of another test may hold the missing bytes.
    assert not bytes_are_the_references(seed=4)


def _in_child(expected: list[torch.Tensor], queue: Any) -> None:
    # torch's own operations would wait for threads that a forked child does not have.
    torch.set_num_threads(1)
    threads.torch.get_num_threads = lambda: 4
    ours = cpu.encode(sample(), SPEC, 3)
    queue.put((threads._forked, all(map(torch.equal, ours.tensors, expected))))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(four_threads: None) -> None:
    # The parent has threads; the child has none of them.
    expected = list(cpu.encode(sample(), SPEC, 3).tensors)
    assert bytes_are_the_references()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(expected, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == (True, True)
    finally:
        child.join(10)
        child.kill()
