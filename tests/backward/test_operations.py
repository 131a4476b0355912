"""The registry, rewriting among other hooks, ``explain``, and exact operations. H3, H16 to H18."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward import OpAware, operations, register_op
from brevitas_bp.backward.operations import elementwise, exact, linear, normalization
from brevitas_bp.backward.registry import rule_of
from brevitas_bp.errors import SecondDerivativeError, UnknownNameError
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import Apply, Square, assert_same, run, wrapped_run


def sites(model: QuantBackwardWrapper) -> list[tuple[str, str]]:
    return [(site.op, site.stored) for site in model.explain().sites.values()]


def own_swish(x: Tensor) -> Tensor:
    """A custom function that can tell whether modes are active."""
    if has_torch_function_unary(x):
        return handle_torch_function(own_swish, (x,), x)
    return x * torch.sigmoid(x)


class SquareLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)  # pyright: ignore[reportReturnType]


def test_unknown_operations_are_exact_and_named_once() -> None:
    module = Apply(lambda x: torch.logaddexp2(own_swish(x), x).cummax(0)[0])
    x = torch.randn(64, 64)
    assert_same(wrapped_run(module, x).grads, run(module, x).grads)
    model = QuantBackwardWrapper(module)
    with track_saved_memory(model) as report:
        output = model(x.requires_grad_())
    assert sorted(report.unknown_operations) == ["cummax", "logaddexp2", "own_swish"][:3]
    (note,) = [line for line in str(report).splitlines() if "because they have no rule" in line]
    assert note.count("own_swish") == 1
    assert "register_op" in note
    assert "because they have no rule" in str(model.explain())
    assert output.requires_grad


def test_function_of_ones_own_is_registered_in_a_line(registry: None) -> None:
    register_op(own_swish, elementwise())
    x = torch.randn(64, 256)
    module = Apply(own_swish)
    model = QuantBackwardWrapper(module, policy=OpAware(multiplier_bits=8), seed=0)
    ours, plain = run(model, x, copied=False), run(module, x)
    assert sites(model) == [("own_swish", "8-bit dithered")]
    assert torch.equal(ours.output, plain.output)
    # One of 255 steps of derivatives between -0.1 and 1.1.
    assert (ours.grads["input 0"] - plain.grads["input 0"]).abs().max() < 1.3 / 255


def test_module_with_a_custom_function_is_registered_by_its_class(registry: None) -> None:
    model = QuantBackwardWrapper(nn.Sequential(SquareLayer()))
    x = torch.randn(64, 64, requires_grad=True)
    model(x)
    assert sites(model) == [("custom function", "exact")]
    register_op(SquareLayer, linear())
    model(x)
    assert sites(model) == [("custom function", "4-bit dithered")]


def test_classes_of_a_cell_that_runs_again_are_freed(registry: None) -> None:
    gone = []
    for registered in (False, True):
        class Layer(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Square.apply(x)  # pyright: ignore[reportReturnType]

        if registered:
            register_op(Layer, linear())
        model = QuantBackwardWrapper(nn.Sequential(Layer()))
        model(torch.randn(64, 64, requires_grad=True)).sum().backward()
        gone.append(weakref.ref(Layer))
        del model, Layer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 2


def test_registering_replaces_a_rule(registry: None) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    model = QuantBackwardWrapper(Apply(torch.tanh))
    model(x)
    assert sites(model) == [("tanh", "4-bit dithered")]
    register_op("tanh", exact("because"))
    model(x)
    assert sites(model) == [("tanh", "exact")]
    assert "because" in str(model.explain())


def test_wrong_registrations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"rule must be an OpRule.*linear\(\)"):
        register_op("mul", linear)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="operation must be a function, a name or a module class"):
        register_op(3, linear())  # pyright: ignore[reportArgumentType]


def test_function_of_the_same_name_is_not_torchs() -> None:
    def relu(x: Tensor) -> Tensor:
        return x

    assert rule_of(relu) is None
    assert rule_of(F.relu) is rule_of(torch.relu) is rule_of(Tensor.relu_)
    assert rule_of(nn.SyncBatchNorm) is not None
    assert rule_of(nn.Linear) is None


def test_names_cover_all_forms_of_a_function() -> None:
    forms = [
        torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, torch.multiply,
        torch.ops.aten.mul]
    assert {id(rule_of(form)) for form in forms} == {id(rule_of(torch.mul))}


# explain


def test_explanation_is_of_the_last_forward() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Softmax(1)))
    with pytest.raises(RuntimeError, match="run one forward pass first"):
        model.explain()
    model(torch.randn(32, 64))
    found = [(s.module, s.op, s.stored, s.tensors) for s in model.explain().sites.values()]
    assert found == [
        ("0", "linear", "2-bit rotated", 1), ("1", "relu", "relu mask", 1),
        ("2", "softmax", "4-bit companded", 1)]
    assert "gradient of the weight is linear in it" in str(model.explain())


def test_explanation_holds_no_tensor() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.SiLU()))
    x = torch.randn(32, 64)
    alive = weakref.ref(model(x))
    gc.collect()
    assert alive() is None
    assert model.explain().sites


def test_what_is_too_small_says_so() -> None:
    model = QuantBackwardWrapper(nn.Linear(2, 4))
    model(torch.randn(1, 2))
    (site,) = model.explain().sites.values()
    assert (site.stored, site.reason) == ("exact", "encoding would not make it smaller")


def test_policies_without_reasons_are_explained_by_name() -> None:
    model = QuantBackwardWrapper(nn.Linear(64, 64), policy="all")
    model(torch.randn(32, 64))
    (site,) = model.explain().sites.values()
    assert site.reason == "policy quantize_all"


# Rewriting among other hooks, rewriting twice, and cases without anything to rewrite.


class Checkpointed(nn.Module):
    """SiLU, GELU and attention, recomputed in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 4)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        x = F.gelu(F.silu(self.first(x))).view(8, 4, 8, 64)
        return F.scaled_dot_product_attention(x, x, x).view(8, 32, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.body, x, use_reentrant=self.reentrant)
        assert isinstance(y, Tensor)
        return self.last(F.silu(y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_operations_are_themselves(reentrant: bool) -> None:
    torch.manual_seed(0)
    module, x = Checkpointed(reentrant), torch.randn(8, 32, 64)
    ours = wrapped_run(module, x, policy=OpAware(multiplier_bits=8))
    plain = run(module, x)
    assert torch.equal(ours.output, plain.output)
    assert ours.grads.keys() == plain.grads.keys()
    assert all(grad.isfinite().all() for grad in ours.grads.values())
    # The last bias is not rounded. The first layer only sees one SiLU rounded to 8 bits.
    assert torch.equal(ours.grads["last.bias"], plain.grads["last.bias"])
    change = (ours.grads["first.weight"] - plain.grads["first.weight"]).norm()
    assert change < 0.05 * plain.grads["first.weight"].norm()


@pytest.mark.parametrize("function", [
    F.silu, F.glu, F.softsign, lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])],
    ids=["silu", "glu", "softsign", "attention"])
