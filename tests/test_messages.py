"""Settings that would have no effect are refused, and messages say what to do."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from brevitas_bp import (
    Codec,
    OpAware,
    QuantBackwardWrapper,
    SavedTensor,
    codec_from,
    quant,
    track_saved_memory,
)
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.allocate.plan import parse_bytes
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.errors import UnknownNameError, UnsupportedQuantizerError, UnsupportedTensorError
from brevitas_bp.plots import plot_gradient_error
from brevitas_bp.probes import clamp_keeps_borders, refuse_old_torch
from brevitas_bp.quant import ActQuantSolver, PerBucketL2, StochasticRounding

Nearest2 = quant.ShiftedUint2DynamicActPerBucketFloat
Stochastic2 = quant.ShiftedUint2DynamicActPerBucketFloatStochastic


def test_fragments_right_of_the_solver() -> None:
    class Late(ActQuantSolver, StochasticRounding, PerBucketL2):
        bit_width = 4

    with pytest.raises(
            UnsupportedQuantizerError, match=r"class Late\(StochasticRounding, PerBucketL2, ActQuantS"):
        codec_from(Late)


def test_no_scale() -> None:
    class Scaleless(StochasticRounding, ActQuantSolver):
        bit_width = 4

    with pytest.raises(UnsupportedQuantizerError, match=r"Scaleless .* PerBucketMinMax"):
        codec_from(Scaleless)


@pytest.mark.parametrize(("given", "meant"), [
    ("override", "overrides"), ("polcy", "policy"), ("storge", "storage"), ("plans", "plan")])
def test_misspelt_arguments_of_the_wrapper(given: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{given!r}; did you mean {meant!r}"):
        QuantBackwardWrapper(nn.Linear(4, 4), **{given: None})


def test_a_policy_that_is_a_class() -> None:
    with pytest.raises(TypeError, match=r"policy=OpAware\(\)"):
        QuantBackwardWrapper(nn.Linear(4, 4), policy=OpAware)  # pyright: ignore[reportArgumentType]


def test_a_policy_of_which_nobody_asks_what_it_overrides() -> None:
    with pytest.raises(TypeError, match="override decide"):
        class Mine(OpAware):  # pyright: ignore[reportUnusedClass]
            def __call__(self, saved: SavedTensor) -> Codec | None:
                return None


def test_a_policy_that_asks_the_default_one() -> None:
    default = OpAware()
    model = QuantBackwardWrapper(nn.SiLU(), policy=lambda saved: default(saved))
    with pytest.warns(UserWarning, match="override decide"):
        model(torch.randn(64, 64, requires_grad=True))


def test_a_class_derived_from_the_default_one_keeps_its_rewrites() -> None:
    class Mine(OpAware):
        def decide(self, saved: SavedTensor) -> Any:
            decision = super().decide(saved)
            return decision._replace(codec=None) if saved.op == "linear" else decision

    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.SiLU()), policy=Mine())
    model(torch.randn(64, 64, requires_grad=True))
    assert [(s.op, s.stored) for s in model.explain().sites.values()] == [
        ("linear", "exact"), ("silu", "4-bit dithered")]


def test_patterns_behind_one_that_matches_all_they_do() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'1\.0' in overrides would do nothing.*'1' stands before"):
        QuantBackwardWrapper(net, overrides={"1": None, "1.0": 4})
    model = QuantBackwardWrapper(net, overrides={"1.0": 4, "1": None, "*": 8})
    assert "Sequential" in repr(model)


@pytest.mark.parametrize("config", [Nearest2, Stochastic2])
def test_configs_are_classes_for_other_tools_too(config: Any) -> None:
    assert not hasattr(config, "nothing") and hasattr(config, "bit_width")
    assert getattr(config, "nothing", 3) == 3


#: A setting of docs/quantizers.md -> a value that has an effect, and what it changes.
SETTINGS: dict[str, Any] = {
    "bit_width": 4, "bucket_size": 64, "metadata_dtype": torch.bfloat16,
    "float_to_int_impl_type": "round", "quantize_zero_point": True, "average_size": 2}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_takes_effect(setting: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before, after = codec_from(Stochastic2), codec_from(Stochastic2, **{setting: SETTINGS[setting]})
    stored = [codec.encode(x, seed=1) for codec in (before, after)]
    assert any(
        a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b)
        for a, b in zip(*(packed.tensors for packed in stored)))


def test_rounding_by_name() -> None:
    assert codec_from(Stochastic2, float_to_int_impl_type="round").name == "2-bit nearest"
    assert codec_from(Nearest2, float_to_int_impl_type="stochastic_round").name == "2-bit stochastic"
    for config in (Nearest2, Stochastic2):
        with pytest.raises(ValueError, match=r"must be one of .*'stochastic_round', got 'nonsense'"):
            codec_from(config, float_to_int_impl_type="nonsense")


def test_a_stock_quantizer_with_noise_can_lose_it_again() -> None:
    class Noisy(StochasticRounding, Int8ActPerTensorFloat):
        pass

    noisy, still = (
        codec_from(Noisy, **settings) for settings in ({}, {"float_to_int_impl_type": "round"}))
    x = torch.randn(100)
    assert not torch.equal(noisy.encode(x, seed=1).decode(), noisy.encode(x, seed=2).decode())
    assert torch.equal(still.encode(x, seed=1).decode(), still.encode(x, seed=2).decode())


@pytest.mark.parametrize("x", [
    torch.arange(64), torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.complex64)])
def test_codecs_refuse_what_they_cannot_restore(x: Tensor) -> None:
    codecs = [
        codec_from(Stochastic2), codec_from(Int8ActPerTensorFloat),
        codec_from(quant.ShiftedUint2Avg2DynamicActPerBucketFloat),
        ModuleCodec(codec_from(Stochastic2).quantizer)]  # pyright: ignore[reportAttributeAccessIssue]
    for codec in codecs:
        with pytest.raises(UnsupportedTensorError, match=rf"stores tensors of float16.*{x.dtype}"):
            codec.encode(x, seed=0)


def test_a_policy_that_encodes_indices_is_told_in_the_forward_pass() -> None:
    codec = codec_from(Stochastic2)
    model = QuantBackwardWrapper(nn.Embedding(10, 64), policy=lambda saved: codec)
    with pytest.raises(UnsupportedTensorError, match=r"int64.*saved by embedding in"):
        model(torch.arange(10).repeat(10))


@pytest.mark.parametrize("version", ["1.13.1", "2.4.0+cu121", "2.9.1"])
def test_an_old_torch_is_refused_in_a_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs torch 2\.10 or newer, and {re.escape(version)} is"):
        refuse_old_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.15.0a0+git123", "3.0"])
def test_newer_ones_are_not(version: str) -> None:
    refuse_old_torch(version)


def test_clamp_is_tried_out_whatever_the_caller_has_set() -> None:
    clamp_keeps_borders.cache_clear()
    with torch.no_grad(), torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(
            lambda x: None, lambda x: x):
        found = clamp_keeps_borders()
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    x.clamp(0.0, 1.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [float(bool(found))] * 2


@pytest.mark.parametrize(("budget", "told"), [
    (0.1, "'10%'"), ("0.1", "'10%'"), ("200%", "at most '100%'"), ("2X", "such as 400_000_000")])
def test_budgets_that_are_none(budget: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_bytes(budget, 1000)


def measured(**options: Any) -> Any:
    torch.manual_seed(0)
    model = QuantBackwardWrapper(nn.Linear(64, 64), seed=0)
    x = torch.linspace(-1, 1, 4096).view(64, 64)
    return measure_gradient_error(model, lambda m: m(x).square().sum(), draws=2, **options)


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_packages_that_are_not_there(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = measured()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "rich":
        assert str(measured(progress=True)) == str(error)
    else:
        with pytest.raises(ImportError, match=r"pip install 'brevitas-bp\[plots\]'"):
            plot_gradient_error(error)


def test_tables_by_something_else() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'module'"):
        measured().table(by="modul")


def report_of(model: nn.Module, run: Callable[[], Any]) -> str:
    with track_saved_memory(model) as report:
        kept = run()
    del kept
    return str(report).splitlines()[-1]


def test_an_empty_report_says_why() -> None:
    model, x = QuantBackwardWrapper(nn.Linear(64, 64)), torch.randn(64, 64)
    output = model(x)
    with torch.no_grad():
        assert "gradients are disabled" in report_of(model, lambda: model(x))
    assert "the model did not run" in report_of(model, lambda: output.sum().backward())
    assert "the model did not run" in report_of(nn.Linear(4, 4), lambda: model(x))
    assert "keep the output" in report_of(model, lambda: model(x).sum().item())
    frozen = QuantBackwardWrapper(nn.Linear(64, 64).requires_grad_(False))
    assert "nothing that ran needs a gradient" in report_of(frozen, lambda: frozen(x))
    assert "nothing is saved" not in report_of(model, lambda: model(x))


def test_a_row_whose_exact_form_is_that_of_another_is_shared() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (64,)) + F.linear(x, x.detach() * torch.ones((), requires_grad=True))

    model, x = QuantBackwardWrapper(Twice()), torch.randn(64, 64, requires_grad=True)
    with track_saved_memory(model) as report:
        output = model(x)
    rows = str(report).splitlines()[2:4]
    assert output.requires_grad and sorted(row.split()[-1] == "shared" for row in rows) == [False, True]


def test_the_reason_of_a_tensor_that_is_too_small() -> None:
    model = QuantBackwardWrapper(nn.SiLU())
    model(torch.randn(4, 4, requires_grad=True))
    (site,) = model.explain().sites.values()
    assert (site.stored, site.reason) == ("exact", "few elements: a derivative would not be smaller")


def test_a_forward_that_is_a_generator() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Any:
            for _ in range(2):
                x = self.layer(x)
                yield x

    model = QuantBackwardWrapper(Steps())
    with pytest.warns(UserWarning, match="wrap the modules that it calls"):
        outputs = list(model(torch.randn(4, 64)))
    assert len(outputs) == 2


class Inner(nn.Module):
    """Computes a gradient in its forward, as test-time training does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        step = torch.func.grad(lambda w: (x @ w).square().sum())(self.layer.weight)
        return self.layer(x) @ step


