"""Threads: one model per thread, one model in several threads, backward on autograd's threads."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import Spy, assert_same, naive_hooks
from tests.backward.test_isolation import installed
from tests.robustness.counting import COUNTS
from tests.robustness.soak import Trigger, network

THREADS, STEPS = 4, 5


class Outcome(threading.Thread):
    """Runs a function concurrently with others, and keeps its result or exception."""

    def __init__(self, barrier: threading.Barrier, function: Callable[[], Any]) -> None:
        super().__init__()
        self.barrier, self.function = barrier, function
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self.barrier.wait()
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Returns the results of functions that run concurrently, each in its own thread."""
    barrier = threading.Barrier(len(functions))
    threads = [Outcome(barrier, function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    COUNTS["threads that ran at once"] += len(threads)
    return [thread.result for thread in threads]


def body() -> nn.Module:
    """Returns a network without dropout: threads share its global generator even without a wrapper."""
    torch.manual_seed(0)
    module = network(Trigger())
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def batch(i: int) -> Tensor:
    return torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(i))


def gradients(model: nn.Module, i: int) -> dict[str, Tensor]:
    x = batch(i).requires_grad_()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().sum(), [x, *parameters.values()])
    names = ["input", *(name.removeprefix("module.") for name in parameters)]
    return dict(zip(names, grads))


def trained(module: nn.Module, i: int) -> dict[str, Tensor]:
    """Returns the parameters after some steps of SGD on batch ``i``."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(batch(i)).square().mean().backward()
        optimizer.step()
    return {n.removeprefix("module."): p.detach() for n, p in module.named_parameters()}


def test_models_train_side_by_side_as_they_do_alone() -> None:
    alone = [trained(body(), i) for i in range(THREADS)]
    models = [QuantBackwardWrapper(body(), policy="exact") for _ in range(THREADS)]
    at_once = together([lambda i=i: trained(models[i], i) for i in range(THREADS)])
    for a, b in zip(at_once, alone):
        assert_same(a, b)
    assert not installed()


@pytest.mark.parametrize("policy", ["op_aware", "all"])
def test_noise_of_a_model_does_not_depend_on_other_threads(policy: str) -> None:
    models = [QuantBackwardWrapper(body(), policy=policy, seed=i) for i in range(THREADS)]
    again = copy.deepcopy(models)
    for model, copied in zip(models, again):
        copied.set_noise_state(model.noise_state())
    alone = [trained(model, i) for i, model in enumerate(models)]
    at_once = together([lambda i=i: trained(again[i], i) for i in range(THREADS)])
    for a, b in zip(at_once, alone):
        assert_same(a, b)


def test_one_model_in_several_threads_gives_the_gradients_of_each_batch() -> None:
    plain = body()
    model = QuantBackwardWrapper(copy.deepcopy(plain), policy="exact")
    for i, grads in enumerate(
            together([lambda i=i: [gradients(model, i) for _ in range(STEPS)] for i in range(THREADS)])):
        for got in grads:
            assert_same(got, gradients(plain, i))


def test_every_tensor_that_one_model_saves_in_several_threads_is_counted() -> None:
    def packs(threads: int) -> list[tuple[str, str | None]]:
        spy = Spy()
        model = QuantBackwardWrapper(body(), policy=spy)
        together([lambda i=i: [gradients(model, i) for _ in range(STEPS)] for i in range(threads)])
        return sorted((module, op or "") for module, op in spy.places)

    # Names of modules and operations are also separate for each thread.
    one = packs(1)
    assert len(one) > 5 * STEPS
    assert packs(THREADS) == sorted(one * THREADS)
    COUNTS["tensors packed in threads"] += len(one) * THREADS


def test_a_report_counts_the_tensors_of_all_threads() -> None:
    model = QuantBackwardWrapper(body(), policy="exact")

    def tensors(threads: int) -> int:
        with track_saved_memory(model) as report:
            losses = together([lambda i=i: model(batch(i)).sum() for i in range(threads)])
        assert len(losses) == threads
        return report.tensors

    assert tensors(THREADS) == THREADS * tensors(1)


def test_backward_of_another_thread_unpacks_what_this_one_packed() -> None:
    model = QuantBackwardWrapper(body(), policy="exact")
    plain = body()
    inputs = [batch(i).requires_grad_() for i in range(THREADS)]
    losses = [model(x).square().sum() for x in inputs]
    got = together([
        lambda i=i: torch.autograd.grad(losses[i], inputs[i])[0] for i in range(THREADS)])
    for i, grad in enumerate(got):
        assert torch.equal(grad, gradients(plain, i)["input"])


def test_an_exception_in_one_thread_does_not_reach_the_others() -> None:
    plain = body()
    triggers = [Trigger() for _ in range(THREADS)]
    models = []
    for trigger in triggers:
        torch.manual_seed(0)
        module = network(trigger)
        module.load_state_dict(plain.state_dict())
        models.append(QuantBackwardWrapper(module.eval(), policy="exact"))
    expected = [gradients(plain.eval(), i) for i in range(THREADS)]

    def steps(i: int) -> tuple[int, bool]:
        raised, same = 0, True
        for step in range(STEPS):
            triggers[i].place, triggers[i].left = "after an operation", 1 + step % 5
            try:
                gradients(models[i], i)
            except Exception:
                raised += 1
            triggers[i].place = ""
            got = gradients(models[i], i)
            same = same and all(torch.equal(got[name], expected[i][name]) for name in got)
        return raised, same

    assert together([lambda i=i: steps(i) for i in range(THREADS)]) == [(STEPS, True)] * THREADS
    assert not installed()


def test_hooks_that_share_what_they_pack_mix_up_threads() -> None:
    # The control: a rival that keeps payloads in one list for all threads.
    kept: list[Tensor] = []
    turn = threading.Barrier(2, timeout=60)

    def step(i: int) -> Tensor:
        x = batch(i).requires_grad_()
        # The first thread packs before the second, and runs backward before it.
        if i == 1:
            turn.wait()
        with saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda none: kept.pop()):
            y = x.sin()
        if i == 0:
            turn.wait()
        turn.wait()
        if i == 1:
            turn.wait()
        (grad,) = torch.autograd.grad(y.sum(), x)
        if i == 0:
            turn.wait()
        return grad

    crossed = together([lambda i=i: step(i) for i in range(2)])
    assert torch.equal(crossed[0], batch(1).cos()) and torch.equal(crossed[1], batch(0).cos())


def test_naive_hooks_fail_the_comparison() -> None:
    # The control of the comparison itself.
    plain = gradients(body(), 0)
    with naive_hooks():
        naive = gradients(body(), 0)
    with pytest.raises(AssertionError):
        assert_same(naive, plain)
