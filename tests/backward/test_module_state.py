"""H24, H30: checkpoints load both ways; copies, pickles and conversions act as on the module."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.quant import ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Uint2Mix4
from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloat as Uint4
from tests.backward.support import QUANTIZING, assert_same, net, run


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class DataParallelLike(nn.Module):
    """Calls its only child ``module``, as several wrappers of PyTorch do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


Wrap = Callable[[nn.Module], nn.Module]

#: Places for a wrapped body in a model. Each model is built with and without the wrapper.
PLACES: dict[str, Callable[[Wrap], nn.Module]] = {
    "root": lambda wrap: wrap(body()),
    "child": lambda wrap: nn.Sequential(nn.Linear(8, 8), wrap(body())),
    "grandchild": lambda wrap: nn.ModuleDict({"a": nn.ModuleDict({"b": wrap(body())})}),
    "child named module": lambda wrap: wrap(DataParallelLike(body())),
    "below one named module": lambda wrap: DataParallelLike(wrap(DataParallelLike(body()))),
    "twice": lambda wrap: nn.Sequential(wrap(nn.Sequential(nn.Linear(8, 8), wrap(body())))),
    "wrapper of a wrapper": lambda wrap: nn.Sequential(wrap(wrap(body()))),
    "two": lambda wrap: nn.Sequential(wrap(body()), wrap(body())),
}


def pair(place: str) -> tuple[nn.Module, nn.Module]:
    """Returns the model without and with its wrappers, with different weights."""
    return PLACES[place](lambda module: module), PLACES[place](QuantBackwardWrapper)


# H24. Checkpoints.


def test_a_plain_wrapper_renames_keys() -> None:
    assert list(DataParallelLike(body()).state_dict()) != list(body().state_dict())  # the control


@pytest.mark.parametrize("place", PLACES)
def test_keys_and_order_are_those_of_the_module(place: str) -> None:
    plain, wrapped = (model.state_dict() for model in pair(place))
    assert list(plain) == list(wrapped)
    assert plain._metadata == wrapped._metadata  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_checkpoints_move_both_ways(place: str, assign: bool) -> None:
    plain, wrapped = pair(place)
    expected = copy.deepcopy(plain.state_dict())
    wrapped.load_state_dict(plain.state_dict(), assign=assign)
    assert_same(wrapped.state_dict(), expected)
    other, _ = pair(place)
    other.load_state_dict(wrapped.state_dict(), assign=assign)
    assert_same(other.state_dict(), expected)


@pytest.mark.parametrize("place", PLACES)
def test_loading_leaves_the_checkpoint_as_it_is(place: str) -> None:
    plain, wrapped = pair(place)
    state = plain.state_dict()
    keys = list(state)
    wrapped.load_state_dict(state)
    assert list(state) == keys