def test_second_derivatives_are_refused_not_wrong(function: Any) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    y = QuantBackwardWrapper(Apply(function))(x)
    with pytest.raises(SecondDerivativeError, match=r"create_graph=True.*policy='exact'"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_second_derivatives_of_masked_operations_are_right() -> None:
    # These functions are piecewise linear: their second derivative is zero, so a mask is complete.
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    for function in (F.relu, F.leaky_relu, F.hardtanh, torch.abs):
        def penalty(module: nn.Module, f: Any = function) -> Tensor:
            y = module(x * 1)
            (g,) = torch.autograd.grad(y.sum() + (x**2).sum() / 2, x, create_graph=True)
            return torch.autograd.grad(g.square().sum(), x)[0]

        assert torch.equal(penalty(QuantBackwardWrapper(Apply(function))), penalty(Apply(function)))


def test_retain_graph_gives_the_same_bits_twice() -> None:
    x = torch.randn(4, 4, 16, 16, requires_grad=True)
    model = QuantBackwardWrapper(Apply(lambda x: F.scaled_dot_product_attention(
        F.silu(x), x, F.dropout(x, 0.5), dropout_p=0.2)))
    y = model(x).sum()
    torch.rand(100)
    first, = torch.autograd.grad(y, x, retain_graph=True)
    state = torch.get_rng_state()
    second, = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_is_rewritten_where_nothing_is_saved() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.SiLU(), nn.Linear(8, 8, bias=False)))
    x = torch.randn(64, 8)
    with torch.no_grad():
        assert model(x).grad_fn is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model(x).grad_fn is None
    with torch.inference_mode():
        assert model(x).is_inference()


def test_integers_subclasses_and_complex_numbers_pass() -> None:
    model = QuantBackwardWrapper(Apply(lambda x: torch.tanh(torch.complex(x, x)).abs()))
    x = torch.randn(64, 64)
    assert_same(
        run(model, x, copied=False).grads,
        run(Apply(lambda x: torch.tanh(torch.complex(x, x)).abs()), x).grads)


