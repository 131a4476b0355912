"""One report around a training loop: live bytes, peak, steps."""

import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.backward.hooks import ForwardPass
from brevitas_bp.private import function_modes
from brevitas_bp.text import short_mib

BATCH = 64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network, "wrapped": lambda: QuantBackwardWrapper(network(), seed=0),
    "a part wrapped": lambda: nn.Sequential(nn.Tanh(), QuantBackwardWrapper(network(), seed=0))}


def loss_of(model: nn.Module, batch: int = BATCH) -> Tensor:
    return F.cross_entropy(model(torch.randn(batch, 32)), torch.randint(10, (batch,)))


def one_pass(model: nn.Module, batch: int = BATCH) -> SavedMemoryReport:
    """Returns the report around one forward pass: what a step of a loop is compared with."""
    with track_saved_memory(model) as report:
        kept = loss_of(model, batch)
    del kept
    return report


def test_a_graph_that_is_kept_for_long_stops_no_steps() -> None:
    model = MODELS["wrapped"]()
    with track_saved_memory(model) as report:
        kept = [loss_of(model, 1024) for _ in range(3)]
        large = report.live_bytes
        for _ in range(10):
            loss_of(model).backward()
            assert report.live_bytes == large
        # The first two belong to the large one, of which backward has not freed most.
        assert report.steps == 9
        assert report.last_step is not None and report.last_step.stored_bytes < large / 3
    assert len(kept) == 3


def test_without_backward_there_is_one_step_and_nothing_grows() -> None:
    model = MODELS["wrapped"]()
    with track_saved_memory(model) as report:
        for done in range(400):
            loss_of(model)  # gradients are on, and nobody asks for any
            if done == 150:
                before = len(report._ledger._step.entries)
                assert before <= 2 * 1000
    assert report.steps == 1 and len(report._ledger._step.entries) <= 2 * 1000
    assert sum(sizes_of(report)[:5]) == 0


class InnerGradient(nn.Module):
    """Takes small gradients within its forward pass, and drops some results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
            few = x[:2].detach().requires_grad_()
            (grad,) = torch.autograd.grad(layer(few).square().sum(), few)
            layer(x[:8]).sin().sum()
            x = x + grad.mean()
        return x


def test_small_gradients_within_a_forward_pass_begin_no_step() -> None:
    model = InnerGradient()
    told: list[int] = []
    with track_saved_memory(model, on_step=lambda report: told.append(report.steps)) as report:
        for _ in range(3):
            model(torch.randn(256, 64)).square().sum().backward()
            assert report.live_bytes == 0
    assert told == [1, 2, 3] and report.steps == 3


@pytest.mark.parametrize("name", MODELS)
def test_each_step_is_counted_as_one_forward_pass_is(name: str) -> None:
    model = MODELS[name]()
    alone = one_pass(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with track_saved_memory(model) as report:
        assert (report.steps, report.last_step, report.peak_bytes) == (0, None, 0)
        assert report.summary() == "saved nothing yet"
        for step in range(1, 6):
            loss = loss_of(model)
            assert report.steps == step
            assert report.live_bytes == report.stored_bytes == alone.stored_bytes
            loss.backward()
            assert report.live_bytes == 0
            assert report.last_step is not None
            assert report.last_step.to_dict() == alone.to_dict()
            assert str(report.last_step.by("op", "reason")) == str(alone.by("op", "reason"))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model(torch.randn(BATCH, 32))
    assert (report.steps, report.peak_bytes, report.live_bytes) == (5, alone.stored_bytes, 0)
    assert "the last of 5 steps" in str(report) and str(alone).splitlines()[2] in str(report)


def test_the_peak_is_that_of_the_largest_batch_and_the_last_step_is_the_last() -> None:
    model = MODELS["wrapped"]()
    sizes = [64, 256, 128]
    alone = [one_pass(model, size).stored_bytes for size in sizes]
    seen: list[tuple[int, int, int]] = []

    def note(report: SavedMemoryReport) -> None:
        assert report.last_step is not None
        seen.append((report.steps, report.last_step.stored_bytes, report.peak_bytes))

    with track_saved_memory(model, on_step=note):
        for done, size in enumerate(sizes):
            loss_of(model, size).backward()
            assert len(seen) == done + 1  # right after backward
    assert seen == [(1, alone[0], alone[0]), (2, alone[1], alone[1]), (3, alone[2], alone[1])]


def test_several_forward_passes_before_one_backward_are_one_step() -> None:
    model = MODELS["wrapped"]()
    alone = one_pass(model).stored_bytes
    with track_saved_memory(model) as report:
        for _ in range(3):
            (loss_of(model) + loss_of(model)).backward()
    assert (report.steps, report.peak_bytes) == (3, 2 * alone)
    assert report.last_step is not None and report.last_step.stored_bytes == 2 * alone


def test_micro_batches_are_steps_and_graphs_that_are_kept_count_on() -> None:
    model = MODELS["wrapped"]()
    alone = one_pass(model).stored_bytes
    held: list[Tensor] = []
    with track_saved_memory(model) as report:
        for _ in range(2):
            loss_of(model).backward()
        assert report.steps == 2 and report.live_bytes == 0
        for done in range(3):
            held.append(loss_of(model))
            assert report.live_bytes == (done + 1) * alone  # a leak shows
    assert report.peak_bytes == report.stored_bytes == report.live_bytes == 3 * alone
    held.clear()
    assert report.live_bytes == 0 and report.stored_bytes == 3 * alone


def test_with_retained_graphs_a_step_ends_when_its_tensors_are_freed() -> None:
    model = MODELS["wrapped"]()
    told: list[int] = []
    with track_saved_memory(model, on_step=lambda report: told.append(report.steps)) as report:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        assert report.live_bytes > 0 and told == []
        loss.backward()
        assert report.live_bytes == 0 and told == [1]
    assert told == [1] == [report.steps]


class Attention(nn.Module):
    """Runs attention again in backward, which saves tensors there."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, 3 * x).square()


