"""Other parts of the package use a wrapper and restore its state afterwards, also after errors."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor
from brevitas_bp.allocate.unchanged import unchanged
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.policy import keep_all
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import (
    act_quant_of,
    listening,
    policy_of,
    restored,
    storage_of,
    using_policy,
    wrappers_in,
)
from brevitas_bp.codec import Codec
from brevitas_bp.quant import (
    RunningRange,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerTensorFloatStochastic,
)

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


class Running(RunningRange, ShiftedUint2DynamicActPerTensorFloatStochastic):
    """Keeps statistics for each saved tensor, and rounds with noise."""


def wrapped(act_quant: Any = ShiftedUint2DynamicActPerBucketFloatStochastic,
            **options: Any) -> QuantBackwardWrapper:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    return QuantBackwardWrapper(net, act_quant, **options)


def gradients(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Heard:
    """Counts saved tensors."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, saved: SavedTensor, packed: Packed, decision: Decision, originals: Any) -> None:
        self.count += 1


class BrokenError(Exception):
    """Raised within a block on purpose."""


BLOCKS: dict[str, Callable[[QuantBackwardWrapper], AbstractContextManager[Any]]] = {
    "listening": lambda model: listening(model, Heard(), lambda site, tensors: None),
    "using_policy": lambda model: using_policy(model, keep_all),
    "restored": lambda model: restored(model, 7),
    "unchanged": lambda model: unchanged(model, [model], 7),
}


def state_of(model: QuantBackwardWrapper) -> dict[str, Any]:
    """Returns all attributes of the wrapper; lists are copied, since they change in place."""
    return {key: list(value) if isinstance(value, list) else value
            for key, value in model.__dict__.items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {
        key for key in before.keys() | after.keys()
        if (before.get(key) != after.get(key) if isinstance(before.get(key), list)
            else before.get(key) is not after.get(key))}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_wrapper_is_what_it_was_after_the_block(block: str, raises: bool) -> None:
    model = wrapped(seed=3, overrides={"2": 4})
    gradients(model)
    before = state_of(model)
    if raises:
        with pytest.raises(BrokenError), BLOCKS[block](model):
            raise BrokenError
    else:
        with BLOCKS[block](model):
            assert changed(before, state_of(model)) or block == "listening"
    assert changed(before, state_of(model)) == set()
    model.use_plan({"2:*": 8})  # the control: the comparison sees changes
    assert "_policy" in changed(before, state_of(model))


def test_a_listener_hears_what_runs_within_the_block_and_nothing_after() -> None:
    model, heard, other = wrapped(), Heard(), Heard()
    with listening(model, other):
        with listening(model, heard):
            gradients(model)
        once = heard.count
        gradients(model)
    assert once > 0
    assert (heard.count, other.count) == (once, 2 * once)


def test_the_same_listener_may_listen_twice() -> None:
    model, heard = wrapped(), Heard()
    with listening(model, heard):
        gradients(model)
        once = heard.count
        with listening(model, heard):
            gradients(model)
        gradients(model)
    assert heard.count == 4 * once


def test_another_policy_applies_within_the_block_alone() -> None:
    model, exact = wrapped(seed=1), gradients(wrapped(None))
    assert not same(gradients(model), exact)
    with using_policy(model, keep_all):
        assert same(gradients(model), exact)
    assert not same(gradients(model), exact)


def test_policies_are_put_back_one_inside_the_other() -> None:
    model, inner = wrapped(), OpAware(norm_bits=4)
    before = policy_of(model)

    def refuse(saved: SavedTensor) -> Codec | None:
        raise BrokenError

    with using_policy(model, inner):
        with pytest.raises(BrokenError), using_policy(model, refuse):
            gradients(model)
        assert policy_of(model) is inner
    assert policy_of(model) is before


def test_the_policy_without_the_plan_is_that_of_before_the_plan() -> None:
    model = wrapped()
    policy = policy_of(model)
    model.use_plan({"0:*": 8})
    assert policy_of(model) is not policy
    assert policy_of(model, planned=False) is policy


@pytest.mark.parametrize("quantizer", [ShiftedUint2DynamicActPerBucketFloatStochastic, Running])
def test_noise_and_statistics_go_on_as_if_the_block_had_not_been(quantizer: Any) -> None:
    model, control = wrapped(quantizer, seed=3), wrapped(quantizer, seed=3)
    assert same(gradients(model), gradients(control))
    noise = model.noise_state()
    with restored(model, 7):
        gradients(model, 9 * X)
        assert model.noise_state() != noise
    assert model.noise_state() == noise
    assert same(gradients(model), gradients(control))
    gradients(model, 9 * X)  # the control: a step outside a block leaves a trace
    assert not same(gradients(model), gradients(control))


def test_noise_within_the_block_follows_from_its_seed() -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = wrapped(seed=3)
        with restored(model, seed):
            return gradients(model)

    assert same(drawn(7), drawn(7))
    assert not same(drawn(7), drawn(8))


def test_what_explain_tells_is_of_the_last_pass_before_the_block() -> None:
    model = wrapped()
    gradients(model)
    told = str(model.explain())
    with restored(model, 7), using_policy(model, keep_all):
        gradients(model)
        assert str(model.explain()) != told
    assert str(model.explain()) == told


def test_a_plan_within_the_block_does_not_outlast_it() -> None:
    model = wrapped()
    with restored(model, 7):
        model.use_plan({"0:*": 8})
        model.configure(bucket_size=64)
    model.configure(bit_width=4)  # would be refused while a plan is in force
    gradients(model)
    assert "4-bit stochastic" in str(model.explain())


def test_a_wrapper_made_after_the_block_draws_the_noise_that_it_would_have() -> None:
    # Noise streams are numbered in the order of creation: the block must not take a number.
    model = wrapped()
    with restored(model, 7):
        gradients(model)
    assert wrapped()._noise._number == model._noise._number + 1
    copy.deepcopy(model)  # the control: a copy takes a number
    assert wrapped()._noise._number == model._noise._number + 3


def test_if_one_wrapper_cannot_be_copied_the_others_are_put_back() -> None:
    class Uncopied:
        def __call__(self, saved: SavedTensor) -> Codec | None:
            return None

        def __deepcopy__(self, memo: Any) -> "Uncopied":
            raise BrokenError

    first, second = wrapped(seed=1), wrapped(policy=Uncopied())
    before = state_of(first)
    with pytest.raises(BrokenError), unchanged(nn.Sequential(first, second), [first, second], 0):
        raise AssertionError("it began")
    assert changed(before, state_of(first)) == set()


def test_how_it_stores_and_what_with() -> None:
    model = wrapped(storage="quantize_on_backward")
    assert storage_of(model) == "quantize_on_backward"
    assert not act_quant_of(model).is_exact
    assert act_quant_of(wrapped(None)).is_exact


def test_wrappers_are_found_by_name() -> None:
    inner = wrapped()
    outer = QuantBackwardWrapper(inner)
    found: Iterator[tuple[str, QuantBackwardWrapper]] = wrappers_in(nn.Sequential(nn.ReLU(), outer))
    assert [(name, wrapper is outer) for name, wrapper in found] == [("1", True), ("1.module", False)]
