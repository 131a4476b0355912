"""H17, H19, H26, H27, H28: exceptions, nesting, several models, several threads, several calls."""

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward.location import current_location
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloat as Nearest8
from tests.backward.support import (
    QUANTIZING,
    SPIES,
    Apply,
    HalfCodec,
    Spy,
    assert_same,
    identity_hooks,
    net,
    run,
)


def installed() -> list[object]:
    """Returns every object of the library that could outlive a forward pass."""
    return [
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *_get_current_function_mode_stack(),
        *filter(None, [
            torch._C._autograd._top_saved_tensors_default_hooks(False), current_location()])]


@pytest.fixture(autouse=True)
def nothing_is_left_installed() -> Iterator[None]:
    assert not installed()
    yield
    assert not installed()


class Failing(nn.Module):
    """Saves a tensor and raises."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        raise ArithmeticError(f"no good: {y.shape}")


class Forgiving(nn.Module):
    """Continues without the part that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Tanh(), Failing())
        self.rest = nn.Sequential(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.part(x)
        except ArithmeticError:
            x = x.exp()
        return self.rest(x).cos()


# H26. Exceptions.


def test_entering_hooks_by_hand_leaves_them_installed() -> None:
    hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
    with pytest.raises(ArithmeticError):
        hooks.__enter__()
        Failing()(torch.ones(3, requires_grad=True))
        hooks.__exit__(None, None, None)
    assert installed()  # the control
    hooks.__exit__(None, None, None)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("policy", QUANTIZING)
def test_exception_in_forward_leaves_nothing(depth: int, tracked: bool, policy: str) -> None:
    module: nn.Module = Failing()
    for _ in range(depth):
        module = nn.Sequential(nn.Tanh(), module)
    model = QuantBackwardWrapper(module, policy=policy)
    x = torch.ones(3, 64, requires_grad=True)
    with pytest.raises(ArithmeticError):
        if tracked:
            with track_saved_memory(model):
                model(x)
        model(x)
    assert not installed()
    assert not model._listeners


def test_exception_of_the_codec_leaves_nothing() -> None:
    def policy(saved: object) -> None:
        raise ArithmeticError

    model = QuantBackwardWrapper(nn.Tanh(), policy=policy)
    with pytest.raises(ArithmeticError):
        model(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("policy", QUANTIZING)
def test_module_names_are_right_after_a_caught_exception(policy: str) -> None:
    spy = SPIES[policy]()
    QuantBackwardWrapper(Forgiving(), policy=spy)(torch.randn(8, 8, requires_grad=True))
    assert spy.places == [
        ("part.0", "tanh"), ("part.1", "sin"), ("", "exp"), ("rest.0", "tanh"), ("", "cos")]


# H17. Nesting.


def nested(inner: Spy, outer: Spy) -> QuantBackwardWrapper:
    body = nn.Sequential(nn.Tanh(), QuantBackwardWrapper(nn.Sequential(nn.Sigmoid()), policy=inner))
    return QuantBackwardWrapper(nn.Sequential(body, nn.Tanh()), policy=outer)


def test_naive_outer_hook_does_not_see_what_an_inner_one_takes() -> None:
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda x: (seen.append(x), x)[1], lambda x: x), identity_hooks():
        torch.ones(3, requires_grad=True).sin()
    assert not seen


@pytest.mark.parametrize("policy", QUANTIZING)
def test_inner_wrapper_wins_for_its_part(policy: str) -> None:
    inner, outer = SPIES[policy](), SPIES[policy]()
    nested(inner, outer)(torch.randn(64, 64, requires_grad=True))
    assert inner.places == [("0.1.0", "sigmoid")]
    assert outer.places == [("0.0", "tanh"), ("1", "tanh")]


@pytest.mark.parametrize("policy", QUANTIZING)
def test_wrapper_of_a_wrapper_leaves_everything_to_the_inner_one(policy: str) -> None:
    inner, outer = SPIES[policy](), SPIES[policy]()
    model = QuantBackwardWrapper(QuantBackwardWrapper(nn.Tanh(), policy=inner), policy=outer)
    model(torch.randn(64, 64, requires_grad=True))
    assert (len(inner.asked), len(outer.asked)) == (1, 0)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_user_hooks_inside_a_wrapped_module_win(policy: str) -> None:
    class Offloading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return x.tanh().sin()

    spy = SPIES[policy]()
    module = nn.Sequential(Offloading(), nn.Sigmoid())
    x = torch.randn(64, 64)
    plain = run(module, x).grads
    assert run(QuantBackwardWrapper(module, policy=spy), x, copied=False).grads.keys() == plain.keys()
    assert spy.places == [("1", "sigmoid")]


# H17. torch.func.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_torch_func_grad_is_refused_with_a_way_out(policy: str) -> None:
    module, x = Apply(torch.square), torch.randn(64, 64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum()

    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"), identity_hooks():
        torch.func.grad(lambda x: module(x).sum())(x)  # the control
    model = QuantBackwardWrapper(module, policy=policy)
    with pytest.raises(RuntimeError, match=r"hooks are disabled here \(torch.func .* wrapper.module"):
        torch.func.grad(lambda x: loss(model, x))(x)
    assert not installed()
    torch.testing.assert_close(torch.func.grad(lambda x: loss(model.module, x))(x), 2 * x)


@pytest.mark.parametrize("policy", ["op_aware", "exact"])
def test_vmap_below_autograd_works(policy: str) -> None:
    # Inside a transform, the input of GELU is not an ordinary tensor: it is kept, and not rewritten.
    module, x = nn.Sequential(nn.Linear(16, 16), nn.GELU()), torch.randn(3, 8, 16)
    plain, wrapped = (
        run(Apply(torch.vmap(m)), x).grads["input 0"]
        for m in (module, QuantBackwardWrapper(module, policy=policy)))
    assert torch.equal(plain, wrapped)


# H27. Several models, several calls.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_wrapped_models_do_not_notice_each_other(policy: str) -> None:
    modules = [net("conv"), net("encoder")]
    alone = [
        run(QuantBackwardWrapper(copy.deepcopy(module), policy=policy, seed=3), *inputs,
            copied=False).grads
        for module, inputs in modules]
    models = [
        QuantBackwardWrapper(copy.deepcopy(module), policy=policy, seed=3) for module, _ in modules]
    losses = []
    for model, (_, inputs) in zip(models, modules):
        torch.manual_seed(0)
        leaf = inputs[0].clone().requires_grad_()
        losses.append((model(leaf), leaf))
    for (output, _), model, grads in zip(losses, models, alone):
        output.backward(torch.linspace(-1, 2, output.numel()).cos().view(output.shape))
        got = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        assert all(torch.equal(got[name], grads[name]) for name in got)  # pyright: ignore


@pytest.mark.parametrize("policy", QUANTIZING)
def test_model_may_run_another_wrapped_model(policy: str) -> None:
    spy = SPIES[policy]()
    other = QuantBackwardWrapper(nn.Sequential(nn.Tanh()), policy=spy)
    model = QuantBackwardWrapper(Apply(lambda x: other(x).sin()), policy=spy)
    model(torch.randn(64, 64, requires_grad=True))
    assert spy.places == [("0", "tanh"), ("", "sin")]


class Recursive(nn.Module):
    """Calls its own wrapper."""

    model: QuantBackwardWrapper

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return x.tanh() if depth == 0 else Recursive.model(x.sin(), depth - 1)


def test_reentrant_forward_works() -> None:
    Recursive.model = QuantBackwardWrapper(Recursive(), policy="exact")
    x = torch.randn(8, 8)
    plain = run(Apply(lambda x: x.sin().sin().sin().tanh()), x).grads
    assert_same(run(Recursive.model, x, copied=False).grads, plain)


def test_each_call_of_a_shared_module_packs_its_own_tensors() -> None:
    half = HalfCodec()
    layer = nn.Tanh()
    model = QuantBackwardWrapper(nn.Sequential(layer, layer, layer), policy=lambda saved: half)
    model(torch.randn(64, 64, requires_grad=True))
    assert len(half.seeds) == len(set(half.seeds)) == 3


# H28. Accumulation.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_gradients_accumulate_over_several_forwards(policy: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    batches = [torch.randn(64, 64) for _ in range(2)]
    model = QuantBackwardWrapper(module, Nearest2, policy=policy)
    first, second = (model(x).sum() for x in batches)
    (first + second).backward()
    together = [p.grad for p in module.parameters()]
    model.zero_grad()
    for x in batches:
        model(x).sum().backward()
    # Two terms, added once in either order: float addition commutes.
    assert all(torch.equal(a, p.grad) for a, p in zip(together, module.parameters()))  # pyright: ignore


@pytest.mark.parametrize("policy", QUANTIZING)
def test_input_batch_is_stored_like_any_tensor(policy: str) -> None:
    # H29: a leaf without gradient. The reference that the user holds is not counted.
    x = torch.randn(64, 256)
    model = QuantBackwardWrapper(nn.Linear(256, 4), policy=policy, bucket_size=256)
    with track_saved_memory(model) as report:
        output = model(x)
    assert (report.exact_bytes, report.stored_bytes) == (64 * 256 * 4, 64 * (64 + 8))
    assert output.requires_grad


# H19. Threads.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_threads_do_not_notice_each_other(policy: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    spies = [SPIES[policy](), SPIES[policy]()]
    modules = [
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)),
        nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()), nn.Linear(64, 8))]
    configs = [Nearest2, Nearest8]

    def steps(i: int, to: list[dict[str, Tensor]]) -> None:
        model = QuantBackwardWrapper(copy.deepcopy(modules[i]), configs[i], policy=spies[i])
        for _ in range(10):
            leaf = x.clone().requires_grad_()
            output = model(leaf)
            grads = torch.autograd.grad(output.sin().sum(), [leaf, *model.parameters()])
            to.append({str(k): grad for k, grad in enumerate(grads)})

    alone: list[list[dict[str, Tensor]]] = [[], []]
    for i in range(2):
        steps(i, alone[i])
    places = [spy.places for spy in spies]
    for spy in spies:
        spy.asked.clear()
    together: list[list[dict[str, Tensor]]] = [[], []]
    threads = [threading.Thread(target=steps, args=(i, together[i])) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert spies[i].places == places[i]
        assert len(together[i]) == 10
        for a, b in zip(alone[i], together[i]):
            assert_same(a, b)


def test_hooks_of_the_main_thread_are_unknown_in_another() -> None:
    seen: list[Tensor] = []

    def forward() -> None:
        torch.ones(3, requires_grad=True).sin()

    with saved_tensors_hooks(lambda x: (seen.append(x), x)[1], lambda x: x):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert not seen  # the control: hooks are thread-local, so the wrapper sets them inside forward
