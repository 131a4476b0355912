"""Learned tensors in a model: which ones, what they compute, what they live through."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import QuantLinear
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from brevitas_bp import QuantBackwardWrapper, UnknownNameError
from brevitas_bp.core.nested_floor import nested_floor
from brevitas_bp.nn.learned import (
    learn_quantization,
    learned_tensors,
    named_learned_tensors,
    report_integers,
)
from tests.nn.support import X, digits, gradients, learned_mlp, mlp, train_on_digits

ALL = ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_model_computes_with_the_nested_floor() -> None:
    net, plain = learned_mlp(), mlp()
    for parameter in plain.parameters():
        parameter.data = nested_floor(parameter.data, torch.tensor(0.02), None)
    assert torch.equal(net(X), plain(X))


def test_defaults_and_patterns() -> None:
    assert learn_quantization(mlp(), granularity="column", lam=0.0) == ALL
    assert learn_quantization(mlp(), granularity="row", lam=0.0, include="*.weight") == ALL[::2]
    assert learn_quantization(mlp(), granularity="row", lam=0.0, exclude=["0.*"]) == ALL[2:]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert learn_quantization(net, granularity="channel", lam=0.0, include="0.*") == [
        "0.weight", "0.bias"]
    assert learn_quantization(net, granularity="scalar", lam=0.0, include=["1.weight", "3.*"]) == [
        "1.weight", "3.weight", "3.bias"]
    shapes = {name: tuple(t.scale.shape) for name, t in named_learned_tensors(net).items()}
    assert shapes == {
        "0.weight": (1, 3, 1, 1), "0.bias": (), "1.weight": (), "3.weight": (), "3.bias": ()}


def test_parameters_stay_the_same_objects() -> None:
    net = mlp()
    before = {id(parameter) for parameter in net.parameters()}
    learn_quantization(net, granularity="row", lam=0.0)
    assert before <= {id(parameter) for parameter in net.parameters()}
    assert before == {id(tensor.parameter) for tensor in learned_tensors("here", net)}


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_tied_weights_stay_tied_and_have_two_scales() -> None:
    net = Tied()
    learn_quantization(net, granularity="row", lam=1.0)
    named = named_learned_tensors(net)
    assert list(named) == ["first.weight", "second.weight"]
    assert named["first.weight"].parameter is named["second.weight"].parameter
    net(torch.ones(2, 4)).sum().backward()
    assert len(list(net.parameters())) == 3


def brevitas_layer() -> nn.Module:
    return QuantLinear(4, 4, bias=False)


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "lam": (mlp, {"lam": -1.0}, ValueError, "learn_quantization: lam must be >= 0"),
    "scale": (mlp, {"scale_init": 0.0}, ValueError, "scale_init must be"),
    "granularity": (mlp, {"granularity": "rows"}, ValueError, "did you mean 'row'"),
    "channel": (mlp, {"granularity": "channel"}, ValueError, r"'0.weight': a tensor \[6, 8\] cannot"),
    "conv": (lambda: nn.Conv1d(3, 4, 3), {}, ValueError, "it can have scalar or channel"),
    "pattern": (mlp, {"include": "0.wight"}, UnknownNameError, "did you mean '0.weight'"),
    "exclusion": (mlp, {"exclude": "nothing.*"}, UnknownNameError, "matches no tensor"),
    "nothing left": (mlp, {"exclude": "*"}, ValueError, "with none; pass include="),
    "no layers": (nn.ReLU, {}, ValueError, "got ReLU with none"),
    "twice": (learned_mlp, {}, ValueError, "parametrized already, by LearnedFloor"),
    "another": (normed, {}, ValueError, "parametrized already, by _SpectralNorm"),
    "brevitas": (brevitas_layer, {}, ValueError, "quantized by Brevitas already"),
    "empty": (lambda: nn.Bilinear(3, 3, 1), {"include": "bias", "granularity": "channels"},
              ValueError, "did you mean 'channel'")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_unchanged(case: str) -> None:
    make, options, error, message = REFUSED[case]
    net = make()
    before = list(net.state_dict())
    with pytest.raises(error, match=message):
        learn_quantization(net, **{"granularity": "row", "lam": 1e-10, **options})
    assert list(net.state_dict()) == before


def test_recurrent_layers_compute_with_their_quantized_weights() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 4)
    plain = copy.deepcopy(lstm)
    learn_quantization(lstm, granularity="column", lam=1e-3, include="*", scale_init=0.1)
    for parameter in plain.parameters():
        parameter.data = nested_floor(parameter.data, torch.tensor(0.1), None)
    assert torch.equal(lstm(X)[0], plain(X)[0])
    lstm(X)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())


def test_other_parametrizations_on_top() -> None:
    net = learned_mlp()
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="cannot have other parametrizations, got LearnedFloor, Ident"):
        report_integers(net)


def test_removing_leaves_the_quantized_values() -> None:
    net = learned_mlp()
    expected = net(X)
    for layer in (net[0], net[2]):
        for name in ("weight", "bias"):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    assert torch.equal(net(X), expected) and list(net.state_dict()) == ALL


def test_state_dict_and_copies() -> None:
    net, other = learned_mlp(), learned_mlp(scale_init=0.5)
    other.load_state_dict(net.state_dict())
    for same in (other, copy.deepcopy(net)):
        assert torch.equal(same(X), net(X))
        assert not {id(p) for p in same.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    net = learned_mlp().to(dtype)
    found = gradients(net, net, X.to(dtype))
    assert len(found) == 8
    assert all(x.dtype == dtype and bool(x.isfinite().all()) for x in found.values())


def test_autocast() -> None:
    net = learned_mlp()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, net)
    assert {x.dtype for x in found.values()} == {torch.float32}


@pytest.mark.parametrize("wrap_inside", [False, True])
def test_exact_gradients_in_the_wrapper(wrap_inside: bool) -> None:
    net = learned_mlp()
    plain = gradients(net, net)
    model: nn.Module = (
        nn.Sequential(QuantBackwardWrapper(net, policy="exact")) if wrap_inside
        else QuantBackwardWrapper(net, policy="exact"))
    ours = gradients(model, net)
    assert len(plain) == 8
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_default_policy_keeps_quantized_weights_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    learn_quantization(net, granularity="row", lam=1e-3, scale_init=0.02)
    x = torch.randn(64, 64, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None
    exact, x.grad = x.grad, None
    model = QuantBackwardWrapper(net, seed=0)
    model(x).square().sum().backward()
    # The input's gradient is a product of weights and masks.
    assert torch.equal(x.grad, exact)  # pyright: ignore
    stored = {
        (site.op, site.stored) for site in model.explain().sites.values() if "weight" in site.reason
        and "gradient of the weight" not in site.reason}
    assert stored == {("linear", "exact")}


def test_learning_inside_of_a_wrapper() -> None:
    net = mlp()
    model = QuantBackwardWrapper(net)
    assert learn_quantization(model, granularity="row", lam=0.0) == ALL
    assert list(named_learned_tensors(model)) == ALL == list(named_learned_tensors(net))
    layer = nn.Linear(3, 2)
    assert learn_quantization(QuantBackwardWrapper(layer), granularity="row", lam=0.0) == [
        "weight", "bias"]
    assert type(layer).__name__ == "ParametrizedLinear"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    net = learned_mlp()
    plain = gradients(net, net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert list(named_learned_tensors(compiled)) == [f"_orig_mod.{name}" for name in ALL]  # pyright: ignore
    ours = gradients(compiled, net)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_lam_zero_changes_no_scale() -> None:
    net = train_on_digits(0.0, epochs=1)
    for tensor in learned_tensors("here", net):
        assert torch.equal(tensor.scale, torch.full_like(tensor.scale, 100 * 2**-23))


def test_distinct_integers_fall_with_lam() -> None:
    counts, scores = [], []
    x, labels = digits()
    for lam in (0.0, 1e-12, 1e-11, 1e-10, 1e-9):
        net = train_on_digits(lam)
        counts.append(report_integers(net).pooled.distinct)
        scores.append(float((net(x).argmax(1) == labels).float().mean()))
    # Measured: 2300, 749, 272, 91, 43.
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5
    assert counts[0] > 2000 and counts[-1] < 60
    assert min(scores[:3]) > 0.9
