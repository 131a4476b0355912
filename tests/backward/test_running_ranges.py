"""Running ranges through the wrapper: one per site; a tensor stored already has none."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper, codec_from, seeded
from brevitas_bp.format.random import SeedStream
from brevitas_bp.quant import RunningRange, ShiftedUint8DynamicActPerTensorFloatStochastic
from tests.backward.support import QUANTIZING, Apply
from tests.support import same_bits


class Running(RunningRange, ShiftedUint8DynamicActPerTensorFloatStochastic):
    """Eight bits, affine, with a running range."""


SMALL, LARGE = torch.linspace(-1, 1, 4096).view(64, 64), torch.linspace(-50, 70, 4096).view(64, 64)


class Two(nn.Module):
    """Saves a large and a small tensor, in two modules; the first may be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = Apply(torch.square), Apply(torch.square)
        self.skips = False

    def forward(self, large: Tensor, small: Tensor) -> Tensor:
        first = large.sum() if self.skips else self.large(large).sum()
        return first + self.small(small).sum()


def stored(model: nn.Module, *tensors: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return [g / 2 for g in torch.autograd.grad(model(*leaves).sum(), leaves)]


def step_of(x: Tensor) -> float:
    """Returns one step of the range of ``x``, plus the slack of a few float operations."""
    return float(x.max() - x.min()) / 255 * (1 + 1e-3)


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
def test_each_saved_tensor_has_a_range_of_its_own(storage: Any, policy: str) -> None:
    model = QuantBackwardWrapper(Two(), Running, policy=policy, storage=storage)
    for _ in range(3):
        for seen, x in zip(stored(model, LARGE, SMALL), (LARGE, SMALL)):
            assert (seen - x).abs().max() <= step_of(x)
            assert not torch.equal(seen, x)
    assert len(list(model.quantizer_modules())) == 2


def test_one_range_for_all_clips_the_larger() -> None:
    quantizer = Running.tensor_quant
    with saved_tensors_hooks(lambda x: quantizer(x.detach())[0], lambda x: x):
        large = [stored(Two(), LARGE, SMALL)[0] for _ in range(3)][-1]
    assert (large - LARGE).abs().max() > 10 * step_of(LARGE)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_values_outside_of_earlier_ranges_are_clipped(policy: str) -> None:
    model = QuantBackwardWrapper(Two(), Running, policy=policy)
    stored(model, LARGE, SMALL)
    _, seen = stored(model, LARGE, SMALL * 3)
    assert (seen - (SMALL * 3).clamp(-1, 1)).abs().max() <= step_of(SMALL)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_a_payload_keeps_its_range(policy: str) -> None:
    def gradient(later: bool) -> Tensor:
        model = QuantBackwardWrapper(
            Apply(torch.square), Running, policy=policy, range_momentum=1.0, seed=1)
        leaf = SMALL.clone().requires_grad_()
        loss = model(leaf).sum()
        if later:
            for _ in range(2):
                model(LARGE.clone().requires_grad_())
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(gradient(later=False), gradient(later=True))


def test_a_live_range_changes_what_a_naive_payload_decodes_to() -> None:
    top = torch.tensor(1.0)

    def pack(x: Tensor) -> Tensor:
        codes = (x.detach() / top * 127).round()
        top.copy_(x.detach().abs().max())
        return codes

    leaf = SMALL.clone().requires_grad_()
    with saved_tensors_hooks(pack, lambda codes: codes / 127 * top):
        loss = leaf.square().sum()
        LARGE.clone().requires_grad_().square()
    assert (torch.autograd.grad(loss, leaf)[0] / 2 - SMALL).abs().max() > 10


@pytest.mark.parametrize("policy", QUANTIZING)
def test_a_bad_batch_gives_nan_once(policy: str) -> None:
    model = QuantBackwardWrapper(Two(), Running, policy=policy)
    stored(model, LARGE, SMALL)
    broken = SMALL.clone()
    broken[3, 5] = float("inf")
    large, small = stored(model, LARGE, broken)
    assert small.isnan().all() and (large - LARGE).abs().max() <= step_of(LARGE)
    _, small = stored(model, LARGE, SMALL)
    assert (small - SMALL).abs().max() <= step_of(SMALL)


@pytest.mark.parametrize(
    ("config", "settings"), [(Running, {}), (Int8ActPerTensorFloat, {"collect_stats_steps": 1})])
def test_a_skipped_layer_leaves_the_others_their_ranges(
        config: Any, settings: dict[str, Any]) -> None:
    model = QuantBackwardWrapper(Two(), config, **settings)
    stored(model, LARGE, SMALL)
    model.module.skips = True
    _, small = stored(model, LARGE, SMALL)
    assert (small - SMALL).abs().max() <= 2 / 127
    model.module.skips = False
    for seen, x in zip(stored(model, LARGE, SMALL), (LARGE, SMALL)):
        assert (seen - x).abs().max() <= 3 * step_of(x)


def test_told_apart_by_a_running_number_the_next_layer_takes_the_range_of_a_skipped_one() -> None:
    first: Any = codec_from(Running).at_site(0)
    first.encode(LARGE, seed=0)
    assert (first.encode(SMALL, seed=0).decode() - SMALL).abs().max() > 0.1 > 2 / 127


def test_a_new_tensor_begins_with_its_own_range() -> None:
    model = QuantBackwardWrapper(Two(), Running)
    model.module.skips = True
    stored(model, LARGE, SMALL)
    model.module.skips = False
    for seen, x in zip(stored(model, LARGE, SMALL), (LARGE, SMALL)):
        assert (seen - x).abs().max() <= step_of(x)


@pytest.mark.parametrize("config", [Running, Int8ActPerTensorFloat])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_go_on_alone(
        duplicate: Callable[[nn.Module], Any], config: Any) -> None:
    model = QuantBackwardWrapper(nn.Softplus(), config, seed=2)
    stored(model, SMALL)
    other = duplicate(model)
    other.set_noise_state(model.noise_state())
    # The copy sees larger values. The original continues without them.
    reference = duplicate(model)
    reference.set_noise_state(model.noise_state())
    stored(other, LARGE)
    assert same_bits(stored(model, SMALL)[0], stored(reference, SMALL)[0])
    states = [[q.state_dict() for q in m.quantizer_modules()] for m in (model, other)]
    assert str(states[0]) != str(states[1])


def test_the_wrapper_has_no_keys_and_the_layer_has_buffers() -> None:
    assert list(QuantBackwardWrapper(nn.Linear(4, 4), Running).state_dict()) == ["weight", "bias"]
    first = QuantIdentity(Running, return_quant_tensor=False)
    first(LARGE)
    state = first.state_dict()
    assert [key.split(".")[-1] for key in state] == ["running_stats", "running_stats"]
    second = QuantIdentity(Running, return_quant_tensor=False)
    second.load_state_dict(state)
    for layer in (first, second):
        layer.eval()
    with seeded(1):
        expected = first(SMALL)
    with seeded(1):
        actual = second(SMALL)
    assert torch.equal(actual, expected)
    assert (actual - SMALL).abs().max() > step_of(SMALL)  # in steps of LARGE


def test_layer_and_wrapper_give_equal_values() -> None:
    layer = QuantIdentity(Running, return_quant_tensor=False)
    model = QuantBackwardWrapper(Apply(torch.square), Running, seed=4)
    noise = SeedStream(4)
    for x in (SMALL, LARGE, SMALL * 2):
        (seen,) = stored(model, x)
        with seeded(noise.next()):
            assert torch.equal(layer(x), seen)
