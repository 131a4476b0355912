"""Averages in a backward pass: the tensors they store or skip, and their effect on a weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import OpAware, QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward.policy import Policy
from brevitas_bp.quant import (
    ShiftedUint2Avg4DynamicActPerBucketFloat,
    ShiftedUint2Avg4DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import (
    NETS,
    QUANTIZING,
    Apply,
    assert_same,
    net,
    run,
    wrapped_run,
)
from tests.stats import hoeffding

CONFIG = ShiftedUint2Avg4DynamicActPerBucketFloatStochastic
PLAIN = ShiftedUint2DynamicActPerBucketFloatStochastic
AVERAGED = "2-bit stochastic, means of 4"


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_forward_is_bit_identical_and_both_storages_agree(name: str, policy: str) -> None:
    module, inputs = net(name)
    plain = run(module, *inputs)
    stored, late = (
        wrapped_run(module, *inputs, act_quant=CONFIG, policy=policy, storage=storage)
        for storage in ("save_quantized", "quantize_on_backward"))
    assert torch.equal(stored.output, plain.output) and torch.equal(stored.rng, plain.rng)
    assert stored.grads.keys() == plain.grads.keys()
    assert_same(late.grads, stored.grads)


def test_bytes_are_those_of_live_tensors() -> None:
    model = QuantBackwardWrapper(
        nn.Linear(256, 8), CONFIG, metadata_dtype=torch.bfloat16)
    with track_saved_memory(model) as report:
        output = model(torch.randn(1024, 256))
    # A row has 64 means, and buckets end with rows. Each bucket has a scale and an offset.
    assert report.stored_bytes == 1024 * (64 * 2 // 8 + 2 * 2)
    del output


# The gradient of a weight.


def integers() -> tuple[Tensor, Tensor]:
    """Returns input and cotangent of a linear layer, with values that make all arithmetic exact.

    Every bucket of 64 means (8 rows) contains means of 0 and 3, so decoded values are 0, 1, 2 or 3.
    """
    torch.manual_seed(0)
    x = torch.rand(64, 32) * 3
    x[::8, :4], x[::8, 4:8] = 0, 3
    return x, torch.randint(-4, 5, (64, 5)).float()


def weight_gradient(x: Tensor, upstream: Tensor, config: Any, **options: Any) -> Tensor:
    torch.manual_seed(1)
    model = QuantBackwardWrapper(nn.Linear(32, 5), config, seed=0, bucket_size=64, **options)
    leaf = x.clone().requires_grad_()
    model(leaf).backward(upstream)
    weight, bias = (p.grad for p in model.parameters())
    # Backward uses the input only for the weight.
    assert torch.equal(leaf.grad, upstream @ model.weight) and torch.equal(bias, upstream.sum(0))  # type: ignore[arg-type]
    assert weight is not None
    return weight


def has_identical_columns(grad: Tensor) -> bool:
    groups = grad.unflatten(1, (-1, 4))
    return torch.equal(groups, groups[..., :1].expand_as(groups))


@pytest.mark.parametrize("policy", QUANTIZING)
def test_a_weight_gradient_has_identical_columns_in_each_group_of_features(policy: str) -> None:
    x, upstream = integers()
    assert has_identical_columns(weight_gradient(x, upstream, CONFIG, policy=policy))
    assert not has_identical_columns(weight_gradient(x, upstream, PLAIN, policy=policy))


def test_the_mean_gradient_is_the_exact_one_averaged_over_each_group() -> None:
    x, upstream = integers()
    draws = 400
    torch.manual_seed(1)
    model = QuantBackwardWrapper(nn.Linear(32, 5), CONFIG, seed=0, bucket_size=64)
    mean = torch.zeros(5, 32)
    for _ in range(draws):
        model.zero_grad()
        model(x).backward(upstream)
        mean += model.weight.grad / draws
    exact = upstream.T @ x
    projected = exact.unflatten(1, (-1, 4)).mean(-1).repeat_interleave(4, 1)
    # Decoded values have a step of 1, so a sum over rows has independent terms of size |upstream|
    # (Hoeffding, 1963, for unequal intervals). The mean is summed in float32, below 64 * 4 * 3.
    interval = upstream.square().sum(0).sqrt().unsqueeze(1)
    tolerance = interval * hoeffding(draws, 40) + draws * 768 * 2.0**-24
    assert ((mean - projected).abs() < tolerance).all()
    # Biased: averaging removes the differences between the features of a group.
    assert ((mean - exact).abs() > 4 * tolerance).any()


# Which tensors are averaged.


def stored(function: Callable[..., Tensor], *shapes: tuple[int, ...], **options: Any) -> set[str]:
    """Returns how the tensors saved by a function of new tensors are stored."""
    torch.manual_seed(0)
    model = QuantBackwardWrapper(Apply(function), CONFIG, bucket_size=64, **options)
    model(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    return {site.stored for site in model.explain().sites.values()} - {"exact", "not kept"}


X = (8, 16, 8, 8)
PLACES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], set[str]]] = {
    "linear": (F.linear, [(64, 64), (32, 64)], {AVERAGED}),
    "conv": (F.conv2d, [X, (16, 16, 3, 3)], {AVERAGED}),
    "silu": (F.silu, [X], {"4-bit stochastic"}),
    "mul": (torch.mul, [X, X], {"4-bit stochastic"}),
    "matmul": (torch.matmul, [(8, 64, 32), (8, 32, 64)], {"4-bit stochastic"}),
    "gate": (torch.mul, [(8, 16, 32, 32), (8, 16, 1, 1)], {"2-bit stochastic"}),
    "batch norm": (
        lambda x: F.batch_norm(x, None, None, training=True), [X], {"2-bit stochastic"}),
    "layer norm": (lambda x: F.layer_norm(x, (64,)), [(64, 64)], {"2-bit stochastic, as output"}),
    "prelu": (F.prelu, [X, (16,)], {"sign and negative part"}),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [(2, 4, 32, 16)] * 3,
        {"2-bit stochastic", "8-bit stochastic"}),
}


@pytest.mark.parametrize("name", PLACES)
def test_only_the_input_of_a_layer_is_averaged(name: str) -> None:
    function, shapes, expected = PLACES[name]
    assert stored(function, *shapes) == expected


def test_a_factor_beside_a_parameter_is_averaged() -> None:
    model = QuantBackwardWrapper(
        Apply(lambda x, w: x * w, nn.Parameter(torch.ones(64))), CONFIG)
    model(torch.randn(64, 64, requires_grad=True))
    assert {site.stored for site in model.explain().sites.values()} == {AVERAGED}


@pytest.mark.parametrize(("options", "name", "expected"), [
    ({"policy": "all"}, "silu", {AVERAGED}),
    ({"policy": "all"}, "batch norm", {AVERAGED}),
    ({"policy": OpAware(norm_bits=3)}, "batch norm", {"3-bit stochastic"}),
    ({"policy": OpAware(multiplier_quant=CONFIG)}, "silu", {AVERAGED}),
    ({"policy": OpAware(attention_quant=CONFIG)}, "attention", {AVERAGED, "2-bit stochastic"})])
def test_averages_elsewhere_on_demand(
        options: dict[str, Any], name: str, expected: set[str]) -> None:
    function, shapes, _ = PLACES[name]
    assert stored(function, *shapes, **options) == expected


def test_prelu_stores_its_negative_part_for_each_element() -> None:
    # The mean of negative parts would lose the part that falls on positive elements.
    x, slope = torch.randn(64, 64), nn.Parameter(torch.tensor([0.25]))
    module = Apply(F.prelu, slope)
    averaged, plain = (
        wrapped_run(module, x, act_quant=config, bucket_size=64) for config in (CONFIG, PLAIN))
    assert_same(averaged.grads, plain.grads)


class Network(nn.Module):
    """Contains every operation that a rounding can pass through: layers, norm, activation, gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.gate, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        # The sum hides that it is a product, which could be computed from its factors.
        return self.last(x + 0)


