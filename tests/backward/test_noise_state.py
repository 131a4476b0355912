"""One state holds the noise of all wrappers in a model."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, UnknownNameError
from brevitas_bp.backward import NoiseState

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))


def wrapped(module: nn.Module, **options: Any) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module, bucket_size=64, **options)


def model_with_three(seed: int | None = None) -> nn.Module:
    """Returns a model with wrappers side by side, and one inside another."""
    seeds = [None] * 3 if seed is None else [seed, seed + 1, seed + 2]
    torch.manual_seed(0)
    inner = nn.Sequential(body(), wrapped(body(), seed=seeds[0]))
    return nn.Sequential(wrapped(body(), seed=seeds[1]), wrapped(inner, seed=seeds[2]))


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(X).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_stream_is_named_and_continues_bit_for_bit() -> None:
    model, resumed, control = model_with_three(), model_with_three(seed=7), model_with_three(seed=7)
    gradients(model)
    state = json.loads(json.dumps(NoiseState(model).state_dict()))
    assert list(state) == ["0", "1", "1.1"]
    expected = gradients(model)
    assert not same(gradients(control), expected)
    NoiseState(resumed).load_state_dict(state)
    assert same(gradients(resumed), expected)


def test_each_stream_matters() -> None:
    model = model_with_three()
    state = NoiseState(model).state_dict()
    expected = gradients(model)
    for name in state:
        changed = copy.deepcopy(state)
        changed[name]["position"] += 1
        NoiseState(model).load_state_dict(changed)
        assert not same(gradients(model), expected), name


def test_a_model_that_is_a_wrapper() -> None:
    model = wrapped(wrapped(body(), seed=1), seed=2)
    state = NoiseState(model).state_dict()
    assert {name: stream["base"] for name, stream in state.items()} == {"": 2, "module": 1}


def test_reading_the_state_draws_nothing() -> None:
    model, twin = model_with_three(seed=1), model_with_three(seed=1)
    assert NoiseState(model).state_dict() == NoiseState(model).state_dict()
    assert same(gradients(model), gradients(twin))


def test_state_of_other_wrappers_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Identity(), wrapped(body(), seed=4))
    other = nn.Sequential(wrapped(body(), seed=5))
    with pytest.raises(UnknownNameError, match=r"this model are '1', but the state is of '0'"):
        NoiseState(model).load_state_dict(NoiseState(other).state_dict())
    with pytest.raises(UnknownNameError, match=r"'1', but the state is of the model itself; wrap"):
        NoiseState(model).load_state_dict(NoiseState(wrapped(body())).state_dict())
    with pytest.raises(UnknownNameError, match="the state is of none"):
        NoiseState(model).load_state_dict({})
    assert NoiseState(model).state_dict() == {"1": {"base": 4, "position": 0}}


@pytest.mark.parametrize("broken", [{"seed": 1}, {"base": 1, "position": "x"}])
def test_broken_state_of_one_stream_leaves_all_as_they_were(broken: Mapping[str, Any]) -> None:
    model = model_with_three(seed=1)
    before = NoiseState(model).state_dict()
    state: dict[str, Any] = copy.deepcopy(before)
    state["0"]["position"] = 9
    state["1.1"] = broken
    with pytest.raises(ValueError):
        NoiseState(model).load_state_dict(state)
    assert NoiseState(model).state_dict() == before


def test_a_model_without_wrappers_has_no_noise() -> None:
    with pytest.raises(ValueError, match=r"Sequential contains no QuantBackwardWrapper.*wrap the model"):
        NoiseState(body())
