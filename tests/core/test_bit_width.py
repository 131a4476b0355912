"""The choice between two widths, and schedules of its probability."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from torch import nn

from brevitas_bp import MixProbScheduler, QuantBackwardWrapper, codec_from
from brevitas_bp.core.bit_width import (
    MixSchedule,
    TwoBitWidthSelector,
    constant,
    cosine,
    linear,
    selectors,
    stepwise,
)
from brevitas_bp.format.random import WIDTHS, derive, seeded
from brevitas_bp.format.widths import WidthLayout
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
)


def selector(mix_prob: float = 0.5, **settings: Any) -> TwoBitWidthSelector:
    return TwoBitWidthSelector(2, 4, mix_prob, **settings)


def mixed_share(module: TwoBitWidthSelector, n: int = 1000) -> float:
    with seeded(0):
        return float((module(n) == 4).double().mean())


def test_widths_are_floats_per_bucket() -> None:
    widths = selector()(10)
    assert widths.shape == (10, 1) and widths.dtype == torch.float32
    assert set(widths.flatten().tolist()) == {2.0, 4.0}


def test_without_a_number_of_buckets_there_is_one_draw() -> None:
    assert selector(1.0)().shape == () and selector(1.0)().item() == 4


def test_widths_are_those_of_the_seed() -> None:
    with seeded(6):
        widths = selector(0.3)(100)
    layout = WidthLayout.draw(100, 0.3, "bucket", derive(6, WIDTHS, 0))
    assert torch.equal(widths.flatten() == 4, layout.is_mixed())


def test_the_buffer_is_the_only_state() -> None:
    assert list(selector(0.3).state_dict()) == ["mix_prob"]
    assert not list(selector().parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_moves_the_probability(assign: bool) -> None:
    module = selector(0.1)
    assert mixed_share(module) == pytest.approx(0.1, abs=1e-3)
    module.load_state_dict(selector(0.9).state_dict(), assign=assign)
    assert mixed_share(module) == pytest.approx(0.9, abs=1e-3)


def test_set_mix_prob_moves_the_next_draw() -> None:
    module = selector(0.1)
    module.set_mix_prob(0.9)
    assert mixed_share(module) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("changes", range(4))
def test_a_copy_has_a_probability_of_its_own(
        clone: Callable[[TwoBitWidthSelector], TwoBitWidthSelector], changes: int) -> None:
    module = selector(0.1)
    # A copy counts changes from zero again: the count must not be confused with the value.
    for _ in range(changes):
        module.set_mix_prob(0.1)
    mixed_share(module)
    copied = clone(module)
    copied.set_mix_prob(0.9)
    assert mixed_share(copied) == pytest.approx(0.9, abs=1e-3)
    assert mixed_share(module) == pytest.approx(0.1, abs=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mix_prob": -0.1}, r"mix_prob must be a number in \[0, 1\], got -0.1"),
    ({"mix_prob": 1.1}, "got 1.1"),
    ({"bit_width": 0}, "bit_width must be an integer in 1..8, got 0"),
    ({"mix_bit_width": 9}, "got 9"),
    ({"mix_bit_width": 2}, "mix_bit_width must differ from bit_width, both are 2"),
    ({"mix_per": "row"}, "mix_per must be 'bucket' or 'tensor', got 'row'")]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_bad_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoBitWidthSelector(**{"bit_width": 2, "mix_bit_width": 4, "mix_prob": 0.5} | settings)


def test_a_bad_probability_is_refused_and_changes_nothing() -> None:
    module = selector(0.1)
    with pytest.raises(ValueError, match="set_mix_prob: mix_prob must be a number"):
        module.set_mix_prob(1.1)
    assert module.probability == 0.1


SCHEDULES: list[tuple[MixSchedule, dict[int, float]]] = [
    (constant(0.3), {0: 0.3, 100: 0.3}),
    (linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 4: 0.2, 9: 0.2}),
    (cosine(1.0, 0.0, 4), {0: 1.0, 2: 0.5, 4: 0.0, 9: 0.0}),
    (stepwise(0.8, 0.5, 10), {0: 0.8, 9: 0.8, 10: 0.4, 25: 0.2})]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_a_schedule_passes_through_its_points(
        schedule: MixSchedule, expected: dict[int, float]) -> None:
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("build", [
    lambda: constant(1.1), lambda: linear(-0.1, 1, 5), lambda: cosine(0, 2, 5),
    lambda: stepwise(0.5, 0.5, 0), lambda: linear(0, 1, 0)])
def test_a_schedule_that_leaves_the_unit_interval_is_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"brevitas_bp\.core\.(constant|linear|cosine|stepwise)"):
        build()


MIX = ShiftedUint2Mix4DynamicActPerBucketFloatStochastic
ROOTS = {
    "layer": lambda: nn.Sequential(QuantIdentity(MIX), nn.Sequential(QuantIdentity(MIX))),
    "wrapper": lambda: QuantBackwardWrapper(nn.Linear(4, 4), MIX),
    "module that holds a wrapper": lambda: nn.Sequential(
        QuantBackwardWrapper(nn.Linear(4, 4), MIX))}
each_root = pytest.mark.parametrize("build", ROOTS.values(), ids=ROOTS.keys())


@each_root
def test_a_scheduler_moves_every_selector(build: Callable[[], nn.Module]) -> None:
    root = build()
    scheduler = MixProbScheduler(root, linear(1.0, 0.0, 4))
    assert {s.probability for s in selectors(root)} == {1.0}
    assert scheduler.step() == 0.75
    assert {s.probability for s in selectors(root)} == {0.75}


def test_a_scheduler_finds_quantizers_that_a_checkpoint_rebuilt() -> None:
    root = nn.Sequential(QuantIdentity(MIX))
    scheduler = MixProbScheduler(root, linear(1.0, 0.0, 4))
    root.load_state_dict(nn.Sequential(QuantIdentity(MIX, mix_prob=0.3)).state_dict())
    assert [s.probability for s in selectors(root)] == [pytest.approx(0.3)]
    scheduler.step()
    assert [s.probability for s in selectors(root)] == [0.75]


def test_a_scheduler_continues_from_its_state() -> None:
    first = MixProbScheduler(nn.Sequential(QuantIdentity(MIX)), linear(1.0, 0.0, 4))
    first.step()
    second = MixProbScheduler(nn.Sequential(QuantIdentity(MIX)), linear(1.0, 0.0, 4))
    second.load_state_dict(first.state_dict())
    assert second.step() == first.step() == 0.5


def test_a_schedule_without_a_selector_is_refused() -> None:
    root = nn.Sequential(QuantIdentity(ShiftedUint2DynamicActPerBucketFloatStochastic))
    with pytest.raises(ValueError, match="MixProbScheduler: no quantizer below the module mixes"):
        MixProbScheduler(root, constant(0.5))


def test_the_codec_follows_the_probability_and_old_payloads_keep_theirs() -> None:
    layer = QuantIdentity(MIX, bucket_size=64, mix_prob=0.0)
    codec = codec_from(layer.act_quant)
    x = torch.randn(6400, generator=torch.Generator().manual_seed(0))
    before = codec.encode(x, seed=1)
    decoded = before.decode()
    MixProbScheduler(layer, constant(1.0))
    after = codec.encode(x, seed=1)
    assert (before.tensors[0].numel(), after.tensors[0].numel()) == (1600, 3200)
    assert torch.equal(before.decode(), decoded)