def gradients(config: Any, policy: str | Policy = "op_aware") -> dict[str, Tensor]:
    torch.manual_seed(0)
    module, x = Network(), torch.randn(8, 3, 34, 34)
    return wrapped_run(module, x, act_quant=config, bucket_size=64, policy=policy).grads


def test_all_but_weights_of_layers_get_the_gradients_of_the_plain_quantizer() -> None:
    averaged, plain = gradients(CONFIG), gradients(PLAIN)
    different = {name for name in plain if not torch.equal(averaged[name], plain[name])}
    # The input of the gate has one pixel, so its groups have one element.
    assert different == {"first.weight", "last.weight"}
    # Positive control: averaging norms and products changes all gradients before them.
    everywhere, plain = gradients(CONFIG, "all"), gradients(PLAIN, "all")
    assert not torch.equal(everywhere["input 0"], plain["input 0"])


def test_overrides_average_one_layer() -> None:
    torch.manual_seed(0)
    model = QuantBackwardWrapper(Network(), PLAIN, overrides={"last": CONFIG}, bucket_size=64)
    model(torch.randn(8, 3, 34, 34))
    stored = {site.module: site.stored for site in model.explain().sites.values()
              if site.op == "conv2d"}
    assert stored["last"] == AVERAGED and stored["first"] == "4-bit stochastic"    # an image


def test_what_is_not_averaged_shares_one_codec() -> None:
    # A tensor that two norms save is encoded once.
    model = QuantBackwardWrapper(
        Apply(lambda x: F.layer_norm(x, (64,)) + F.layer_norm(x, (64,), torch.full((64,), 2.0))), CONFIG)
    with track_saved_memory(model) as report:
        output = model(torch.randn(64, 64, requires_grad=True))
    statistics = 2 * 2 * 64 * 4
    assert report.stored_bytes <= 64 * 64 // 4 + 16 * 8 + statistics + 64 * 4
    del output


def test_nearest_averages_are_deterministic() -> None:
    x, upstream = integers()
    first, second = (
        weight_gradient(x, upstream, ShiftedUint2Avg4DynamicActPerBucketFloat) for _ in range(2))
    assert torch.equal(first, second)


def test_four_bit_averages_become_four_bit_codes() -> None:
    model = QuantBackwardWrapper(
        Apply(F.silu), ShiftedUint4DynamicActPerBucketFloatStochastic, average_size=2)
    model(torch.randn(64, 64, requires_grad=True))
    (site,) = model.explain().sites.values()
    assert site.stored == "4-bit stochastic"


def test_a_codec_without_averages_is_itself() -> None:
    model = QuantBackwardWrapper(nn.Linear(8, 8), PLAIN)
    codec = model._codec
    assert codec is not None and codec.per_element is codec
