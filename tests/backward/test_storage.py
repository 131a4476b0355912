"""The two storage modes give the same gradients bit for bit, and only one of them saves memory."""

from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import nn

from brevitas_bp import QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.codec.quantized import ModuleCodec
from brevitas_bp.quant import (
    Int4DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import NETS, QUANTIZING, assert_same, net, run, wrapped_run

QUANTIZERS = [
    ShiftedUint2DynamicActPerBucketFloat, ShiftedUint2DynamicActPerBucketFloatStochastic,
    Int4DynamicActPerBucketFloat, ShiftedUint2Mix4DynamicActPerBucketFloatStochastic]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.__name__)
@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_both_storages_give_the_same_gradients(name: str, policy: str, quantizer: Any) -> None:
    module, inputs = net(name)
    early, late = (
        wrapped_run(module, *inputs, act_quant=quantizer, policy=policy, storage=storage)
        for storage in ("save_quantized", "quantize_on_backward"))
    assert_same(late.grads, early.grads)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_these_gradients_are_quantized(policy: str) -> None:
    module, inputs = net("conv")
    plain, wrapped = run(module, *inputs), wrapped_run(module, *inputs, policy=policy)
    assert not torch.equal(wrapped.grads["0.weight"], plain.grads["0.weight"])


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("kind", ["stock", "general"])
def test_break_even_is_the_same_rule_in_both(kind: str, features: int) -> None:
    # A codec that knows the bytes it needs only after encoding.
    module, x = nn.Linear(features, 2), torch.randn(1, features)
    grads = []
    for storage in ("save_quantized", "quantize_on_backward"):
        quantizer: Any = Int8ActPerTensorFloat
        if kind == "general":
            lowered: Any = codec_from(ShiftedUint2DynamicActPerBucketFloat, bucket_size=8)
            quantizer = ModuleCodec(lowered.quantizer)
        grads.append(wrapped_run(module, x, act_quant=quantizer, storage=storage).grads)
    assert_same(*grads)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["stock", "general"])
def test_break_even_is_the_same_for_inputs_of_norms(kind: str, features: int) -> None:
    # The mean is dropped if, and only if, the input is stored normalized.
    torch.manual_seed(0)
    codec: Any = codec_from(ShiftedUint2DynamicActPerBucketFloat)
    quantizer = ModuleCodec(codec.quantizer) if kind == "general" else codec
    module, x = nn.LayerNorm(features), torch.randn(512, features) * 3 + 5
    early, late = (
        wrapped_run(module, x, act_quant=quantizer, storage=storage)
        for storage in ("save_quantized", "quantize_on_backward"))
    assert_same(late.grads, early.grads)
    # A row takes at least 2 bytes of codes and 8 bytes of metadata.
    plain = run(module, x)
    assert torch.equal(early.grads["weight"], plain.grads["weight"]) == (4 * features <= 10)


def test_quantizing_on_backward_saves_nothing() -> None:
    # Every float tensor: saving a derivative beside an output that another layer saves costs bytes.
    module, inputs = net("shared")
    reports = []
    late = QuantBackwardWrapper(module, policy="all", storage="quantize_on_backward")
    for model in (module, late):
        with track_saved_memory(model) as report:
            output = model(*inputs)
        reports.append(report)
        del output
    before, after = reports
    assert after.stored_bytes == after.exact_bytes == before.exact_bytes > 0
