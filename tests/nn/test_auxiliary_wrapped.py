"""Auxiliary layers inside of a wrapper: the same outputs, bytes as expected, nothing rounded twice."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, codec_from, quant, track_saved_memory
from brevitas_bp.nn import (
    AuxiliaryResidualConv2d,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
)

Rotated2 = quant.RotatedNormal2DynamicActPerBucketFloat
Rotated4 = quant.RotatedNormal2DynamicActPerBucketFloat.let(bit_width=4)
Average = quant.ShiftedUint2Avg2DynamicActPerBucketFloat
POLICIES = ["op_aware", "all", "all_but_relu", "exact"]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv2(F.relu(self.conv1(x)))))


def network() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8), Block(8), nn.Flatten(),
                             nn.Linear(512, 4))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(codec: Any = None) -> Any:
    return convert_to_auxiliary_residual(network(), [["1", "2", "3"]], codec=codec, seed=7)


def sign() -> Any:
    return convert_to_auxiliary_sign(network(), ["?.conv?", "5"])


FORMS: dict[str, Any] = {
    "residual": residual, "residual, 2 bits": lambda: residual(Rotated2),
    "residual, averages": lambda: residual(Average), "sign": sign}


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_the_same(form: str, policy: str) -> None:
    net, x = FORMS[form](), images()
    model = QuantBackwardWrapper(copy.deepcopy(net), policy=policy, seed=0)
    assert torch.equal(model(x), net(x))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), net.buffers()))
    found = gradients(model, x)
    assert all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("form", FORMS)
def test_the_exact_policy_gives_the_same_gradients(form: str) -> None:
    net, x = FORMS[form](), images()
    model = QuantBackwardWrapper(FORMS[form](), policy="exact")
    expected = gradients(net, x)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model, x).items())


class Layers(nn.Module):
    """Two auxiliary layers and nothing else that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Only(), Only()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def layers(form: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Layers()
    if form == "sign":
        return convert_to_auxiliary_sign(net, ["*"])
    codecs: dict[str, Any] = {"residual": None, "residual, 2 bits": Rotated2,
                              "residual, averages": Average}
    return convert_to_auxiliary_residual(
        net, [["first", "second"]], layers=["conv"], codec=codecs[form], seed=7)


@pytest.mark.parametrize("options", [
    *({"policy": policy} for policy in POLICIES), {"verify": True},
    {"storage": "quantize_on_backward"}, {"act_quant": Average}], ids=str)
@pytest.mark.parametrize("form", ["residual, 2 bits", "residual, averages", "sign"])
def test_codes_and_signs_are_not_rounded_again(form: str, options: dict[str, Any]) -> None:
    x = torch.randn(4, 4, 16, 16)
    expected = gradients(layers(form), x)
    found = gradients(QuantBackwardWrapper(layers(form), seed=0, **options), x)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_an_exact_activation_is_rounded_once_for_the_run() -> None:
    x = torch.randn(4, 4, 16, 16)
    model = QuantBackwardWrapper(layers("residual"), seed=0)
    with track_saved_memory(model) as report:
        y = model(x)
    codec = codec_from(Rotated2)
    assert report.exact_bytes == x.nbytes
    assert report.stored_bytes == codec.encode(x, seed=0).nbytes < x.nbytes // 10
    sites = model.explain().sites.values()
    assert {(site.stored, site.reason.partition(":")[0]) for site in sites} == {
        ("2-bit rotated", "auxiliary activation")}
    # Both layers see one rounding: with equal gradients of their outputs they have equal gradients.
    first, second = model.first.conv, model.second.conv
    g = torch.randn_like(y)
    with torch.no_grad():
        second.weight.zero_()
        second.bias.zero_()
    model(x).backward(g)
    assert torch.equal(first.weight.grad, second.weight.grad)
    exact = gradients_at(layers("residual"), x, g)
    assert not torch.equal(first.weight.grad, exact)
    assert torch.nn.functional.cosine_similarity(
        first.weight.grad.flatten(), exact.flatten(), dim=0) > 0.5


def gradients_at(net: Any, x: Tensor, g: Tensor) -> Tensor:
    with torch.no_grad():
        net.second.conv.weight.zero_()
    net(x).backward(g)
    return net.first.conv.weight.grad


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["residual, 2 bits", "sign"])
def test_bytes_are_reported(form: str, wrapped: bool) -> None:
    x = torch.randn(4, 4, 16, 16)
    net = layers(form)
    model = QuantBackwardWrapper(net) if wrapped else net
    with track_saved_memory(model) as report:
        y = model(x)
    if form == "sign":
        expected = 2 * (x.numel() // 8)
    else:
        expected = codec_from(Rotated2).encode(x, seed=0).nbytes
    assert report.stored_bytes == expected and y.requires_grad


def test_a_wrapped_network_stores_less_with_a_run() -> None:
    x = torch.randn(8, 3, 16, 16)
    stored = {}
    for name, net in (("plain", network()), ("run", residual()), ("codec", residual(Rotated2))):
        net = net[:4]
        model = QuantBackwardWrapper(net)
        with track_saved_memory(model) as report:
            y = model(x)
        stored[name] = report.stored_bytes
        assert y.requires_grad
    # Inputs of two of three blocks are gone. They were stored given a mask, which takes one byte more.
    saved = 2 * (codec_from(Rotated2).encode(torch.randn(8, 8, 16, 16), seed=0).nbytes + 1)
    assert stored["plain"] - stored["run"] == saved
    assert stored["codec"] == stored["run"]


def test_parametrized_weights_stay_exact() -> None:
    net = layers("residual")
    torch.nn.utils.parametrizations.weight_norm(net.second.conv)
    model = QuantBackwardWrapper(net)
    model(torch.randn(4, 4, 16, 16)).sum().backward()
    stored = [s.reason.partition(":")[0] for s in model.explain().sites.values()
              if s.module == "second.conv" and s.op is None]
    assert "weight" in stored or not stored


def test_settings_per_module_hold() -> None:
    x = torch.randn(4, 4, 16, 16)
    model = QuantBackwardWrapper(layers("residual"), overrides={"*.conv": None})
    with track_saved_memory(model) as report:
        y = model(x)
    assert report.stored_bytes == x.nbytes and y.requires_grad


def test_autocast_inside_of_a_wrapper() -> None:
    x = images()
    for form in FORMS.values():
        net = form()
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = QuantBackwardWrapper(copy.deepcopy(net), seed=0)(x), net(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
        y.float().square().mean().backward()


#: What Dynamo itself does while it traces a custom Function.
_DYNAMO = "ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"


@pytest.fixture
def fresh_graphs() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings(_DYNAMO, "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("form", ["residual", "residual, 2 bits", "sign"])
def test_compiled_networks(form: str, fresh_graphs: Any) -> None:
    net, x = FORMS[form](), images()
    expected = gradients(FORMS[form](), x)
    # Dynamo cannot trace a codec, and ends its graphs there.
    model = torch.compile(net, backend="aot_eager", fullgraph=form != "residual, 2 bits")
    found = gradients(model, x)
    for name, grad in found.items():
        plain = expected[name.removeprefix("_orig_mod.")]
        assert torch.allclose(grad, plain, rtol=1e-4, atol=1e-7), name
    assert not any(
        m.run.is_open for m in net.modules() if isinstance(m, AuxiliaryResidualConv2d))


@pytest.mark.filterwarnings(_DYNAMO)
def test_compiled_signs_take_a_bit(fresh_graphs: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            AuxiliarySignConv2d(4, 4, 3, padding=1), AuxiliarySignConv2d(4, 4, 3), nn.Flatten(),
            AuxiliarySignLinear(784, 3))
    x = torch.randn(4, 4, 16, 16)
    model = torch.compile(net, backend="aot_eager", fullgraph=True)
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = model(x)
    bits = [t.numel() for t in found if t.dtype == torch.uint8]
    assert bits == [4 * 4 * 256 // 8, 4 * 4 * 256 // 8, 4 * 784 // 8] and y.requires_grad
    parameters = {p.data_ptr() for p in net.parameters()}
    assert all(t.dtype == torch.uint8 or t.data_ptr() in parameters for t in found)


@pytest.mark.filterwarnings(_DYNAMO)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity()], ids=str)
def test_compiled_and_wrapped_signs_are_those_of_the_true_input(
        activation: nn.Module, fresh_graphs: Any) -> None:
    """A graph may compute signs again from a rounded activation; rounding must not change them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), activation, AuxiliarySignLinear(64, 8))
    x = torch.randn(256, 64)
    expected = gradients(net, x)["2.weight"]
    model = QuantBackwardWrapper(torch.compile(net, backend="aot_eager"), seed=1)
    # Whole sums of signs times one gradient: a single flipped sign would be seen.
    gradients(model, x)
    found: Any = net[2].weight.grad
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
