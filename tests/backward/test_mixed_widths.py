"""Two bit widths through the wrapper, and a schedule that changes their mix."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import MixProbScheduler, QuantBackwardWrapper, track_saved_memory
from brevitas_bp.core.bit_width import linear
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from brevitas_bp.quant import ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Uint2Mix4
from tests.backward.support import QUANTIZING, Apply

BUCKETS, SIZE = 40, 256


def model(**options: Any) -> QuantBackwardWrapper:
    # The gradient of its weight shows the stored tensor.
    module = Apply(torch.mul, nn.Parameter(torch.ones(BUCKETS * SIZE)))
    return QuantBackwardWrapper(module, Uint2Mix4, bucket_size=SIZE, seed=3, **options)


def stored_bytes(wrapper: nn.Module) -> int:
    with track_saved_memory(wrapper) as report:
        output = wrapper(torch.linspace(-1, 1, BUCKETS * SIZE).requires_grad_())
    assert output.requires_grad
    return report.stored_bytes


def expected_bytes(mixed: int) -> int:
    """Returns the bytes of 2-bit or 4-bit codes, plus 8 bytes of metadata per bucket."""
    return (BUCKETS - mixed) * SIZE // 4 + mixed * SIZE // 2 + BUCKETS * 8


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("mixed", [0, 10, 40])
def test_bytes_follow_the_probability(mixed: int, policy: str) -> None:
    # p * n is whole, so floor(p * n + U) is p * n for every U in [0, 1).
    assert stored_bytes(model(mix_prob=mixed / BUCKETS, policy=policy)) == expected_bytes(mixed)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_schedule_moves_the_wrapper(policy: str) -> None:
    wrapper = model(policy=policy)
    scheduler = MixProbScheduler(wrapper, linear(1.0, 0.0, 4))
    sizes = [stored_bytes(wrapper)]
    for _ in range(4):
        scheduler.step()
        sizes.append(stored_bytes(wrapper))
    assert sizes == [expected_bytes(mixed) for mixed in (40, 30, 20, 10, 0)]


def test_schedule_reaches_overrides_and_nested_wrappers() -> None:
    inner = QuantBackwardWrapper(nn.Tanh(), Uint2Mix4)
    outer = QuantBackwardWrapper(
        nn.Sequential(inner, nn.Tanh()), Uint2, overrides={"1": Uint2Mix4})
    scheduler = MixProbScheduler(nn.Sequential(outer), lambda step: 0.25 * step)
    scheduler.step()
    probabilities = [
        m.probability for wrapper in (inner, outer) for quantizer in wrapper.quantizer_modules()
        for m in quantizer.modules() if hasattr(m, "probability")]
    assert probabilities == [0.25, 0.25]


def test_schedule_without_a_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="mixes two bit widths"):
        MixProbScheduler(QuantBackwardWrapper(nn.Tanh(), Uint2), linear(1.0, 0.0, 4))


def test_schedule_of_a_copy_leaves_the_original_alone() -> None:
    wrapper = model(mix_prob=0.5)
    MixProbScheduler(copy.deepcopy(wrapper), lambda step: 0.0)
    assert stored_bytes(wrapper) == expected_bytes(20)


def test_payload_survives_a_change_of_the_probability() -> None:
    def gradient(moved: bool) -> Tensor:
        wrapper = model(mix_prob=0.5)
        loss = wrapper(torch.linspace(-1, 1, BUCKETS * SIZE)).sum()
        if moved:
            MixProbScheduler(wrapper, lambda step: 0.0)
        return torch.autograd.grad(loss, list(wrapper.parameters()))[0]

    assert torch.equal(gradient(moved=True), gradient(moved=False))


def test_probability_adds_no_key_to_the_state_dict() -> None:
    wrapper = QuantBackwardWrapper(nn.Linear(4, 4), Uint2Mix4)
    assert list(wrapper.state_dict()) == ["weight", "bias"]
    assert not list(wrapper.buffers())