@pytest.mark.parametrize("run", [
    lambda loss: loss.backward(), torch.autograd.backward,
    lambda loss: torch.autograd.grad(loss, list(loss.leaves))], ids=["method", "function", "grad"])
def test_backward_begins_no_step(run: Callable[[Any], Any]) -> None:
    model = QuantBackwardWrapper(Attention(), seed=0)
    told: list[int] = []
    with track_saved_memory(model, on_step=lambda report: told.append(report.steps)) as report:
        for step in range(1, 4):
            x = torch.randn(4, 4, 32, 32, requires_grad=True)
            loss: Any = model(x).sum()
            loss.leaves = [x]
            run(loss)
            assert report.steps == step and report.live_bytes == 0
    assert told == [1, 2, 3]
    with track_saved_memory(model) as alone:
        loss = model(torch.randn(4, 4, 32, 32, requires_grad=True)).sum()
    assert report.last_step is not None and report.last_step.to_dict() == alone.to_dict()
    assert report.peak_bytes == alone.stored_bytes and loss.requires_grad


def test_on_step_is_called_even_if_torch_runs_nothing_between_steps() -> None:
    model = QuantBackwardWrapper(network(), seed=0)
    told: list[int] = []

    def note(report: SavedMemoryReport) -> None:
        torch.ones(4, requires_grad=True).exp().sum()  # saves nothing, begins no step
        told.append(report.steps)

    with track_saved_memory(model, on_step=note) as report:
        x = torch.randn(BATCH, 32)
        for _ in range(3):
            output = model(x)
            torch.autograd.backward([output], [torch.ones(BATCH, 10)])
    assert told == [1, 2, 3] == list(range(1, report.steps + 1))


def sizes_of(report: SavedMemoryReport) -> list[int]:
    """Returns the lengths of everything that could grow."""
    ledger = report._ledger
    return [
        len(ledger._watches), len(ledger._in_graphs), len(ledger._packed), len(ledger._freed),
        len(ledger._live._storages), len(ledger._step.entries), len(report._unknown)]


