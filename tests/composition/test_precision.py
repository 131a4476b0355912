"""Autocast, loss scaling, 16 and 64 bits, layouts, default dtypes and devices, unusual tensors."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from brevitas_bp import OpAware, QuantBackwardWrapper, StochasticRound, track_saved_memory
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import (
    NETS,
    QUANTIZING,
    Apply,
    Encoder,
    assert_same,
    cotangent,
    net,
    run,
    wrapped_run,
)
from tests.backward.test_unbiased import rounding_variance, z_bound
from tests.composition.support import (
    DRAWS,
    POLICIES,
    assert_default_policy_trains,
    assert_exact_policy_is_plain,
    mean_grad,
    naive_differs,
)

HALVES = [torch.bfloat16, torch.float16]


class Island(nn.Module):
    """A layer used twice (its cast weight is cached), around a part that must run in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.full, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(F.gelu(self.twice(x)))
        with torch.autocast("cpu", enabled=False):
            hidden = self.full(hidden.float()).softmax(-1)
        return self.last(hidden)


class Inside(nn.Module):
    """A module that enters autocast itself."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.body(x)


def island() -> tuple[Island, Tensor]:
    torch.manual_seed(0)
    return Island(), torch.randn(128, 64)


# Autocast


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_around_the_wrapper(dtype: torch.dtype, cached: bool) -> None:
    module, x = island()
    with torch.autocast("cpu", dtype, cache_enabled=cached):
        assert assert_exact_policy_is_plain(module, x).output.dtype == dtype
        # The softmax output is kept and takes a quarter of all bytes. 2.83 was measured.
        assert_default_policy_trains(module, x, ratio=2.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_inside_the_wrapper(dtype: torch.dtype) -> None:
    module, x = island()
    inside = Inside(module, dtype)
    assert assert_exact_policy_is_plain(inside, x).output.dtype == dtype
    assert_default_policy_trains(inside, x, ratio=2.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_inputs_are_exact_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(64, 64)
    with torch.autocast("cpu", dtype):
        assert naive_differs(module, x)  # the control
        assert torch.equal(wrapped_run(module, x).grads["input 0"], run(module, x).grads["input 0"])


@pytest.mark.parametrize(("quantizer", "unbiased"), [(Stochastic2, True), (Nearest2, False)])
def test_weight_gradients_are_unbiased_under_autocast(quantizer: type, unbiased: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 16, bias=False), torch.rand(128, 64).bfloat16().float()
    delta = torch.rand(128, 16).bfloat16()
    exact = delta.double().t() @ x.double()
    variance = delta.double().square().t() @ rounding_variance(x, 3, 64)
    # Decoded values and the gradient are rounded to bfloat16, by at most 2**-9 of each term.
    tolerance = z_bound(exact.numel()) * (variance / DRAWS).sqrt() + 2 * 2**-9 * exact
    model = QuantBackwardWrapper(layer, quantizer, bucket_size=64, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        error = mean_grad(model, x, delta, "weight") - exact
    assert bool((error.abs() <= tolerance).all()) == unbiased


# Loss scaling


@pytest.mark.parametrize("policy", [*QUANTIZING, "exact", "none"])
def test_overflow_is_skipped_and_training_goes_on(policy: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(64, 64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model = module if policy == "none" else QuantBackwardWrapper(module, policy=policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    weights = module.get_parameter("0.weight")
    before, skipped = weights.detach().clone(), 0
    while torch.equal(weights, before):
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        if not skipped:
            assert weights.grad is not None
            # The control: a step without the check destroys the weights.
            assert not (weights - weights.grad).isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        if torch.equal(weights, before):
            skipped += 1
            assert scaler.get_scale() == scale / 2
    # float16 ends at 2**16 and gradients here are below 1. From 2**24, few steps are skipped.
    assert 1 <= skipped < 24
    assert weights.isfinite().all()


# Dtypes


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(set(NETS) - {"spectral", "conjugates"}))  # FFT has no half
def test_networks_of_one_dtype(name: str, dtype: torch.dtype) -> None:
    module, inputs = net(name)
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    assert_exact_policy_is_plain(module.to(dtype), *given)
    plain, ours = run(module, *given), wrapped_run(module, *given)
    assert torch.equal(ours.output, plain.output)
    assert {k: g.dtype for k, g in ours.grads.items()} == {k: g.dtype for k, g in plain.grads.items()}
    assert all(grad.isfinite().all() for grad in ours.grads.values())


class Mixed(nn.Module):
    """A network with four dtypes in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 128).bfloat16(), nn.LayerNorm(128)
        self.short, self.last = nn.Linear(128, 64).half(), nn.Linear(64, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x.bfloat16()).float()))
        return self.last(F.relu(self.short(x.half())).double())


