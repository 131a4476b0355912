"""Policies: the built-in ones, and a callable that gets op, module and codec. H6."""


import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import Codec, QuantBackwardWrapper, SavedTensor, codec_from, track_saved_memory
from brevitas_bp.backward.policy import POLICIES, explained
from brevitas_bp.quant import (
    ShiftedUint1DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint8DynamicActPerBucketFloat,
)
from tests.backward.support import (
    QUANTIZING,
    Apply,
    Spy,
    Square,
    assert_same,
    net,
    run,
    wrapped_run,
)

RELUS: dict[str, nn.Module] = {
    "nn.ReLU": nn.ReLU(),
    "in place": nn.Sequential(nn.Linear(256, 256), nn.ReLU(inplace=True)),
    "F.relu": Apply(F.relu),
    "torch.relu": Apply(torch.relu),
    "Tensor.relu": Apply(lambda x: x.relu()),
    "Tensor.relu_": Apply(lambda x: (x * 1).relu_()),
}
#: Policies that store the sign of a ReLU's output.
MASKING = ["all_but_relu", "op_aware"]


def lost(grad: Tensor, plain: Tensor) -> float:
    """Returns the fraction of active units whose gradient is gone."""
    return float(((grad == 0) & (plain != 0)).sum() / (plain != 0).sum())


@pytest.mark.parametrize(("quantizer", "least"), [
    (ShiftedUint2DynamicActPerBucketFloat, 0.30), (ShiftedUint1DynamicActPerBucketFloat, 0.60)])
def test_quantized_relu_loses_its_mask(quantizer: type, least: float) -> None:
    # Rounding to nearest loses values below half a step. A bucket of 256 normal values ends near 2.8,
    # so P(|z| < 2.8 / 6) = 0.36 at 2 bits and P(|z| < 1.4) = 0.84 at 1 bit. The hazards table has 0.35
    # and 0.71.
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    plain = run(nn.ReLU(), x)
    wrapped = wrapped_run(nn.ReLU(), x, act_quant=quantizer, policy="all")
    assert lost(wrapped.grads["input 0"], plain.grads["input 0"]) > least