@contextmanager
def spying(seen: list[Any]) -> Iterator[None]:
    """Collects the passes that count."""
    from brevitas_bp.memory import track

    made = track.ForwardPass

    def make(*arguments: Any, **options: Any) -> Any:
        seen.append(made(*arguments, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(track, "ForwardPass", make)
        yield


@pytest.mark.parametrize(("name", "renewed"), [*((name, True) for name in MODELS), ("plain", False)])
def test_nothing_grows_with_the_number_of_steps(
        name: str, renewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not renewed:  # the control
        monkeypatch.setattr(ForwardPass, "renew", lambda self, root: None)
    model, passes = MODELS[name](), []
    with spying(passes), track_saved_memory(model) as report:
        (running,) = passes

        def sizes() -> list[int]:
            location, encodings = running.location, running.encodings
            return [
                *sizes_of(report), len(encodings._encoded), len(encodings._finest),
                len(encodings._order_at), len(running._exact._noted), len(location.ever_rounded),
                len(location.rounded_unseen), len(location.names)]

        after: list[list[int]] = []
        for step in range(1, 41):
            loss_of(model).backward()
            if step in (4, 40):
                gc.collect()
                after.append(sizes())
    assert (after[0] == after[1]) is renewed
    assert report.steps == 40


@pytest.mark.filterwarnings("ignore:.*compiled graph saves tensors:UserWarning")
def test_steps_of_a_compiled_network() -> None:
    torch._dynamo.reset()
    net = torch.compile(network(), backend="aot_eager")
    model = QuantBackwardWrapper(net, seed=0)  # pyright: ignore[reportArgumentType]
    alone = one_pass(model)
    told: list[int] = []
    with track_saved_memory(model, on_step=lambda report: told.append(report.steps)) as report:
        for _ in range(4):
            loss = loss_of(model)
            assert report.live_bytes == alone.stored_bytes
            loss.backward()
            assert report.live_bytes == 0
    assert told == [1, 2, 3, 4] and report.peak_bytes == alone.stored_bytes
    assert report.last_step is not None and report.last_step.to_dict() == alone.to_dict()
    assert not any(sizes_of(report)[:5])


def test_an_exception_leaves_the_figures_right_and_nothing_installed() -> None:
    model = MODELS["wrapped"]()
    alone = one_pass(model).stored_bytes
    before = function_modes()
    told: list[int] = []
    kept = torch.ones(())
    with pytest.raises(ArithmeticError), track_saved_memory(
            model, on_step=lambda report: told.append(report.steps)) as report:
        loss_of(model).backward()
        kept = loss_of(model)
        raise ArithmeticError
    assert (report.steps, report.live_bytes, report.stored_bytes) == (2, alone, alone)
    assert told == [1]
    assert function_modes() == before and not getattr(model, "_listeners", None)
    kept.backward()
    assert report.live_bytes == 0
    with track_saved_memory(model) as report:
        loss_of(model).backward()
    assert (report.steps, report.peak_bytes) == (1, alone)


def test_an_exception_in_the_forward_pass_brings_the_counting_mode_back() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    model = nn.Sequential(QuantBackwardWrapper(Fails()))
    with track_saved_memory(model) as report:
        counting = function_modes()
        with pytest.raises(ArithmeticError):
            model(torch.ones(3))
        assert function_modes() == counting
        kept = torch.ones(3, requires_grad=True).sin()
    assert [row.op for row in report.rows] == ["sin"] and kept.requires_grad


def test_on_step_may_fail() -> None:
    def fails(report: SavedMemoryReport) -> None:
        raise ArithmeticError

    model = MODELS["wrapped"]()
    with pytest.raises(ArithmeticError), track_saved_memory(model, on_step=fails) as report:
        loss_of(model).backward()
    assert (report.steps, report.live_bytes) == (1, 0)


@pytest.mark.parametrize("on_step", [3, "print"])
def test_on_step_is_a_function(on_step: Any) -> None:
    with pytest.raises(TypeError, match="on_step must be a function of the report, got"):
        track_saved_memory(network(), on_step=on_step).__enter__()


def test_wrappers_in_other_threads_are_counted() -> None:
    models = [QuantBackwardWrapper(network(), seed=i) for i in range(4)]
    whole = nn.ModuleList(models)
    alone = one_pass(models[0]).by("module", "op")
    of_model = sum(g.stored_bytes for g in alone.groups if g.values["module"])
    kept: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(20):
            models[i](torch.randn(BATCH, 32)).sum().backward()
        kept[i] = models[i](torch.randn(BATCH, 32))

    with track_saved_memory(whole) as report:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert report.live_bytes == 4 * of_model
        kept.clear()
        assert report.live_bytes == 0
    assert 4 * of_model >= report.peak_bytes >= of_model


def test_a_step_is_a_value() -> None:
    model = MODELS["wrapped"]()
    with track_saved_memory(model) as report:
        loss_of(model).backward()
    step = report.last_step
    assert step is not None
    assert pickle.loads(pickle.dumps(step)).to_dict() == step.to_dict()
    assert step.ratio == step.exact_bytes / step.stored_bytes > 2
    assert report.summary() == (
        f"saved {short_mib(step.stored_bytes)} of {short_mib(step.exact_bytes)} ({step.ratio:.1f}x), "
        f"peak {short_mib(report.peak_bytes)}")


def test_a_report_keeps_no_model_alive() -> None:
    model = MODELS["wrapped"]()
    alive = weakref.ref(model)
    with track_saved_memory(model, on_step=lambda report: None) as report:
        for _ in range(2):
            loss_of(model).backward()
    del model
    gc.collect()
    assert alive() is None and report.steps == 2


def test_two_loops_of_two_models_do_not_mix() -> None:
    first, second = MODELS["wrapped"](), MODELS["plain"]()
    with track_saved_memory(first) as outer, track_saved_memory(second) as inner:
        for _ in range(3):
            loss_of(second).backward()
            first(torch.randn(BATCH, 32)).sum().backward()
    assert outer.steps == inner.steps == 3
    assert outer.live_bytes == inner.live_bytes == 0
