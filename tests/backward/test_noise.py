"""H14, H21: the wrapper has its own noise stream, independent of torch's generator and of eval()."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from brevitas.core.function_wrapper import StochasticRoundSte
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.backward.seam import wrappers_in
from tests.backward.support import QUANTIZING, Apply, net, run

X = torch.linspace(-1, 1, 64 * 64).sin().view(64, 64)


@dataclass(frozen=True)
class Case:
    """A function whose input gradient shows the stored tensor, and how that tensor is stored."""

    policy: str
    function: Callable[[Tensor], Tensor]

    def wrapped(self, **options: Any) -> QuantBackwardWrapper:
        return QuantBackwardWrapper(Apply(self.function), policy=self.policy, **options)


#: The cases: an input, and (under the default policy) the derivative of a rewritten function.
CASES = {
    "all": Case("all", torch.square), "op_aware": Case("op_aware", torch.square),
    "rewritten": Case("op_aware", torch.tanh)}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def stored(model: nn.Module) -> Tensor:
    """Returns what the next forward of ``model`` stores, read from the gradient."""
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    return x.grad


def stochastic_pack(x: Tensor) -> Tensor:
    """Rounds to whole numbers with noise from torch's generator."""
    return torch.floor(x + torch.rand_like(x))


def fixed_pack(x: Tensor) -> Tensor:
    """Rounds with noise from an own generator that restarts at each call."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.floor(x + noise)


def test_naive_noise_shifts_the_dropout_of_the_user() -> None:
    module, inputs = net("conv")
    plain = run(module, *inputs)
    with saved_tensors_hooks(
            lambda x: stochastic_pack(x) if x.is_floating_point() else x, lambda x: x):
        naive = run(module, *inputs)
    assert not torch.equal(naive.output, plain.output)
    assert not torch.equal(naive.rng, plain.rng)
    # For the wrapper, see test_invariants.test_forward_is_bit_identical.


def test_every_encode_has_noise_of_its_own(case: Case) -> None:
    def stored_twice(model: nn.Module) -> tuple[Tensor, Tensor]:
        leaves = [X.clone().requires_grad_() for _ in range(2)]
        model(*leaves).sum().backward()
        first, second = (leaf.grad for leaf in leaves)
        assert first is not None
        assert second is not None
        return first, second

    module = Apply(lambda x, y: case.function(x) + case.function(y))
    with saved_tensors_hooks(fixed_pack, lambda x: x):
        assert torch.equal(*stored_twice(module))  # the control: two layers, the same noise
    assert not torch.equal(*stored_twice(QuantBackwardWrapper(module, policy=case.policy)))


def test_every_forward_has_noise_of_its_own(case: Case) -> None:
    model = case.wrapped(seed=0)
    draws = [stored(model) for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@pytest.mark.parametrize("other", [
    lambda model, case: case.wrapped(), lambda model, case: copy.deepcopy(model),
    lambda model, case: copy.deepcopy(copy.deepcopy(model))])
@pytest.mark.parametrize("started", [False, True])
def test_two_wrappers_draw_different_noise(other: Any, started: bool, case: Case) -> None:
    model = case.wrapped()
    if started:
        stored(model)
    assert not torch.equal(stored(other(model, case)), stored(model))


def test_copy_of_a_seeded_wrapper_draws_other_noise(case: Case) -> None:
    model = case.wrapped(seed=4)
    assert not torch.equal(stored(copy.deepcopy(model)), stored(model))


def test_copies_of_nested_wrappers_take_their_noise_in_one_order() -> None:
    # Else processes that copy a model would differ: copying visits attributes in any order.
    inner = QuantBackwardWrapper(nn.Linear(4, 4))
    outer = copy.deepcopy(QuantBackwardWrapper(nn.Sequential(inner)))
    numbers = [wrapper._noise._number for _, wrapper in wrappers_in(outer)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 2


@pytest.mark.parametrize("policy", QUANTIZING)
def test_same_seed_gives_the_same_gradients(policy: str) -> None:
    module, inputs = net("conv")
    first, second, other = (
        run(QuantBackwardWrapper(copy.deepcopy(module), policy=policy, seed=seed), *inputs,
            copied=False).grads
        for seed in (11, 11, 12))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_noise_follows_the_seed_of_torch(case: Case) -> None:
    model = case.wrapped()
    again, other = (copy.copy(model) for _ in range(2))  # shallow, from one place in the program
    draws = []
    for wrapper, seed in ((model, 1), (again, 1), (other, 2)):
        torch.manual_seed(seed)
        draws.append(stored(wrapper))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def as_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process look like one process of a distributed job."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("older", [False, True], ids=["after", "before"])
def test_ranks_draw_different_noise(
        older: bool, seed: int | None, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [case.wrapped(seed=seed)] * 2  # made before the process group
    draws, states = [], []
    for rank in (0, 1):
        as_rank(rank, monkeypatch)
        torch.manual_seed(0)
        wrapper = copy.copy(before[rank]) if older or seed is None else case.wrapped(seed=seed)
        if seed is not None:
            wrapper.set_noise_state({"base": seed, "position": 0})
        draws.append(stored(wrapper))
        states.append(wrapper.noise_state())
    assert not torch.equal(*draws)
    assert states[0] == states[1]  # so one process can save it for all


def test_copies_of_activations_share_the_rank(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for rank in (0, 1):
        as_rank(rank, monkeypatch)
        draws.append([stored(case.wrapped(seed=5, rank=r)) for r in (0, 3)])
    for first, second in zip(*draws):
        assert torch.equal(first, second)
    assert not torch.equal(*draws[0])


def test_noise_state_resumes_bit_for_bit(case: Case) -> None:
    model = case.wrapped()
    stored(model)
    state = copy.deepcopy(model.noise_state())
    expected = [stored(model) for _ in range(3)]
    resumed = case.wrapped(seed=99)
    resumed.set_noise_state(state)
    assert all(torch.equal(stored(resumed), draw) for draw in expected)
    assert resumed.noise_state() == model.noise_state()


def test_reading_the_noise_state_moves_nothing(case: Case) -> None:
    model, twin = (case.wrapped(seed=1) for _ in range(2))
    assert model.noise_state() == model.noise_state()
    assert torch.equal(stored(model), stored(twin))


def test_noise_state_of_something_else_is_refused() -> None:
    model = CASES["op_aware"].wrapped(seed=1)
    with pytest.raises(ValueError, match=r"expected the keys 'base' and 'position'.*\['seed'\]"):
        model.set_noise_state({"seed": 3})


def test_eval_keeps_the_rounding_stochastic(case: Case) -> None:
    stock = StochasticRoundSte().eval()
    assert torch.equal(stock(4 * X), (4 * X).round())  # the control: rounds to nearest in eval
    model = case.wrapped(seed=2).eval()
    assert not torch.equal(stored(model), stored(model))
    trained, evaluated = case.wrapped(seed=2).train(), case.wrapped(seed=2).eval()
    assert torch.equal(stored(trained), stored(evaluated))


def test_no_grad_calls_the_module_and_nothing_else(
        case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.wrapped()
    monkeypatch.setattr(model, "_forward_pass", lambda: pytest.fail("hook work without grad"))
    with torch.no_grad():
        assert torch.equal(model(X), case.function(X))