def test_in_place_on_a_view_keeps_autograds_own_rules() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1
        F.silu(y[:, :32], inplace=True)
        return y.sigmoid()

    x = torch.randn(64, 64)
    ours, plain = (
        wrapped_run(Apply(function), x, policy=OpAware(multiplier_bits=8)), run(Apply(function), x))
    assert torch.equal(ours.output, plain.output)
    assert (ours.grads["input 0"] - plain.grads["input 0"]).abs().max() < 2 / 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, "gelu", batch_first=True, norm_first=True)
    x = torch.randn(8, 32, 64)
    eight = ShiftedUint8DynamicActPerBucketFloatStochastic
    with torch.autocast("cpu", dtype=dtype):
        plain = run(layer, x)
        model = QuantBackwardWrapper(layer, eight, seed=0)
        layer.zero_grad()
        ours = run(model, x, copied=False)
    assert torch.equal(ours.output, plain.output)
    # The input of linear1, seen as [256, 64], has the shape of its weight. It is quantized all the same.
    stored = {(s.module, s.op): s.stored for s in model.explain().sites.values()}
    assert stored["linear1", "linear"] == stored["linear2", "linear"] == "8-bit stochastic"
    for name, grad in plain.grads.items():
        # One of 255 steps of a range of six deviations, and the 8 bits of autocast itself.
        change = (ours.grads[name] - grad).float().norm() / grad.float().norm()
        assert change < 0.05, name


# Settings


def test_deterministic_configs_round_derivatives_to_nearest() -> None:
    model = QuantBackwardWrapper(
        Apply(torch.tanh), ShiftedUint2DynamicActPerBucketFloat, bucket_size=128)
    model(torch.randn(64, 64, requires_grad=True))
    (site,) = model.explain().sites.values()
    assert site.stored == "4-bit nearest"
    # 4096 codes of 4 bits, and two float32 per bucket of 128.
    assert site.stored_bytes == 4096 // 2 + 32 * 8


def test_wide_configs_are_not_narrowed() -> None:
    model = QuantBackwardWrapper(
        Apply(torch.tanh), ShiftedUint8DynamicActPerBucketFloatStochastic)
    model(torch.randn(64, 64, requires_grad=True))
    assert sites(model) == [("tanh", "8-bit stochastic")]


def test_norms_may_have_bits_of_their_own() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    model = QuantBackwardWrapper(module, policy=OpAware(norm_bits=4))
    model(torch.randn(64, 64))
    assert sites(model)[:2] == [
        ("linear", "2-bit rotated"), ("layer_norm", "4-bit rotated, as output")]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q * 2, k * 2, v * 2)


@pytest.mark.parametrize(("options", "query"), [
    ({}, "8-bit dithered"),
    ({"act_quant": ShiftedUint2DynamicActPerBucketFloatStochastic}, "8-bit stochastic"),
    ({"policy": OpAware(attention_bits=4)}, "4-bit dithered"),
    ({"policy": OpAware(attention_bits=None)}, "exact"),
    ({"policy": OpAware(attention_quant=ShiftedUint8DynamicActPerBucketFloatStochastic)},
     "8-bit stochastic"),
    ({"act_quant": Int8ActPerTensorFloat}, "exact"),
    ({"plan": {"*:*": 1}}, "8-bit dithered")])
def test_query_and_key_have_bits_of_their_own(options: dict[str, Any], query: str) -> None:
    q, k, v = (torch.randn(2, 4, 64, 32, requires_grad=True) for _ in range(3))
    model = QuantBackwardWrapper(Apply(attention), **options)
    with torch.no_grad():
        expected = attention(q, k, v)
    assert torch.equal(model(q, k, v), expected)
    # Query and key are one line of the table, and the value is the next.
    assert sites(model)[0] == ("scaled_dot_product_attention", query)


