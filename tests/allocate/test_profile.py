"""One forward, many backwards: exact gradients without rounding, the wrapper's gradients with it."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory
from brevitas_bp.allocate import Candidate
from brevitas_bp.allocate.profile import Profile
from tests.allocate.networks import Checkpointed, images, loss, residual
from tests.backward.support import Encoder, SeeSaved, Square

CANDIDATES = ["1", "2", "3", "8", "exact", "2@128", "2avg2", "2avg4@32"]


def gradients(model: nn.Module, batch: Any = None, run: Callable[..., Tensor] = loss) -> list[Any]:
    torch.manual_seed(9)
    total = run(model, images() if batch is None else batch)
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


def profile_of(model: QuantBackwardWrapper, batch: Any = None, run: Any = loss) -> Profile:
    torch.manual_seed(9)
    return Profile(model, images() if batch is None else batch, run)


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a is None and b is None) or torch.equal(a, b)


def assert_same_units(ours: list[Any], theirs: list[Any]) -> None:
    """Equal up to float32: a profile stores inputs of norms normalized, an exact plan unchanged."""
    assert len(ours) == len(theirs)
    largest = max(float(b.abs().max()) for b in theirs if b is not None)
    for a, b in zip(ours, theirs):
        # 16 roundings of 2**-24 along a path; a zero gradient may come out as a rounding error.
        assert (a is None and b is None) or (a - b).abs().max() <= 1e-6 * largest


def test_exact_gradients_are_those_of_an_exact_plan() -> None:
    profile = profile_of(residual())
    assert_same_units(profile.exact, gradients(residual(plan={"*": "exact"})))
    for ours, plain in zip(profile.exact, gradients(residual().module)):
        # Multiplying by a saved derivative is another order of float32 operations.
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)
    assert_equal(profile.gradients({}), profile.exact)  # again, from the same graph


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_rounding_one_group_is_what_the_wrapper_does(candidate: str) -> None:
    model = residual()
    profile = profile_of(model)
    for i, group in enumerate(profile.groups):
        if "avg" in candidate and group.reach != "weight":
            continue  # a plan never averages a tensor with a longer reach
        rounded = {i: Candidate.parse(candidate)}
        plan = {"*": "exact", **dict.fromkeys(group.sites, candidate)}
        # Nothing is stored given an exact derivative. The policy gives a derivative four bits.
        given = {t.difference.derivative for t in group.tensors if t.difference is not None}
        for j, other in enumerate(profile.groups):
            if given & set(other.tensors):
                rounded[j] = Candidate(4)
                plan |= dict.fromkeys(other.sites, "4")
        ours = profile.gradients(rounded)
        assert_same_units(ours, gradients(residual(plan=plan)))
        if candidate != "exact" and not given:
            differ = [j for j, (a, b) in enumerate(zip(ours, profile.exact)) if not torch.equal(a, b)]
            assert differ  # the control: a tensor was rounded
            # If the reach of a rounding is one weight, no other gradient changes.
            assert group.parameters is None or set(differ) <= group.parameters


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_bytes_are_those_of_live_tensors(candidate: str) -> None:
    model = residual()
    profile = profile_of(model)
    for group in profile.groups:
        if "avg" in candidate and group.reach != "weight":
            continue
        planned = residual(plan={"*": "exact", **dict.fromkeys(group.sites, candidate)})
        with track_saved_memory(planned) as report:
            kept = loss(planned, images())
        # For an exact input of a norm, the mean is kept too.
        others = sum(
            profile.stored_bytes(g, Candidate(None)) for g in profile.groups if g is not group)
        expected = profile.fixed_bytes + others + profile.stored_bytes(
            group, Candidate.parse(candidate))
        del kept
        # A tensor that is kept exact may share memory that is kept anyway.
        assert report.stored_bytes <= expected
        if candidate != "exact":
            assert profile.stored_bytes(group, Candidate.parse(candidate)) < group.exact_bytes


def test_tensors_are_grouped_by_name_and_by_memory() -> None:
    sites = [group.sites for group in profile_of(residual()).groups]
    assert ["left:conv2d:argument 0", "right:conv2d:argument 0"] in sites  # one tensor, two layers
    assert ["twice:conv2d:argument 0"] in sites  # one layer, two tensors
    groups = {tuple(g.sites): g for g in profile_of(residual()).groups}
    assert len(groups["twice:conv2d:argument 0",].tensors) == 2


def test_reach_tells_where_errors_go() -> None:
    profile = profile_of(residual())
    names = [name for name, _ in residual().module.named_parameters()]
    found = {g.sites[0]: g for g in profile.groups}
    own = found["stem:conv2d:argument 0"].parameters
    assert own is not None
    assert {names[i] for i in own} == {"stem.weight", "stem.bias"}
    assert found["norm:batch_norm:argument 0"].parameters is None
    assert found[":silu:derivative"].reach == "all"


class State:
    """State that a measurement must not change."""

    def __init__(self, model: QuantBackwardWrapper) -> None:
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.rng = torch.get_rng_state()
        self.noise = model.noise_state()
        self.policy, self.listeners = model._policy, list(model._listeners)
        self.explanation = model._explanation

    def assert_same(self, model: QuantBackwardWrapper) -> None:
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, self.buffers[name]), name
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert model.noise_state() == self.noise
        assert model._policy is self.policy
        assert model._listeners == self.listeners
        assert model._explanation is self.explanation
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("network", ["residual", "checkpointed"])
def test_nothing_is_changed(network: str) -> None:
    model, batch = residual(seed=1), images()
    if network == "checkpointed":
        model = QuantBackwardWrapper(Checkpointed(), seed=1)
        batch = torch.randn(64, 64), torch.arange(64) % 4
    state = State(model)
    profile = Profile(model, batch, loss)
    profile.gradients({0: Candidate(2)})
    state.assert_same(model)
    loss(model, batch)  # the control: a training step by hand
    with pytest.raises(AssertionError):
        state.assert_same(model)


def test_nothing_is_changed_by_an_exception() -> None:
    model = residual(seed=1)
    state = State(model)

    def failing(model: nn.Module, batch: Any) -> Tensor:
        model(batch[0])
        raise KeyError("the user's own")

    with pytest.raises(KeyError):
        Profile(model, images(), failing)
    state.assert_same(model)


def test_backward_may_write_to_what_it_gets() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.Tanh()), policy="all")
    x = torch.randn(64, 64)
    profile = Profile(model, x, lambda m, b: SeeSaved.apply(m(b)) + m(b).square().sum())
    first = profile.exact
    assert_equal(profile.gradients({}), first)


@pytest.mark.parametrize(("run", "message"), [
    (lambda m, b: m(b), "must return a scalar"), (lambda m, b: None, "got NoneType"),
    (lambda m, b: m(b).detach().sum(), "requires"), (lambda m, b: b.requires_grad_().sum(), "nothing")])
def test_bad_losses_are_refused(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile(QuantBackwardWrapper(nn.Linear(64, 64)), torch.randn(64, 64), run)


# Special cases.


@pytest.mark.parametrize("name", ["encoder", "residual"])
def test_exact_bytes_are_those_of_plain_autograd(name: str) -> None:
    # Rewritten operations save other tensors than plain autograd.
    x = torch.randn(8, 16, 32) if name == "encoder" else images()[0]
    net = Encoder() if name == "encoder" else residual().module
    with track_saved_memory(net) as report:
        kept = net(x).square().mean()
    del kept
    profile = Profile(QuantBackwardWrapper(net), x, lambda m, b: m(b).square().mean())
    assert profile.exact_bytes == report.exact_bytes


def test_profile_is_freed() -> None:
    profile = profile_of(residual())
    profile.gradients({0: Candidate(2)})
    alive = weakref.ref(profile)
    del profile
    gc.collect()
    assert alive() is None
    seen = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch[0])
        seen.append(weakref.ref(y))
        return y  # not a scalar

    with pytest.raises(ValueError, match="must return a scalar"):
        Profile(residual(), images(), failing)
    gc.collect()
    assert seen[0]() is None


def test_names_are_the_same_under_autocast() -> None:
    class Stream(nn.Module):
        """A residual stream of float32 before a layer that computes in bfloat16."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x).float())

    def names(cast: bool) -> list[tuple[list[str], set[int] | None]]:
        def run(model: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cast):
                return model(x).float().square().mean()

        profile = Profile(QuantBackwardWrapper(Stream()), torch.randn(128, 64), run)
        return [(g.sites, g.parameters) for g in profile.groups]

    assert names(True) == names(False)
    assert names(True)[1][0] == ["b:linear:argument 0"]