def test_dtypes_may_be_mixed() -> None:
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(128, 64)
    plain = assert_exact_policy_is_plain(module, x)
    assert len({grad.dtype for grad in plain.grads.values()}) == 4
    assert_default_policy_trains(module, x, ratio=3)


def test_channels_last_3d() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 4, 3), nn.SiLU()).to(
            memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    x = torch.randn(4, 4, 12, 12, 12).to(memory_format=torch.channels_last_3d)
    plain = assert_exact_policy_is_plain(module, x)
    assert plain.output.is_contiguous(memory_format=torch.channels_last_3d)
    assert_default_policy_trains(module, x, ratio=8)
    assert naive_differs(module, x, name="4.bias")  # the control: SiLU's gradient is off


# Defaults that the user sets


class GeneralRound(StochasticRound):
    """A custom rounding of a user, so that no fused kernel is used."""


class GeneralPath(Stochastic2):
    float_to_int_impl = GeneralRound


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    """Sets a default dtype or device within the block."""
    dtype = torch.get_default_dtype()
    try:
        if isinstance(value, str):
            torch.set_default_device(value)
            assert torch.empty(1).device.type == value  # the control: it affects unnamed devices
        else:
            torch.set_default_dtype(value)
            assert torch.empty(1).dtype == value  # the control
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


@pytest.mark.parametrize("config", [Stochastic2, GeneralPath], ids=["kernel", "modules"])
@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, torch.float16, "meta", "cpu"], ids=str)
@pytest.mark.parametrize("when", ["wrapping", "running"])
def test_defaults_of_the_user_change_no_bit(when: str, value: torch.dtype | str, config: type) -> None:
    module, inputs = net("conv")
    leaf = inputs[0].requires_grad_()
    policy = OpAware(few_bit=3) if config is Stochastic2 else "op_aware"

    def grads(wrapping: Any, running: Any) -> dict[str, Tensor]:
        with default(wrapping):
            model = QuantBackwardWrapper(copy.deepcopy(module), config, policy=policy, seed=0)
        torch.manual_seed(0)
        with default("cpu"):
            weight = cotangent(module(leaf))
        with default(running):
            torch.manual_seed(0)
            model(leaf).backward(weight)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain: Any = "cpu"
    assert_same(
        grads(value, plain) if when == "wrapping" else grads(plain, value), grads(plain, plain))


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_model_made_and_run_under_a_default_dtype(dtype: torch.dtype) -> None:
    with default(dtype):
        module, inputs = net("conv")
        assert_exact_policy_is_plain(module, *inputs)
        assert_default_policy_trains(module, *inputs, ratio=3)


# Tensors without memory


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_tensors_without_memory_are_kept(mode: str, policy: str) -> None:
    makers: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
        (Encoder, (4, 16, 32)), (lambda: net("conv")[0], (8, 3, 16, 16))]
    for make, shape in makers:
        with FakeTensorMode() if mode == "fake" else torch.device("meta"):
            model = QuantBackwardWrapper(make(), policy=policy)
            with track_saved_memory(model) as report:
                output = model(torch.randn(shape))
            output.sum().backward()
        assert report.tensors > 0
        assert report.stored_bytes == report.exact_bytes
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("where", ["built", "moved"])
def test_materialized_after_wrapping(where: str) -> None:
    module, inputs = net("conv")
    with torch.device("meta" if where == "built" else "cpu"):
        model = QuantBackwardWrapper(net("conv")[0], policy="exact").to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}  # the control
    model = model.to_empty(device="cpu")
    model.load_state_dict(module.state_dict())
    assert_same(run(model, *inputs, copied=False).grads, run(module, *inputs).grads)