def test_query_and_key_may_be_quantized() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 4, 64, 32) for _ in range(3))
    module = Apply(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    eight = ShiftedUint8DynamicActPerBucketFloatStochastic
    policy = OpAware(attention_quant=eight)
    plain = run(module, q, k, v).grads
    ours = wrapped_run(module, q, k, v, act_quant=eight, policy=policy).grads
    naive = wrapped_run(module, q, k, v, act_quant=eight, policy="all").grads
    for name, grad in plain.items():
        error, rival = ((g[name] - grad).norm() / grad.norm() for g in (ours, naive))
        # Attention runs again in backward, so weights and values agree. In the rival, the saved
        # log-sum-exp does not agree with its rounded query and key.
        assert error < 0.02
        assert error < rival


@pytest.mark.parametrize(("settings", "message"), [
    ({"multiplier_bits": 0}, "bit_width must be"), ({"norm_bits": 9}, "bit_width must be"),
    ({"few_bit": 0}, "bit_width must be"), ({"attention": "replays"}, "did you mean 'replay'"),
    ({"attention": "exact", "attention_quant": ShiftedUint8DynamicActPerBucketFloatStochastic},
     "would do nothing"), ({"multiplier_quant": 4}, "expected a Brevitas config class")])
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UnknownNameError, TypeError), match=message):
        OpAware(**settings)


def test_attention_may_be_kept() -> None:
    q = torch.randn(2, 2, 16, 16)
    module = Apply(lambda q: F.scaled_dot_product_attention(q, q * 2, q * 3))
    grads = wrapped_run(module, q, policy=OpAware(attention="exact")).grads
    assert_same(grads, run(module, q).grads)


def test_normalization_rule_without_arguments_goes_by_dimensions(registry: None) -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)  # pyright: ignore[reportReturnType]

    register_op(Norm, normalization())
    model = QuantBackwardWrapper(nn.Sequential(Norm()))
    model(torch.randn(64, 64, requires_grad=True))
    assert sites(model) == [("custom function", "2-bit rotated")]


# Arguments that look alike


@pytest.mark.parametrize("function", [
    lambda x: F.silu(x * 1, inplace=1),  # pyright: ignore[reportArgumentType]
    lambda x: F.elu(x * 1, 1.0, 1),  # pyright: ignore[reportArgumentType]
    nn.Mish(1),  # pyright: ignore[reportArgumentType]
    lambda x: F.softplus(x, True)])
@pytest.mark.parametrize("tracked", [False, True])
def test_truth_of_inplace_is_what_counts(function: Any, tracked: bool) -> None:
    module, x = Apply(lambda x: function(x * 1)), torch.randn(64, 64)
    model = QuantBackwardWrapper(module, policy=OpAware(multiplier_bits=8), seed=0)
    if tracked:
        with track_saved_memory(model):
            ours = run(model, x, copied=False)
    else:
        ours = run(model, x, copied=False)
    plain = run(module, x)
    assert torch.equal(ours.output, plain.output)
    assert (ours.grads["input 0"] - plain.grads["input 0"]).abs().max() < 2.5 / 255


@pytest.mark.parametrize("function", [
    lambda a, b: a / b, lambda a, b: torch.div(other=b, input=a), lambda a, b: a.div(b)])
def test_divisor_is_exact_even_as_a_view_beside_the_dividend(function: Any) -> None:
    h = torch.rand(64, 128) + 0.5
    module = Apply(lambda h: function(*(h * 1).chunk(2, dim=-1)))
    model = QuantBackwardWrapper(module, seed=0)
    ours, plain = run(model, h, copied=False).grads["input 0"], run(module, h).grads["input 0"]
    # The gradient of the dividend only needs the divisor.
    assert torch.equal(ours[:, :64], plain[:, :64])
    assert not torch.equal(ours[:, 64:], plain[:, 64:])


def test_tensor_divided_by_itself_is_exact() -> None:
    x = torch.rand(64, 64) + 0.5
    module = Apply(lambda x: x / x)
    assert_same(wrapped_run(module, x).grads, run(module, x).grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (64,), (255,)])
