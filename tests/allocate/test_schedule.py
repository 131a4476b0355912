"""Schedules apply settings at their step, in every wrapper, and never change stored tensors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper, UnknownNameError, codec_from, track_saved_memory
from brevitas_bp.allocate import QuantizerSchedule
from brevitas_bp.core.bit_width import linear
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from brevitas_bp.quant import ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Uint2Mix4
from tests.backward.support import Apply

N = 4096
X = torch.linspace(-1, 1, N)


def product(config: Any = Uint2, **options: Any) -> QuantBackwardWrapper:
    # The gradient of its weight shows the stored tensor.
    return QuantBackwardWrapper(
        Apply(torch.mul, nn.Parameter(torch.ones(N))), config, seed=3, **options)


def stored_bytes(model: nn.Module) -> int:
    with track_saved_memory(model) as report:
        output = model(X.clone().requires_grad_())
    assert output.requires_grad
    return report.stored_bytes


def expected(bits: int, bucket_size: int = 256) -> int:
    """Returns the bytes of the codes, plus 8 bytes of metadata for each bucket."""
    return N * bits // 8 + N // bucket_size * 8


def test_a_table_is_in_force_from_its_steps_on() -> None:
    model = product()
    schedule = QuantizerSchedule(
        model, {1: {"bit_width": 4}, 4: {"bucket_size": 512}, 2: {"bit_width": 8}})
    sizes = [stored_bytes(model)]
    for _ in range(4):
        schedule.step()
        sizes.append(stored_bytes(model))
    assert sizes == [expected(2), expected(4), expected(8), expected(8), expected(8, 512)]


def test_a_function_names_all_settings_in_force() -> None:
    model = product()
    schedule = QuantizerSchedule(
        model, lambda step: [{"bit_width": 8}, {"bucket_size": 64}, {}][step])
    sizes = [stored_bytes(model)]
    for _ in range(2):
        schedule.step()
        sizes.append(stored_bytes(model))
    assert sizes == [expected(8), expected(2, 64), expected(2)]


def test_a_probability_moves_without_building_anew() -> None:
    model = product(Uint2Mix4)
    mix = linear(1.0, 0.0, 4)
    schedule = QuantizerSchedule(
        model, lambda step: {"mix_prob": mix(step), "bucket_size": 256 if step < 4 else 512})
    codecs, sizes = [model._codec], [stored_bytes(model)]
    for _ in range(4):
        schedule.step()
        codecs.append(model._codec)
        sizes.append(stored_bytes(model))
    # There are 16 buckets; the fraction p of them has 4 bits.
    assert sizes == [*(expected(2) + p * 4 * 256 * 2 // 8 for p in (4, 3, 2, 1)), expected(2, 512)]
    assert len({id(codec) for codec in codecs}) == 2


def test_wider_codecs_of_the_policy_follow() -> None:
    model = QuantBackwardWrapper(nn.Tanh(), Uint2)
    schedule = QuantizerSchedule(model, {1: {"bit_width": 8}})
    sizes = [stored_bytes(model)]
    schedule.step()
    # Tensors that multiply the gradient get at least 4 bits.
    assert [*sizes, stored_bytes(model)] == [expected(4), expected(8)]


def test_wrappers_within_models_and_wrappers_are_reached_and_overrides_stay() -> None:
    inner, exact = product(), QuantBackwardWrapper(nn.Tanh(), None)
    outer = QuantBackwardWrapper(
        nn.Sequential(inner, nn.Tanh(), exact, nn.Tanh()), Uint2, overrides={"3": Uint2})
    QuantizerSchedule(nn.Sequential(outer, product()), {0: {"bit_width": 4}})
    assert [codec.name for codec in (inner._codec, outer._codec) if codec] == 2 * [
        "4-bit stochastic"]
    assert [codec.name for _, codec in outer._overrides if codec] == ["2-bit stochastic"]
    assert exact._codec is None


def test_what_is_stored_decodes_as_it_was_encoded() -> None:
    def gradient(moved: bool) -> Tensor:
        model = product()
        loss = model(X).sum()
        if moved:
            QuantizerSchedule(model, {0: {"bit_width": 4, "bucket_size": 64}})
            stored_bytes(model)
        return torch.autograd.grad(loss, list(model.parameters()))[0]

    assert torch.equal(gradient(moved=True), gradient(moved=False))


def test_a_naive_schedule_changes_what_is_stored_already() -> None:
    top = torch.tensor(3.0)
    leaf = X.clone().requires_grad_()
    with saved_tensors_hooks(lambda x: (x.detach() * top).round(), lambda codes: codes / top):
        loss = leaf.square().sum()
    top.fill_(15.0)
    assert (torch.autograd.grad(loss, leaf)[0] / 2 - X).abs().max() > 0.7


def test_a_wrapper_is_configured_from_its_first_settings_on() -> None:
    model = product(bucket_size=64)
    sizes = []
    for settings in ({"bit_width": 4}, {"bucket_size": 512}, {}):
        model.configure(**settings)
        sizes.append(stored_bytes(model))
    assert sizes == [expected(4, 64), expected(2, 512), expected(2, 64)]


def test_what_is_kept_exact_has_nothing_to_configure() -> None:
    with pytest.raises(TypeError, match=r"\['bit_width'\] would do nothing, because act_quant is None"):
        product(None).configure(bit_width=4)


def test_a_schedule_continues_from_its_state() -> None:
    table = {2: {"bit_width": 4}}
    first, second = QuantizerSchedule(product(), table), product()
    for _ in range(2):
        first.step()
    resumed = QuantizerSchedule(second, table)
    assert stored_bytes(second) == expected(2)
    resumed.load_state_dict(first.state_dict())
    assert stored_bytes(second) == expected(4)
    assert resumed.state_dict() == {"steps": 2}


def test_a_schedule_of_a_copy_leaves_the_original_alone() -> None:
    model = product()
    other = copy.deepcopy(model)
    QuantizerSchedule(other, {0: {"bit_width": 4}})
    assert (stored_bytes(model), stored_bytes(other)) == (expected(2), expected(4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, type[Exception], str]] = {
    "no wrapper": (lambda: nn.Linear(2, 2), {0: {"bit_width": 4}}, ValueError, "neither is nor"),
    "exact": (lambda: product(None), {0: {"bit_width": 4}}, ValueError, "would do nothing"),
    "empty": (product, {}, ValueError, "empty schedule"),
    "empty stage": (product, {0: {"bit_width": 4}, 5: {}}, ValueError, "step 5, {}, are in force"),
    "again": (product, {0: {"bit_width": 4}, 5: {"bit_width": 4}}, ValueError, "step 5"),
    "negative": (product, {-1: {"bit_width": 4}}, ValueError, "from 0 on, got -1"),
    "no steps": (product, {"bit_width": 4}, ValueError, "got 'bit_width'"),
    "no schedule": (product, 4, TypeError, "map steps to settings"),
    "unknown": (product, {9: {"bit_widht": 4}}, UnknownNameError, "did you mean 'bit_width'"),
    "no mix": (product, {9: {"mix_prob": 0.5}}, UnknownNameError, "no setting 'mix_prob'"),
    "out of range": (product, {9: {"bit_width": 9}}, ValueError, "got 9"),
    "built": (lambda: product(codec_from(Uint2.tensor_quant)), {0: {"bit_width": 4}}, TypeError,
              "built before it was handed over; pass the quantizer's config class")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schedule_that_would_do_nothing_is_refused_at_once(case: str) -> None:
    build, schedule, error, message = REFUSED[case]
    model = build()
    before = getattr(model, "_codec", None)
    with pytest.raises(error, match=message):
        QuantizerSchedule(model, schedule)
    assert getattr(model, "_codec", None) is before


def test_a_pickled_wrapper_can_be_scheduled() -> None:
    model: nn.Module = pickle.loads(pickle.dumps(QuantBackwardWrapper(nn.Tanh(), Uint2)))
    QuantizerSchedule(model, {0: {"bit_width": 8}})
    assert stored_bytes(model) == expected(8)


def test_a_config_that_cannot_be_imported_is_missed_only_when_needed() -> None:
    class Mine(Uint2):
        bit_width = 4

    model = pickle.loads(pickle.dumps(QuantBackwardWrapper(nn.Tanh(), Mine)))
    assert stored_bytes(model) == expected(4)
    with pytest.raises(TypeError, match="Mine was not pickled with its quantizer"):
        QuantizerSchedule(model, {0: {"bit_width": 8}})