def test_norms_reach_far_under_every_policy() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    model = QuantBackwardWrapper(net, policy="all")
    profile = Profile(model, torch.randn(128, 64), lambda m, b: m(b).square().mean())
    found = {g.sites[0]: g.parameters for g in profile.groups}
    assert found["1:layer_norm:argument 0"] is None


def test_parameters_in_one_memory_are_told_apart() -> None:
    layer = nn.Linear(64, 4)
    flat = torch.nn.utils.parameters_to_vector(layer.parameters())
    torch.nn.utils.vector_to_parameters(flat, layer.parameters())
    profile = Profile(
        QuantBackwardWrapper(layer), torch.randn(128, 64), lambda m, b: m(b).square().mean())
    assert profile.groups[0].parameters == {0, 1}


class Unused(nn.Module):
    """A module with a branch whose result is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(2 * x).relu()
        return self.used(x)


def test_what_the_graph_does_not_hold_needs_no_width() -> None:
    model = QuantBackwardWrapper(Unused())
    profile = Profile(model, torch.randn(128, 64), lambda m, b: m(b).square().mean())
    assert [g.sites for g in profile.groups] == [["used:linear:argument 0"]]


def test_checksums_are_not_counted_twice() -> None:
    sizes = [profile_of(residual(verify=verify)).fixed_bytes for verify in (False, True)]
    assert sizes[0] == sizes[1]


def test_what_the_policy_was_given_a_quantizer_for_is_left_to_it() -> None:
    from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloat as Uint4

    model = QuantBackwardWrapper(Checkpointed(), policy=OpAware(checkpoint_quant=Uint4))
    batch = torch.randn(64, 64), torch.arange(64) % 4
    sites = [s for g in Profile(model, batch, loss).groups for s in g.sites]
    assert not any("checkpoint" in site for site in sites)
    assert any("tanh" in site for site in sites)


def far_batch() -> Tensor:
    return torch.full((128, 64), float("inf"))


REFUSED: dict[str, tuple[Callable[[], QuantBackwardWrapper], Any, type[Exception], str]] = {
    "nested": (
        lambda: QuantBackwardWrapper(nn.Sequential(QuantBackwardWrapper(nn.Linear(64, 4)))), None,
        TypeError, "further wrappers"),
    "storage": (
        lambda: QuantBackwardWrapper(nn.Linear(64, 4), storage="quantize_on_backward"), None,
        TypeError, "saves nothing"),
    "frozen": (
        lambda: QuantBackwardWrapper(nn.Linear(64, 4).requires_grad_(False)), None, ValueError,
        "no parameter requires"),
    "infinite": (lambda: QuantBackwardWrapper(nn.Linear(64, 4)), far_batch, ValueError, "finite"),
    "zero": (
        lambda: QuantBackwardWrapper(nn.Linear(64, 4)), lambda: torch.zeros(128, 64), ValueError,
        "zero or missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_says_why(name: str) -> None:
    make, batch, error, message = REFUSED[name]
    x = torch.randn(128, 64) if batch is None else batch()
    with pytest.raises(error, match=message):
        # All outputs of relu are zero, so the gradients of weight and bias are zero.
        _ = Profile(make(), x, lambda m, b: F.relu(m(b) - 10).square().mean()).exact


def test_custom_functions_are_far() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    net[0].forward = lambda x: Square.apply(F.linear(x, net[0].weight))
    profile = Profile(
        QuantBackwardWrapper(net, policy="all"), torch.randn(128, 64),
        lambda m, b: m(b).square().mean())
    found = {s: g.parameters for g in profile.groups for s in g.sites}
    assert found["0:custom function:output"] is None