@pytest.mark.parametrize("policy", MASKING)
@pytest.mark.parametrize("name", RELUS)
def test_mask_of_a_relu_is_kept(name: str, policy: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    plain, wrapped = run(RELUS[name], x), wrapped_run(RELUS[name], x, policy=policy)
    assert torch.equal(wrapped.grads["input 0"], plain.grads["input 0"])


@pytest.mark.parametrize("policy", MASKING)
def test_mask_of_a_relu_takes_one_bit(policy: str) -> None:
    model = QuantBackwardWrapper(nn.ReLU(), policy=policy)
    with track_saved_memory(model) as report:
        output = model(torch.randn(64, 256, requires_grad=True))
    assert report.stored_bytes == 64 * 256 // 8
    assert output.requires_grad


def test_all_but_relu_quantizes_the_rest() -> None:
    module, inputs = net("conv")
    everything, but_relu = (
        wrapped_run(module, *inputs, policy=policy) for policy in ("all", "all_but_relu"))
    assert not torch.equal(everything.grads["0.weight"], but_relu.grads["0.weight"])
    assert not torch.equal(but_relu.grads["4.weight"], run(module, *inputs).grads["4.weight"])


@pytest.mark.parametrize("policy", MASKING)
def test_relu_of_a_module_kept_exact_is_not_masked(policy: str) -> None:
    model = QuantBackwardWrapper(
        nn.Sequential(nn.ReLU()), policy=policy, overrides={"0": None})
    with track_saved_memory(model) as report:
        output = model(torch.randn(64, 256, requires_grad=True))
    assert report.ratio == 1
    assert output.requires_grad


def test_exact_policy_packs_nothing() -> None:
    module, inputs = net("conv")
    model = QuantBackwardWrapper(module, policy="exact", seed=0)
    with track_saved_memory(model) as report:
        output = model(*inputs)
    assert report.ratio == 1
    assert model.noise_state()["position"] == 0
    assert output.requires_grad


def test_policy_is_told_op_module_and_codec() -> None:
    other = codec_from(ShiftedUint8DynamicActPerBucketFloat)
    module = nn.Sequential(
        nn.Linear(64, 64), nn.Sequential(nn.GELU(), nn.LayerNorm(64)), nn.Linear(64, 4))
    spy = Spy()
    model = QuantBackwardWrapper(module, policy=spy, overrides={"1.1": other, "2": None})
    model(torch.randn(32, 64))
    assert all(isinstance(saved, SavedTensor) for saved in spy.asked)
    assert [(s.module, s.op) for s in spy.asked] == [
        ("0", "linear"), ("1.0", "gelu"), *[("1.1", "layer_norm")] * 3, ("2", "linear")]
    codecs = [saved.codec for saved in spy.asked]
    assert codecs[0] is codecs[1]
    assert codecs[2] is other
    assert codecs[5] is None


def test_custom_function_has_no_op_name_and_works() -> None:
    spy = Spy()
    x = torch.randn(64, 64)
    wrapped = wrapped_run(
        nn.Sequential(Apply(Square.apply)), x, policy=spy,
        act_quant=ShiftedUint8DynamicActPerBucketFloat)
    assert spy.places == [("0", None)]
    # dy * 2 * x~, with |x~ - x| up to half a step, |dy| <= 1, and a few float32 roundings.
    step = (x.max() - x.min()) / 255
    plain = run(nn.Sequential(Apply(Square.apply)), x)
    error = (wrapped.grads["input 0"] - plain.grads["input 0"]).abs().max()
    assert 0 < error <= step * 1.001


def test_policy_may_choose_a_codec_of_its_own() -> None:
    fine = codec_from(ShiftedUint8DynamicActPerBucketFloat, bucket_size=64)

    def policy(saved: SavedTensor) -> Codec | None:
        return fine if saved.op == "gelu" else None

    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.GELU()), policy=policy)
    with track_saved_memory(model) as report:
        output = model(torch.randn(32, 64))
    assert {row.op: row.stored_bytes for row in report.rows} == {
        "linear": 32 * 64 * 4, "gelu": 32 * (64 + 8)}
    assert output.requires_grad


def test_policy_that_returns_something_else_is_refused() -> None:
    model = QuantBackwardWrapper(
        nn.Tanh(), policy=lambda saved: ShiftedUint8DynamicActPerBucketFloat)
    with pytest.raises(TypeError, match=r"must return a Codec or None, got <class .*codec_from"):
        model(torch.randn(8, 8, requires_grad=True))


@pytest.mark.parametrize("policy", QUANTIZING)
def test_quantizer_none_is_the_exact_policy(policy: str) -> None:
    module, inputs = net("encoder")
    wrapped = wrapped_run(module, *inputs, act_quant=None, policy=policy)
    assert_same(wrapped.grads, run(module, *inputs).grads)


@pytest.mark.parametrize("name", QUANTIZING)
@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(64), nn.GroupNorm(64, 64), nn.InstanceNorm2d(64), nn.LayerNorm([64, 8, 8])])
def test_norm_statistics_stay_exact(norm: nn.Module, name: str) -> None:
    # 64 channels of 4 bytes. 2-bit codes and metadata of one bucket (72 bytes) would be smaller.
    x = torch.randn(64, 64, 8, 8, requires_grad=True)
    decided: dict[int, bool] = {}

    def policy(saved: SavedTensor) -> Codec | None:
        codec = explained(POLICIES[name]).decide(saved).codec
        decided[saved.tensor.numel()] = codec is not None
        return codec

    QuantBackwardWrapper(norm, policy=policy)(x)
    assert decided.pop(x.numel()), "the input is quantized"
    assert not any(decided.values()), "its statistics are not"