# Unusual tensors


def test_complex_layers_are_kept_beside_quantized_ones() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(64, 64, dtype=torch.complex64), Apply(torch.abs), nn.Linear(64, 4))
    x = torch.randn(64, 64, dtype=torch.complex64)
    assert_exact_policy_is_plain(module, x)
    ours, plain = wrapped_run(module, x), run(module, x)
    assert torch.equal(ours.grads["0.weight"], plain.grads["0.weight"])
    assert not torch.equal(ours.grads["2.weight"], plain.grads["2.weight"])
    assert naive_differs(module, x, name="0.weight")  # the control


def grads_of(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Returns the parameters' gradients; wraps the module if options are given."""
    model = QuantBackwardWrapper(copy.deepcopy(module), seed=0, **options) if options else module
    model.zero_grad()
    output = model(x)
    total = output.values() if output.is_nested and output.layout == torch.jagged else (
        output.to_padded_tensor(0.0) if output.is_nested else output)
    total.backward(cotangent(total))
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()
            if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_kept(layout: torch.layout) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
    x = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(70, 16)], layout=layout)
    if layout == torch.strided:
        with pytest.raises(RuntimeError, match="doesn't support sizes"):  # the control
            _ = x.shape
    plain = grads_of(module, x)
    assert_same(grads_of(module, x, policy="exact"), plain)
    for policy in QUANTIZING:
        assert all(g.isfinite().all() for g in grads_of(module, x, policy=policy).values())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("convert", [Tensor.to_sparse_coo, Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_sparse_factors_are_kept(convert: Callable[[Tensor], Tensor], policy: str) -> None:
    torch.manual_seed(0)
    graph = convert(torch.eye(64).roll(1, 0))
    module = nn.Sequential(Apply(lambda x: graph @ x), nn.Linear(64, 8))
    x = torch.randn(64, 64)
    plain, ours = run(module, x), wrapped_run(module, x, policy=policy)
    # The product is linear and the weight exact, so only the input of the layer is rounded.
    assert torch.equal(ours.grads["input 0"], plain.grads["input 0"])
    assert torch.equal(ours.grads["1.weight"], plain.grads["1.weight"]) == (policy == "exact")


def test_sparse_gradients_stay_sparse() -> None:
    module = nn.Sequential(nn.Embedding(100, 16, sparse=True), nn.Linear(16, 4))
    tokens = torch.randint(0, 100, (64,))
    plain, ours = (grads_of(module, tokens, **o) for o in ({}, {"policy": "op_aware"}))
    assert ours["0.weight"].layout == torch.sparse_coo
    assert torch.equal(ours["0.weight"].to_dense(), plain["0.weight"].to_dense())


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*[qQ]uantize.*deprecated")
@pytest.mark.parametrize("policy", POLICIES)
def test_quantized_dtypes_pass(policy: str) -> None:
    torch.manual_seed(0)
    codes = torch.quantize_per_tensor(torch.randn(64, 64), 0.1, 0, torch.qint8)
    module = nn.Sequential(Apply(torch.dequantize), nn.Linear(64, 8))
    plain, ours = grads_of(module, codes), grads_of(module, codes, policy=policy)
    assert torch.equal(ours["1.bias"], plain["1.bias"])
    assert torch.equal(ours["1.weight"], plain["1.weight"]) == (policy == "exact")


@pytest.mark.parametrize("policy", POLICIES)
def test_float8_values_pass(policy: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        Apply(lambda x: x.to(torch.float8_e4m3fn).float()), nn.Linear(64, 8))
    x = torch.randn(64, 64)
    plain, ours = run(module, x), wrapped_run(module, x, policy=policy)
    assert torch.equal(ours.grads["input 0"], plain.grads["input 0"])