@pytest.mark.parametrize("policy", ["op_aware", "exact"])
def test_derivatives_inside_of_the_forward(policy: str) -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), Inner()), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"'1' \(Inner\) takes derivatives with torch.func"):
        QuantBackwardWrapper(net, policy=policy)(x)
    with pytest.raises(RuntimeError, match=r"'1' \(Inner\)"), track_saved_memory(net):
        net(x)
    net[0] = QuantBackwardWrapper(nn.Linear(8, 8), policy=policy)
    assert net(x).requires_grad


class DrawsByItself(nn.Module):
    def __init__(self) -> None:  # injectors read its arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.rand_like(x)).floor()


class RoundsToHalves(nn.Module):
    def __init__(self) -> None:  # injectors read its arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).round() / 2


class DrawsAsAsked(nn.Module):
    def __init__(self) -> None:  # injectors read its arguments
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.ops.brevitas_bp.noise_like(x)).floor()


@pytest.mark.parametrize("base", [Nearest2, Int8ActPerTensorFloat])
def test_rounding_of_ones_own(base: Any) -> None:
    state = torch.get_rng_state()
    for part, told in ((DrawsByItself, "noise_like"), (RoundsToHalves, "must give integers")):
        with pytest.raises(UnsupportedQuantizerError, match=f"{part.__name__} .*{told}"):
            codec_from(base, float_to_int_impl=part)
    assert torch.equal(torch.get_rng_state(), state)
    with FakeTensorMode():
        assert codec_from(base, float_to_int_impl=DrawsAsAsked).name
    packed = codec_from(base, float_to_int_impl=DrawsAsAsked).encode(torch.randn(1000), seed=1)
    assert packed.nbytes < 4000