def test_small_activations_take_no_more_than_autograd(
        dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = QuantBackwardWrapper(nn.SiLU())
    with track_saved_memory(model) as report:
        output = model(torch.randn(shape, dtype=dtype, requires_grad=True))
    assert output.requires_grad
    assert report.stored_bytes <= report.exact_bytes


def test_expanded_activations_take_no_more_than_autograd() -> None:
    model = QuantBackwardWrapper(Apply(lambda x: F.silu(x.expand(4096, 64))))
    with track_saved_memory(model) as report:
        output = model(torch.randn(64, requires_grad=True))
    assert output.requires_grad
    assert report.stored_bytes <= report.exact_bytes == 256


def test_attention_under_autocast_keeps_what_autocast_makes() -> None:
    model = QuantBackwardWrapper(Apply(lambda q: F.scaled_dot_product_attention(q, q * 2, q * 3)))
    q = torch.randn(2, 2, 64, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), track_saved_memory(model) as report:
        output = model(q)
    plain = Apply(lambda q: F.scaled_dot_product_attention(q, q * 2, q * 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(output, plain(q))
    # Buckets of a row of 32: query and key at 8 bits, the value at 2 bits.
    assert report.stored_bytes == q.numel() // 32 * (32 * (8 + 8 + 2) // 8 + 3 * 2 * 4)
    output.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("function", [
    lambda x: F.elu(x * 1, inplace=True), lambda x: (x * 1).tanh_(), lambda x: (x * 1).sigmoid_(),
    lambda x: F.silu(x * 1, inplace=True), lambda x: F.selu(x * 1, inplace=True), torch.tanh, F.silu])
def test_report_of_rewritten_operations_has_the_exact_bytes_of_plain_autograd(function: Any) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    module = Apply(lambda x, w: F.linear(function(x), w), weight)
    x = torch.randn(64, 64, requires_grad=True)
    found = []
    for model in (module, QuantBackwardWrapper(module)):
        with track_saved_memory(model) as report:
            output = model(x)
        found.append(report.exact_bytes)
        assert output.requires_grad
        del output
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_pass() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.SiLU())
    x, tangent = torch.randn(64, 64), torch.randn(64, 64)
    found = []
    for model in (module, QuantBackwardWrapper(module)):
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
            found.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
    assert torch.equal(*found)


def test_summand_of_a_product_is_no_factor() -> None:
    bias = nn.Parameter(torch.randn(64))
    model = QuantBackwardWrapper(Apply(lambda a, b, bias: torch.addmm(bias, a, b), bias))
    model(*(torch.randn(64, 64, requires_grad=True) for _ in range(2)))
    assert sites(model) == [("addmm", "4-bit dithered")]


def test_composite_is_for_python_functions(registry: None) -> None:
    register_op("matmul", operations.composite())
    model = QuantBackwardWrapper(Apply(lambda x: x @ x))
    with pytest.raises(ValueError, match="matmul was registered as composite"):
        model(torch.randn(64, 64, requires_grad=True))


def test_functions_of_two_tensors_are_not_elementwise_in_one(registry: None) -> None:
    register_op("xlogy", elementwise())
    module = Apply(torch.xlogy)
    a, b = torch.rand(64, 64) + 0.5, torch.rand(64, 64) + 0.5
    assert_same(wrapped_run(module, a, b).grads, run(module, a, b).grads)


def test_wider_codecs_go_with_their_wrapper() -> None:
    model = QuantBackwardWrapper(nn.Tanh())
    model(torch.randn(64, 64, requires_grad=True))
    codec = weakref.ref(model._codec)
    del model
    gc.collect()
    assert codec() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_of_a_norm_is_not_mistaken_for_its_bias(dtype: torch.dtype) -> None:
    # The bias is saved before the input and the weight after it. All three have the same size.
    torch.manual_seed(0)
    leaves = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    module = Apply(lambda x, w, b: F.layer_norm(x * 1 + 10, (64, 64), w.tanh(), b * 1))
    upstream = torch.randn(64, 64)
    grads: list[tuple[Tensor, ...]] = []
    eight = ShiftedUint8DynamicActPerBucketFloatStochastic
    for model in (module, QuantBackwardWrapper(module, eight, policy=OpAware(norm_bits=8))):
        # Autocast casts all three, so none has the memory of an argument.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(*(x.to(dtype) for x in leaves))
        grads.append(torch.autograd.grad(y.float(), leaves, upstream))
    assert torch.equal(grads[1][2], grads[0][2])
    # A step is 1/255 of a range of at most 10 deviations. Stochastic rounding has a variance of a sixth
    # of the squared step on average: 0.016 deviations.
    for exact_grad, ours in zip(*grads):
        assert (ours - exact_grad).norm() < 0.03 * exact_grad.norm()


def test_norm_of_one_element_keeps_its_deviation() -> None:
    model = QuantBackwardWrapper(nn.LayerNorm(1))
    model(torch.randn(64, 128, 1, requires_grad=True))
    assert {site.stored for site in model.explain().sites.values()} == {"exact"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_scripted_modules_are_exact_and_say_so() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    x = torch.randn(32, 64)
    plain = run(module, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = QuantBackwardWrapper(torch.jit.script(module))
        ours = run(model, x, copied=False)
    assert any("policy='all'" in str(w.message) for w in caught)
    for name, grad in plain.grads.items():
        assert torch.allclose(ours.grads[name.replace("module.", "")] if name in ours.grads else
                              ours.grads[f"_orig_mod.{name}"], grad, atol=1e-5)
