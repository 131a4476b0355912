"""The default policy, op by op: exact where promised, unbiased where it rounds. H3, H6 to H8."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.operations import norm_bits
from brevitas_bp.format.spec import row_bucket
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import Apply, assert_same, cotangent, run, wrapped_run
from tests.stats import hoeffding

BUCKET = 64


def wrapped(module: nn.Module, **options: Any) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module, bucket_size=BUCKET, seed=0, **options)


def special(*shape: int) -> Tensor:
    """Returns normal values mixed with zeros, borders of activations, infinities and NaN."""
    x = torch.randn(*shape)
    odd = torch.tensor([
        0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 0.1, 1e-42, -1e-42, math.inf, -math.inf,
        math.nan])
    x.view(-1)[:odd.numel()] = odd
    return x


# Exact operations: gradients are bit-equal, with fewer bytes.

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu, "Tensor.relu": lambda x: x.relu(), "relu_": lambda x: (x * 1).relu_(),
    "F.relu inplace": lambda x: F.relu(x * 1, inplace=True), "F.relu6": F.relu6,
    "F.relu6 inplace": lambda x: F.relu6(x * 1, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 1.0),
    "hardtanh keywords": lambda x: F.hardtanh(x, max_val=0.5),
    "hardtanh inplace": lambda x: F.hardtanh(x * 1, inplace=True), "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu, "leaky_relu_": lambda x: F.leaky_relu_(x * 1, 0.3),
    "rrelu eval": lambda x: F.rrelu(x, 0.1, 0.4), "rrelu": lambda x: F.rrelu(x, 0.1, 0.4, True),
    "rrelu_": lambda x: F.rrelu_(x * 1, 0.1, 0.4, True),
    "rrelu, one slope": lambda x: F.rrelu(x, 0.2, 0.2, True),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "hardshrink": lambda x: F.hardshrink(x, 0.5), "softshrink": lambda x: F.softshrink(x, 0.5),
    "clamp": lambda x: x.clamp(-0.5, 1.0), "clamp max": lambda x: torch.clamp(x, max=0.5),
    "clamp_min": lambda x: x.clamp_min(0.1), "abs": torch.abs,
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout inplace": lambda x: F.dropout(x * 1, 0.9, True, True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.3),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0), "where": lambda x: torch.where(x > 0, x, 2 * x),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x.contiguous(), 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "gather": lambda x: x.gather(3, torch.arange(16).expand(8, 4, 16, 16).flip(3)),
    # No repeated index: threads add in any order.
    "index_select": lambda x: x.index_select(0, torch.arange(8).flip(0)),
    "getitem": lambda x: x[torch.arange(8).flip(0)],
}
#: Operations that save so little at this size that "fewer bytes" does not show, or save nothing.
SAVES_LITTLE = {"dropout2d", "where", "masked_fill", "rrelu", "rrelu_", "rrelu, one slope"}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_exact_operations_have_equal_bits(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    module, x = Apply(EXACT[name]), special(8, 4, 16, 16).to(memory_format=layout)
    plain, ours = run(module, x, seed=3), wrapped_run(module, x, seed=3)
    for grads in (plain.grads, ours.grads):
        # The bits of the NaN depend on the order in memory.
        grads["input 0"] = grads["input 0"].nan_to_num(nan=12345.0)
    assert_same(ours.grads, plain.grads)
    assert torch.equal(ours.rng, plain.rng)


@pytest.mark.parametrize("name", sorted(EXACT.keys() - SAVES_LITTLE))
def test_exact_operations_store_few_bytes(name: str) -> None:
    model, x = wrapped(Apply(EXACT[name])), torch.randn(8, 4, 16, 16, requires_grad=True)
    with track_saved_memory(model) as report:
        output = model(x)
    # Masks take a 32nd, signs a 16th. Window indices take 4 of 64 bits or more, indices below 8 a byte.
    assert report.exact_bytes >= 7.9 * report.stored_bytes > 0 or report.stored_bytes == 0
    assert not report.unknown_operations
    assert output.requires_grad


@pytest.mark.parametrize("name", ["F.relu", "hardtanh", "leaky_relu", "abs", "hardshrink", "clamp"])
def test_naive_rounding_loses_them(name: str) -> None:
    torch.manual_seed(0)
    module, x = Apply(EXACT[name]), torch.randn(8, 4, 16, 16)
    plain, naive = run(module, x, seed=3), wrapped_run(module, x, seed=3, policy="all")
    lost = (plain.grads["input 0"] - naive.grads["input 0"]).norm() / plain.grads["input 0"].norm()
    assert lost > 0.05


# Elementwise functions: the derivative is rounded. Rows are copies in one bucket each, so that one
# backward draws all copies.

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "silu inplace": lambda x: F.silu(x * 1, inplace=True), "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish,
    "mish inplace": lambda x: F.mish(x * 1, True), "hardswish": F.hardswish, "elu": F.elu,
    "elu inplace": lambda x: F.elu(x * 1, 0.7, inplace=True), "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "softplus": F.softplus, "softplus beta": lambda x: F.softplus(x, beta=2.0, threshold=3),
    "tanh": torch.tanh, "Tensor.tanh_": lambda x: (x * 1).tanh_(), "sigmoid": torch.sigmoid,
    "Tensor.sigmoid_": lambda x: (x * 1).sigmoid_(), "F.logsigmoid": F.logsigmoid,
    "softsign": F.softsign, "tanhshrink": F.tanhshrink, "sin": torch.sin, "cos": torch.cos,
    "erf": torch.erf, "atan": torch.atan,
    "cube": lambda x: (x / 4) ** 3, "pow": lambda x: torch.pow(x / 4, 4.0),
    "Tensor.pow_": lambda x: (x / 4).pow_(3),
    "glu": F.glu, "glu dim": lambda x: F.glu(x, dim=1),
}
#: Functions whose mean gradient is visibly wrong if the saved tensor is rounded to 2 bits.
CURVED = ["silu", "gelu", "mish", "tanh", "sigmoid", "softplus", "elu", "hardswish", "cube"]
COPIES = 4096


def mean_gradient(function: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
    """Returns the mean input gradient over ``COPIES`` roundings; x [64] with a cotangent of ones."""
    leaf = x.expand(COPIES, -1).clone().requires_grad_()
    wrapped(Apply(function), **options)(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.double().mean(0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rewritten_functions_are_unbiased(name: str) -> None:
    x = torch.linspace(-4, 4, BUCKET)
    function = ELEMENTWISE[name]
    leaf = x.expand(COPIES, -1).clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    exact = leaf.grad.double()[0]
    mean = mean_gradient(function, x)
    # A draw lies within one of 15 steps. The derivatives of a bucket span at most 2.6 (softplus with
    # beta, selu; glu also multiplies by x), and float32 adds its own rounding.
    step = (4.2 if "glu" in name else 2.6) / 15
    tolerance = hoeffding(COPIES, BUCKET) * step + 1e-5
    assert (mean - exact).abs().max() <= tolerance
    if name in CURVED:
        naive = mean_gradient(function, x, policy="all")
        assert (naive - exact).abs().max() > 2 * tolerance


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rewritten_functions_change_no_bit_of_the_forward(name: str) -> None:
    x = special(128, 64)
    plain, ours = run(Apply(ELEMENTWISE[name]), x), wrapped_run(Apply(ELEMENTWISE[name]), x)
    assert torch.equal(plain.output.nan_to_num(nan=1e9), ours.output.nan_to_num(nan=1e9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "softplus", "elu", "glu"])
def test_rewritten_functions_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 128, dtype=dtype)
    module = Apply(ELEMENTWISE[name])
    plain = run(module, x)
    ours = wrapped_run(module, x, policy=OpAware(multiplier_bits=8))
    assert torch.equal(ours.output, plain.output)
    assert ours.grads["input 0"].dtype == dtype
    # One of 255 steps, for derivatives that span less than 4 (glu), and one rounding of the result.
    error = (ours.grads["input 0"] - plain.grads["input 0"]).abs().max()
    assert error <= 8 / 255 + 8 * torch.finfo(dtype).eps


def test_tensor_methods_and_functions_are_one_operation() -> None:
    for function in (lambda x: x.sigmoid(), torch.sigmoid, F.sigmoid, nn.Sigmoid()):
        model = wrapped(Apply(function))
        model(torch.randn(64, 64, requires_grad=True))
        (site,) = model.explain().sites.values()
        assert site.stored == "4-bit dithered"


# Products and layers.


def bilinear_variance(saved: Tensor, layer: bool, bits: int = 2) -> Tensor:
    """Returns a bound on each decoded element's variance: a quarter of its bucket's squared step.

    Buckets end with a row. The row is a sample for a convolution. Else it is the last dimension, and as
    many dimensions before it as give 16 elements.
    """
    dims = saved.dim() - 1 if layer else 1
    while saved.shape[-dims:].numel() < 16:
        dims += 1
    row = saved.shape[-dims:].numel()
    bucket = row_bucket(row, BUCKET)
    rows = saved.detach().double().view(-1, row)
    rows = torch.cat([rows, rows[:, -1:].expand(-1, -row % bucket)], 1).view(len(rows), -1, bucket)
    lo, hi = rows.aminmax(dim=2, keepdim=True)
    step = ((hi - lo) / (2**bits - 1)).expand_as(rows).reshape(len(rows), -1)[:, :row]
    return (step**2 / 4).reshape(saved.shape)


#: Functions bilinear in two tensors: their formula with squared factors gives variances.
BILINEAR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "mul": (torch.mul, (32, 16), (32, 16)), "*": (lambda a, b: a * b, (32, 16), (32, 16)),
    "*=": (lambda a, b: (a * 1).mul_(b), (32, 16), (32, 16)),
    "matmul": (torch.matmul, (16, 32), (32, 16)), "@": (lambda a, b: a @ b, (4, 8, 16), (4, 16, 8)),
    "mm": (torch.mm, (16, 32), (32, 16)), "bmm": (torch.bmm, (4, 8, 16), (4, 16, 8)),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), (16, 32), (16, 32)),
    "addmm": (lambda a, b: torch.addmm(a.new_ones(16, 16), a, b), (16, 32), (32, 16)),
    "baddbmm": (lambda a, b: torch.baddbmm(a.new_ones(4, 8, 8), a, b), (4, 8, 16), (4, 16, 8)),
    "addcmul": (lambda a, b: torch.addcmul(a.new_ones(32, 16), a, b), (32, 16), (32, 16)),
    "outer": (torch.outer, (64,), (64,)),
    "linear": (F.linear, (32, 16), (16, 16)),
    "conv1d": (F.conv1d, (2, 4, 32), (4, 4, 3)), "conv2d": (F.conv2d, (2, 4, 8, 8), (4, 4, 3, 3)),
    "conv3d": (F.conv3d, (2, 2, 6, 6, 6), (2, 2, 3, 3, 3)),
    "conv_transpose1d": (F.conv_transpose1d, (2, 4, 32), (4, 4, 3)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 4, 8, 8), (4, 4, 3, 3)),
    "conv_transpose3d": (F.conv_transpose3d, (2, 2, 4, 4, 4), (2, 2, 3, 3, 3)),
}
DRAWS = 300


@pytest.mark.parametrize("name", BILINEAR)
def test_products_and_layers_are_unbiased(name: str) -> None:
    function, *shapes = BILINEAR[name]
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    module = Apply(function)
    exact = run(module, a, b).grads
    # One tensor's gradient is linear in the other. Squared factors in the formula give its variance.
    layer = name == "linear" or name.startswith("conv")
    squared = [bilinear_variance(x, name.startswith("conv")).requires_grad_() for x in (a, b)]
    output = function(squared[0], squared[1])
    variances = torch.autograd.grad(output, squared, cotangent(output).square())
    model = wrapped(module)
    draws = [run(model, a, b, copied=False).grads for _ in range(DRAWS)]
    for key, variance in zip(("input 0", "input 1"), variances):
        mean = torch.stack([grads[key] for grads in draws]).mean(0)
        if layer and key == "input 0":
            # The weight is kept, also here where it is not a parameter.
            assert torch.equal(draws[0][key], exact[key])
            continue
        assert not torch.equal(draws[0][key], exact[key])
        # The sum is sub-Gaussian, with a variance below the bound: P(|z| > t) <= 2 exp(-t^2 / 2).
        limit = math.sqrt(2 * math.log(2 * variance.numel() / 1e-9))
        assert ((mean - exact[key]).abs() <= limit * (variance / DRAWS).sqrt() + 1e-12).all()


def test_broadcast_factor_is_exact() -> None:
    model = wrapped(Apply(torch.mul))
    x, scale = torch.randn(4, 64, 8, 8), torch.randn(4, 64, 1, 1)
    ours, plain = (run(m, x, scale, copied=False).grads for m in (model, Apply(torch.mul)))
    assert torch.equal(ours["input 0"], plain["input 0"])
    assert not torch.equal(ours["input 1"], plain["input 1"])


SELF_PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x * x * x": lambda x: x * x * x, "x * linear(x)": lambda x: x * F.linear(x, torch.eye(BUCKET)),
    "square of a square": lambda x: x.square().square()}


@pytest.mark.parametrize("name", SELF_PRODUCTS)
def test_roundings_that_meet_are_independent(name: str) -> None:
    # If one rounding of x occurred twice in a product, its variance would bias the gradient of x^3.
    x = torch.linspace(-1, 1.3, BUCKET)
    function = SELF_PRODUCTS[name]
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(function(leaf).sum(), leaf)
    mean = mean_gradient(function, x)
    # Each draw is a product of up to three roundings of values within 1.7 and steps within 0.77.
    tolerance = hoeffding(COPIES, BUCKET) * 8
    assert (mean - exact).abs().max() <= tolerance


# Norms: unbiased for their parameters, order 1/M for the input.

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(BUCKET), "rms": lambda: nn.RMSNorm(BUCKET, eps=1e-6),
    "group": lambda: nn.GroupNorm(1, 1), "batch": lambda: nn.BatchNorm1d(BUCKET),
    "instance": lambda: nn.InstanceNorm1d(1, affine=True)}


@pytest.mark.parametrize("name", NORMS)
def test_norms_round_their_input_only(name: str) -> None:
    torch.manual_seed(0)
    norm = NORMS[name]()
    x = torch.randn(512, BUCKET) if name in ("layer", "rms", "batch") else torch.randn(512, 1, BUCKET)
    model = wrapped(norm)
    output = model(x.requires_grad_())
    stored = {site.reason: site.stored for site in model.explain().sites.values()}
    # It has more bits if few elements share a statistic: here a bucket of them in each instance.
    bits = norm_bits(BUCKET) if name == "instance" else 2
    form = ", as output" if name in ("layer", "rms") else ""
    assert stored["input of a norm: bias of order 1/M"] == f"{bits}-bit rotated{form}"
    if name == "instance":
        assert bits > 2
    assert stored["statistic of a norm"] == "exact"
    output.backward(cotangent(output))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_layer_norm_has_the_predicted_bias() -> None:
    # bias_i = -gamma inv_std dy_i v_i / M with v the variance of the rounded normalized input.
    torch.manual_seed(0)
    x, dy = torch.randn(BUCKET), torch.randn(BUCKET)
    leaf = x.expand(COPIES, -1).clone().requires_grad_()
    norm = nn.LayerNorm(BUCKET)
    wrapped(norm)(leaf).backward(dy.expand(COPIES, -1))
    assert leaf.grad is not None
    mean = leaf.grad.double().mean(0)
    single = x.double().requires_grad_()
    F.layer_norm(single, (BUCKET,)).backward(dy.double())
    assert single.grad is not None
    inv_std = 1 / (x.double().var(unbiased=False) + norm.eps).sqrt()
    step = (x.max() - x.min()).double() / 3
    a = ((x.double() - x.min()) / step).frac()
    variance = (step * inv_std)**2 * a * (1 - a)
    bias = -inv_std * dy * variance / BUCKET
    # Both factors of xhat~ mean(dy xhat~) are rounded: as for batch norm in test_unbiased.py.
    xhat = (x.double() - x.double().mean()) * inv_std
    sd_f = (dy.double().square() * variance).sum().sqrt() / BUCKET
    deviation = inv_std * (
        (xhat.abs() + step * inv_std) * sd_f + (dy * xhat).mean().abs() * variance.sqrt())
    limit = math.sqrt(2 * math.log(2 * BUCKET / 1e-9)) / math.sqrt(COPIES)
    assert ((mean - single.grad - bias).abs() <= limit * deviation).all()


# Attention.


def attention(**options: Any) -> Apply:
    return Apply(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))


CAUSAL = {"plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3},
          "bool mask": {"attn_mask": torch.ones(8, 8).tril().bool()},
          "float mask": {"attn_mask": torch.randn(8, 8)}, "dropout": {"dropout_p": 0.3}}


@pytest.mark.parametrize("math_kernel", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_attention_with_exact_query_and_key_is_unbiased(name: str, math_kernel: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 8) for _ in range(3))
    module = attention(**CAUSAL[name])
    backends = [torch.nn.attention.SDPBackend.MATH] if math_kernel else [
        torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION]

    class Chosen(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(backends):
                return module(*inputs)

    plain = run(Chosen(), q, k, v, seed=5)
    model = QuantBackwardWrapper(
        Chosen(), bucket_size=BUCKET, seed=0, policy=OpAware(attention_bits=None))
    draws = [run(model, q, k, v, seed=5, copied=False) for _ in range(DRAWS)]
    assert torch.equal(draws[0].output, plain.output)
    assert torch.equal(draws[0].rng, plain.rng)
    assert torch.equal(draws[0].grads["input 2"], plain.grads["input 2"])

    # The gradients of query and key are linear in the value: their Jacobian, column by column.
    limit = math.sqrt(2 * math.log(2 * q.numel() / 1e-9))
    variance = {"input 0": torch.zeros_like(q), "input 1": torch.zeros_like(k)}
    zero = run(Chosen(), q, k, torch.zeros_like(v), seed=5).grads
    for i, spread in enumerate(bilinear_variance(v, False).flatten()):
        unit = torch.zeros(v.numel()).index_fill_(0, torch.tensor(i), 1).view_as(v)
        grads = run(Chosen(), q, k, unit, seed=5).grads
        for key, total in variance.items():
            total += (grads[key] - zero[key]).square() * spread
    for key, total in variance.items():
        mean = torch.stack([draw.grads[key] for draw in draws]).mean(0)
        assert not torch.equal(draws[0].grads[key], plain.grads[key])
        assert ((mean - plain.grads[key]).abs() <= limit * (total / DRAWS).sqrt() + 1e-5).all()


def test_rounding_query_and_key_is_far_off() -> None:
    # The control: the hazards table has a relative error of 2.7 at 2 bits.
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 4, 64, 32) for _ in range(3))
    plain = run(attention(), q, k, v).grads
    error = {}
    for policy in ("all", "op_aware"):
        draws = [
            run(wrapped(attention(), policy=policy, act_quant=Stochastic2), q, k, v).grads
            for _ in range(4)]
        mean = torch.stack([draw["input 0"] for draw in draws]).mean(0)
        error[policy] = (mean - plain["input 0"]).norm() / plain["input 0"].norm()
    assert error["all"] > 2
    assert error["op_aware"] < error["all"] / 2


def test_query_and_key_leave_shared_memory() -> None:
    # q, k and v are views of one projection. Keeping two of them keeps the memory of the third.
    x = torch.randn(8, 64, 3 * 64, requires_grad=True)
    module = Apply(lambda x: F.scaled_dot_product_attention(*(
        part.view(8, 64, 4, 16).transpose(1, 2) for part in (x * 1).chunk(3, dim=-1))))
    model = wrapped(module, policy=OpAware(attention_bits=None))
    with track_saved_memory(model) as report:
        output = model(x)
    two_thirds = 2 * 8 * 64 * 64 * 4
    assert two_thirds < report.stored_bytes < 1.1 * two_thirds
    assert output.requires_grad


def test_multi_head_attention_is_looked_through() -> None:
    layer = nn.MultiheadAttention(64, 4, batch_first=True)
    model = wrapped(layer)
    x = torch.randn(8, 32, 64)
    output = model(x, x, x, need_weights=False)[0]
    ops = {site.op for site in model.explain().sites.values()}
    assert ops == {"linear", "scaled_dot_product_attention"}
    assert torch.equal(output, layer(x, x, x, need_weights=False)[0])


# Few-bit tables: they store the interval of the input, not a rounded derivative.


@pytest.mark.parametrize("name", [
    "silu", "silu inplace", "gelu", "gelu tanh", "mish", "hardswish", "elu", "selu", "celu", "softplus",
    "softplus beta", "tanh", "sigmoid", "F.logsigmoid", "softsign", "erf"])
def test_few_bit_gradients_are_those_of_the_table(name: str) -> None:
    x = torch.linspace(-4, 4, 4096)
    module = Apply(ELEMENTWISE[name])
    plain = run(module, x)
    model = wrapped(module, policy=OpAware(few_bit=4))
    ours = run(model, x, copied=False)
    assert torch.equal(ours.output, plain.output)
    (site,) = model.explain().sites.values()
    assert site.stored.startswith("4-bit few-bit")
    # One byte of flags per block of 4096.
    assert site.stored_bytes == 4096 // 2 + 1
    # The table is piecewise constant at 16 levels. The squared error of the golden tables is below 0.01
    # over 20 units, and no interval spans more than 0.3 of a derivative.
    error = (ours.grads["input 0"] - plain.grads["input 0"]).abs()
    assert 0 < error.max() < 0.3
    assert error.square().mean() < 0.01


@pytest.mark.parametrize("function", [
    F.glu, lambda x: F.celu(x, 100.0)])
def test_few_bit_leaves_operations_without_a_table_alone(
        function: Callable[[Tensor], Tensor]) -> None:
    module, x = Apply(function), torch.randn(64, 64)
    model = wrapped(module, policy=OpAware(few_bit=2))
    run(model, x, copied=False)
    (site,) = model.explain().sites.values()
    assert site.stored == "4-bit dithered"


@pytest.mark.parametrize("exponent", [0.5, -1, 2, 2.5, torch.tensor(3.0), 3j])
def test_powers_without_a_bounded_derivative_are_not_rewritten(exponent: Any) -> None:
    """The derivative of a root is infinite at zero."""
    x = torch.rand(64, 64)
    model = wrapped(Apply(lambda x: torch.pow(x, exponent).abs()))
    leaf = x.requires_grad_()
    model(leaf).sum().backward()
    decided = {site.reason for site in model.explain().sites.values() if site.op == "pow"}
    assert "derivative: backward is linear in it" not in decided
    control = wrapped(Apply(lambda x: torch.pow(x, 3).abs()))
    control(leaf).sum().backward()
    (site,) = (site for site in control.explain().sites.values() if site.op == "pow")
    assert site.reason == "derivative: backward is linear in it"
