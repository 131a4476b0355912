"""Products of every kind of layer: exact where nothing is rounded, rounded twice where it is."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from brevitas.nn import QuantConv2d, QuantConvTranspose2d, QuantIdentity, QuantLinear
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
from torch import Tensor, nn

from brevitas_bp.codec.keep import Keep
from brevitas_bp.format.random import derive
from brevitas_bp.grad import QuantGradientWrapper
from brevitas_bp.grad.control import Control
from brevitas_bp.grad.layers import rounding_of
from brevitas_bp.quant import (
    HouseholderUint4DynamicGradPerRowFloatStochastic,
    ShiftedUint4DynamicGradPerRowFloatStochastic,
    ShiftedUint4DynamicGradPerTensorFloatStochastic,
)


class Scaled(nn.Linear):
    """A layer of a user, with a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.weight * 2, bias=self.bias).tanh()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear of a vector": (lambda: nn.Linear(6, 5), (6,)),
    "linear of tokens, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear of a user": (lambda: Scaled(6, 5), (7, 6)),
    "bilinear size": (lambda: nn.Linear(6, 1), (7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2), (3, 4, 9, 8)),
    "conv2d strided, pixels left over": (lambda: nn.Conv2d(4, 6, 3, stride=3), (3, 4, 10, 11)),
    "conv2d of an image": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), (4, 9, 8)),
    "conv2d same, uneven": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 9, 8)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 9, 8)),
    "conv2d reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (3, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2), (3, 4, 5, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "Brevitas linear": (lambda: QuantLinear(6, 5), (7, 6)),
    "Brevitas linear, quantized input": (
        lambda: QuantLinear(6, 5, input_quant=Int8ActPerTensorFloat), (7, 6)),
    "Brevitas conv": (lambda: QuantConv2d(
        4, 6, 3, padding=1, weight_quant=Int8WeightPerTensorFloat), (3, 4, 9, 8)),
    "Brevitas conv, same": (lambda: QuantConv2d(4, 6, 4, padding="same"), (3, 4, 9, 8)),
    "Brevitas transposed": (lambda: QuantConvTranspose2d(4, 6, 3, stride=2), (3, 4, 5, 6)),
    "Brevitas quantized tensors": (lambda: nn.Sequential(
        QuantIdentity(return_quant_tensor=True), QuantLinear(6, 5, return_quant_tensor=True),
        QuantLinear(5, 4)), (7, 6)),
}
# Plain torch and Brevitas warn of these, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:Computing zero point")]
each_layer = pytest.mark.parametrize("kind", LAYERS)


def gradients(module: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    given = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(1)
    cotangent = torch.randn_like(output)
    return list(torch.autograd.grad(output, [x, *given], cotangent))


def made(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make(), torch.randn(shape, requires_grad=True)


@each_layer
def test_without_rounding_gradients_are_those_of_the_layer(kind: str) -> None:
    module, x = made(kind)
    plain = copy.deepcopy(module)
    expected = plain(x)
    model = QuantGradientWrapper(module, Keep(), Keep())
    output = model(x)
    assert torch.equal(output, expected)
    for ours, theirs in zip(gradients(module, x, output), gradients(plain, x, expected), strict=True):
        assert ours.shape == theirs.shape
        # The same product, but perhaps summed in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("channels_last", [False, True])
def test_both_products_get_their_own_rounding(kind: str, channels_last: bool) -> None:
    """The gradients are those of plain autograd for two other gradients of the output."""
    module, x = made(kind)
    if isinstance(module, nn.Sequential) or kind == "linear of a user" or (
            channels_last and x.dim() != 4):
        pytest.skip("one product with an output that is the layer's own")
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        module = module.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(module)
    model = QuantGradientWrapper(
        module, HouseholderUint4DynamicGradPerRowFloatStochastic,
        ShiftedUint4DynamicGradPerTensorFloatStochastic, seed=5)
    rounding = rounding_of(module)
    assert rounding is not None and rounding.for_input is not None and rounding.for_weight is not None
    output = model(x)
    torch.manual_seed(1)
    cotangent, stream = torch.randn_like(output), Control.seeded(5, None)
    seed = derive(stream.next_seed(), 0)
    ours = torch.autograd.grad(output, [x, *module.parameters()], cotangent)
    unbatched = x.dim() == 3 and isinstance(module, nn.Conv2d)
    rows = cotangent.unsqueeze(0) if unbatched else (
        cotangent.reshape(-1, cotangent.shape[-1]) if isinstance(module, nn.Linear) else cotangent)
    for_weight = rounding.for_weight(rows, derive(seed, 1)).view(cotangent.shape)
    for_input = rounding.for_input(rows, derive(seed, 0)).view(cotangent.shape)
    assert not torch.equal(for_weight, for_input)
    expected = plain(x)
    of_input, = torch.autograd.grad(expected, x, for_input, retain_graph=True)
    of_weights = torch.autograd.grad(expected, list(plain.parameters()), for_weight)
    for a, b in zip(ours, [of_input, *of_weights], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_weights_and_first_layers_need_no_product_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    net[2].requires_grad_(False)
    model = QuantGradientWrapper(net)
    x = torch.randn(7, 6)
    model(x).square().sum().backward()
    assert net[0].weight.grad is not None and net[2].weight.grad is None
    with torch.no_grad():
        assert model(x).grad_fn is None
    net.requires_grad_(False)
    assert model(x).grad_fn is None


def test_in_place_operations_after_a_layer() -> None:
    """Dropout, ReLU and addition in place are common after convolutions."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6, requires_grad=True)
    QuantGradientWrapper(conv)
    y = conv(x)
    y += 1
    F.relu(y, inplace=True).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_copies_round_with_noise_of_their_own(clone: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = QuantGradientWrapper(
        nn.Sequential(nn.Linear(6, 5)), ShiftedUint4DynamicGradPerRowFloatStochastic, seed=3)
    other, x = clone(model), torch.randn(7, 6)
    mine, theirs = model.module[0], other.module[0]
    assert type(theirs) is type(mine) and repr(theirs) == repr(mine)
    a, b = rounding_of(mine), rounding_of(theirs)
    assert a is not None and b is not None and a.control is not b.control
    assert b.control is other._control
    for net in (model, other):
        net(x).square().sum().backward()
    # A pickled wrapper continues its noise; a copy in the same process draws its own.
    assert theirs.weight.grad is not None
    assert torch.equal(mine.weight.grad, theirs.weight.grad) == (clone is not copy.deepcopy)


def test_unwrapping_restores_the_layers() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 4, 3))
    keys, classes = list(net.state_dict()), [type(m) for m in net]
    model = QuantGradientWrapper(net)
    assert isinstance(net[0], nn.Linear) and list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == keys
    assert model.unwrap() is net and [type(m) for m in net] == classes
    assert rounding_of(net[0]) is None and set(vars(net[0])) == set(vars(nn.Linear(6, 5)))
