"""Quantization-aware training: tensors that Brevitas' own layers save."""

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import assert_same, run, wrapped_run


def qat_net() -> nn.Module:
    """Returns a network with weights and activations at 4 bits in the forward pass."""
    layers: list[nn.Module] = [qnn.QuantIdentity(bit_width=8)]
    for inputs, outputs in ((3, 32), (32, 64)):
        layers += [
            qnn.QuantConv2d(inputs, outputs, 3, padding=1, weight_bit_width=4, bias=False),
            nn.BatchNorm2d(outputs), qnn.QuantReLU(bit_width=4), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        qnn.QuantLinear(64, 10, True, weight_bit_width=4))


def float_net() -> nn.Module:
    """Returns the network without fake quantization."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 3, 32, 32)


def saved_bytes(model: nn.Module, images: Tensor) -> tuple[int, int]:
    with track_saved_memory(model) as report:
        output = model(images)
    assert output.requires_grad
    assert not report.unknown_operations
    return report.exact_bytes, report.stored_bytes


def test_qat_takes_less_than_plain_float_training(images: Tensor) -> None:
    exact, stored = saved_bytes(
        QuantBackwardWrapper(qat_net(), bucket_size=256, metadata_dtype=torch.bfloat16), images)
    plain, _ = saved_bytes(float_net(), images)
    # The control: fake quantization about doubles the saved bytes, which users complain about.
    assert exact > 1.5 * plain
    assert exact > 10 * stored
    assert plain > 5 * stored


def test_qat_forward_and_statistics_are_untouched(images: Tensor) -> None:
    module = qat_net()
    plain, ours = run(module, images), wrapped_run(module, images)
    assert torch.equal(ours.output, plain.output)
    assert_same(ours.buffers, plain.buffers)
    assert all(grad.isfinite().all() for grad in ours.grads.values())
    assert ours.grads.keys() == plain.grads.keys()


def test_quantized_weights_stay_exact(images: Tensor) -> None:
    # Fake-quantized weights are computed from parameters, so autograd saves them like activations.
    model = QuantBackwardWrapper(nn.Sequential(*list(qat_net())[5:6]))
    model(torch.randn(16, 32, 16, 16, requires_grad=True))
    stored = {site.reason.split(":")[0]: site.stored for site in model.explain().sites.values()
              if site.op == "conv2d"}
    assert stored == {"input": "2-bit rotated", "weight": "exact"}