def spoilt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state with one key renamed and one tensor of another shape."""
    first, *_, last = state
    state = dict(state)
    state[first + "_old"] = state.pop(first)
    state[last] = torch.zeros(77)
    return state


@pytest.mark.parametrize("place", PLACES)
def test_error_messages_name_the_keys_of_the_checkpoint(place: str) -> None:
    plain, wrapped = pair(place)
    messages = []
    for model in (plain, wrapped):
        with pytest.raises(RuntimeError) as raised:
            model.load_state_dict(spoilt(plain.state_dict()))
        messages.append(str(raised.value).partition(":")[2])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("place", PLACES)
def test_incompatible_keys_are_those_of_the_module(place: str) -> None:
    plain, wrapped = pair(place)
    state = plain.state_dict()
    first, last = next(iter(state)), list(state)[-1]
    del state[first]
    state[last + ".more"] = torch.zeros(1)
    results = [model.load_state_dict(state, strict=False) for model in (plain, wrapped)]
    assert results[0] == results[1]
    assert results[0].missing_keys == [first]


# H30. Conversions.


def converted() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "half": lambda m: m.half(), "bfloat16": lambda m: m.bfloat16(), "double": lambda m: m.double(),
        "to": lambda m: m.to(torch.float64), "to device": lambda m: m.to("cpu"),
        "channels_last": lambda m: m.to(memory_format=torch.channels_last),
        "eval": lambda m: m.eval(), "requires_grad_": lambda m: m.requires_grad_(False),
        "zero_grad": lambda m: (m.zero_grad(), m)[1], "share_memory": lambda m: m.share_memory()}


@pytest.mark.parametrize("name", converted())
def test_conversion_acts_on_the_module(name: str) -> None:
    module, _ = net("conv")
    convert = converted()[name]
    plain, wrapped = convert(copy.deepcopy(module)), convert(QuantBackwardWrapper(module))
    assert isinstance(wrapped, QuantBackwardWrapper)
    for a, b in zip(plain.parameters(), wrapped.parameters()):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
    assert [m.training for m in plain.modules()] == [m.training for m in wrapped.module.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", QUANTIZING)
def test_converted_wrapper_trains(dtype: torch.dtype, policy: str) -> None:
    module, inputs = net("conv")
    model = QuantBackwardWrapper(module, policy=policy).to(dtype)
    grads = run(model, inputs[0].to(dtype), copied=False).grads
    assert grads["0.weight"].dtype == dtype
    assert grads["0.weight"].isfinite().all()


def test_apply_visits_what_it_would_visit_without_the_wrapper() -> None:
    def init(module: nn.Module) -> None:
        if hasattr(module, "weight"):  # also true of the wrapper, if apply visited it
            module.weight.data.normal_()

    module = nn.Linear(4, 4)
    states = []
    for model in (copy.deepcopy(module), QuantBackwardWrapper(copy.deepcopy(module))):
        torch.manual_seed(0)
        visited: list[nn.Module] = []
        assert model.apply(lambda m, to=visited: (init(m), to.append(m))) is model  # pyright: ignore
        states.append((model.state_dict(), [type(m) for m in visited]))
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_attributes_are_those_of_the_module() -> None:
    module = nn.Linear(4, 3)
    module.note = "mine"  # pyright: ignore[reportArgumentType]
    model = QuantBackwardWrapper(module)
    assert model.in_features == 4
    assert model.weight is module.weight
    assert model.note == "mine"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


# H30. Copies and pickles.


def test_copies_of_user_hooks_on_modules_would_travel() -> None:
    # The control: copies and pickles of a module include what a library puts on it.
    module = nn.Linear(4, 4)
    module.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(module)


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", ["conv", "encoder"])
def test_module_is_left_without_a_trace(name: str, policy: str) -> None:
    module, inputs = net(name)
    untouched = copy.deepcopy(module)
    model = QuantBackwardWrapper(module, policy=policy)
    with track_saved_memory(model):
        model(*inputs).sum().backward()
    for after, before in zip(module.modules(), untouched.modules()):
        assert after.__dict__.keys() == before.__dict__.keys()
        assert not after._forward_hooks
        assert not after._forward_pre_hooks


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, by_pickle, by_torch_save]
MODELS: dict[str, Callable[[nn.Module], QuantBackwardWrapper]] = {
    "default": QuantBackwardWrapper,
    "all": lambda module: QuantBackwardWrapper(module, policy="all"),
    "policy with settings": lambda module: QuantBackwardWrapper(
        module, policy=OpAware(multiplier_quant=Uint4, norm_bits=3)),
    "seeded": lambda module: QuantBackwardWrapper(module, seed=3, bucket_size=64),
    "mixed": lambda module: QuantBackwardWrapper(module, Uint2Mix4, policy="all_but_relu"),
    "overrides": lambda module: QuantBackwardWrapper(
        module, Uint4, overrides={"0": None}, storage="quantize_on_backward"),
    "exact": lambda module: QuantBackwardWrapper(module, None),
}


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copy_is_equal_and_works(name: str, duplicate: Callable[[Any], Any]) -> None:
    module, inputs = net("conv")
    model = MODELS[name](module)
    model(*inputs).sum().backward()
    other = duplicate(model)
    assert repr(other) == repr(model)
    assert_same(other.state_dict(), model.state_dict())
    torch.manual_seed(0)
    expected = model.eval()(*inputs)
    torch.manual_seed(0)
    output = other.eval()(*inputs)
    assert torch.equal(output, expected)
    output.sum().backward()


def test_deepcopy_shares_nothing() -> None:
    model = QuantBackwardWrapper(nn.Linear(8, 8))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.zero_()
    assert model.weight.abs().sum() > 0
    assert other.module is not model.module
    assert other._codec is not model._codec


@pytest.mark.parametrize("policy", QUANTIZING)
def test_deepcopy_inside_a_tracked_block_is_not_tracked(policy: str) -> None:
    model = QuantBackwardWrapper(nn.Tanh(), policy=policy)
    with track_saved_memory(model) as report:
        output = copy.deepcopy(model)(torch.randn(8, 8, requires_grad=True))
    assert report.tensors == 0
    assert output.requires_grad


@pytest.mark.parametrize("policy", QUANTIZING)
def test_pickled_wrapper_continues_its_noise(policy: str) -> None:
    x = torch.randn(64, 64)
    module = nn.Sequential(nn.Linear(64, 8), nn.Tanh())
    model = QuantBackwardWrapper(module, policy=policy, seed=5)
    run(model, x, copied=False)
    other = by_pickle(model)
    model.zero_grad()
    other.zero_grad()
    assert_same(run(other, x, copied=False).grads, run(model, x, copied=False).grads)
