"""H8, H11, H12, H13, H15: masks, indices, NaN, constants, tiny tensors, 16-bit and 64-bit floats."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.memory import SavedMemoryRow
from brevitas_bp.quant import ShiftedUint1DynamicActPerBucketFloat as Nearest1
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import (
    QUANTIZING,
    Apply,
    Recurrent,
    assert_same,
    naive_pack,
    run,
    wrapped_run,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows_of(module: nn.Module, x: Tensor, **options: Any) -> dict[str, SavedMemoryRow]:
    """Returns what the wrapped module stores for backward, by dtype."""
    model = QuantBackwardWrapper(module, **options)
    with track_saved_memory(model) as report:
        output = model(x.detach().requires_grad_())
    assert output.requires_grad
    return {row.dtype: row for row in report.rows}


# H8. Masks, indices and opaque bytes.


@pytest.mark.parametrize("policy", QUANTIZING)
def test_bool_mask_takes_one_bit(policy: str) -> None:
    module, x = Apply(lambda x: torch.where(x > 0, x, 2 * x)), torch.randn(64, 100)
    row = rows_of(module, x, policy=policy)["bool"]
    assert (row.exact_bytes, row.stored_bytes) == (6400, 800)
    assert torch.equal(
        wrapped_run(module, x, policy=policy).grads["input 0"], run(module, x).grads["input 0"])


#: name -> (pooling, input, bits of an element's index in a plane, bits of a position in the window)
POOLS: dict[str, tuple[nn.Module, Tensor, int, int]] = {
    "1d": (nn.MaxPool1d(3, return_indices=True), torch.randn(4, 8, 60), 8, 2),
    "2d, 16x16": (nn.MaxPool2d(2), torch.randn(4, 8, 16, 16), 8, 2),
    "2d, 64x64": (nn.MaxPool2d(2), torch.randn(2, 4, 64, 64), 16, 2),
    "2d, 256x256": (nn.MaxPool2d(2), torch.randn(1, 1, 256, 256), 32, 2),
    "2d, 3x3": (nn.MaxPool2d(3, 1, 1), torch.randn(4, 8, 16, 16), 8, 4),
    "3d": (nn.MaxPool3d(2), torch.randn(2, 4, 8, 8, 8), 16, 3),
    "adaptive": (nn.AdaptiveMaxPool2d(3), torch.randn(4, 8, 12, 12), 8, 4),
    # Its windows are random, so a position in a window does not identify an element.
    "fractional": (nn.FractionalMaxPool2d(2, 5), torch.randn(4, 8, 12, 12), 8, 8),
}


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", POOLS)
def test_pool_indices_are_few_bits_and_exact(name: str, policy: str) -> None:
    pool, x, *bits = POOLS[name]
    module = nn.Sequential(pool, Apply(lambda y: y[0] if isinstance(y, tuple) else y))
    row = rows_of(module, x, policy=policy)["int64"]
    assert row.stored_bytes == row.exact_bytes * bits[QUANTIZING.index(policy)] // 64
    # The saved input only provides the shape, so quantizing it changes nothing.
    assert torch.equal(
        wrapped_run(module, x, policy=policy).grads["input 0"], run(module, x).grads["input 0"])


@pytest.mark.parametrize(("policy", "ratio"), [("all", 1), ("op_aware", 8)])
def test_other_integers_are_exact(policy: str, ratio: int) -> None:
    # Only the default policy knows that these index a dimension of 40, which fits in a byte.
    index = torch.randint(0, 40, (30, 40))
    module, x = Apply(lambda x: x.gather(1, index)), torch.randn(30, 40)
    assert rows_of(module, x, policy=policy)["int64"].ratio == ratio
    assert torch.equal(
        wrapped_run(module, x, policy=policy).grads["input 0"], run(module, x).grads["input 0"])


class Opaque(torch.autograd.Function):
    """Saves bytes with a private meaning, like a recurrent layer's workspace."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach().contiguous().view(torch.uint8).clone())
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (workspace,) = ctx.saved_tensors
        return grad * workspace.view(torch.float32).exp()


@pytest.mark.parametrize("policy", QUANTIZING)
def test_opaque_bytes_are_untouched(policy: str) -> None:
    module, x = Apply(Opaque.apply), torch.randn(32, 32)
    assert rows_of(module, x, policy=policy)["uint8"].ratio == 1
    expected = run(Apply(torch.exp), x).grads["input 0"]
    assert torch.equal(wrapped_run(module, x, policy=policy).grads["input 0"], expected)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_workspace_of_an_lstm_is_untouched(policy: str) -> None:
    assert rows_of(Recurrent(), torch.randn(5, 4, 16), policy=policy)["uint8"].ratio == 1


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize(("policy", "rtol"), [("all", 2**-22), ("op_aware", 0)])
def test_dropout_mask_keeps_its_zeros(p: float, policy: str, rtol: float) -> None:
    module, x = nn.Dropout(p), torch.randn(64, 64)
    plain = run(module, x).grads["input 0"]
    wrapped = wrapped_run(module, x, policy=policy).grads["input 0"]
    assert torch.equal(wrapped == 0, plain == 0)
    # As floats, a mask has two values, the ends of its bucket: code 3 times a third of 1 / (1 - p).
    torch.testing.assert_close(wrapped, plain, rtol=rtol, atol=0)


# H11. NaN and Inf.


def elementwise(x: Tensor, **options: Any) -> Tensor:
    """Returns the ``x`` that backward saw: the gradient of a weight that multiplies it."""
    module = Apply(torch.mul, nn.Parameter(torch.zeros(x.shape, dtype=x.dtype)))
    model = QuantBackwardWrapper(module, **options)
    model(x).sum().backward()
    grad = module.weights[0].grad
    assert grad is not None
    return grad


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_value_poisons_its_bucket_and_no_other(bad: float, storage: str, policy: str) -> None:
    x = torch.randn(16, 256)
    x[3, 77] = bad
    seen = elementwise(x, policy=policy, bucket_size=256, storage=storage)
    assert seen[3].isnan().all()
    assert seen[torch.arange(16) != 3].isfinite().all()


def hiding_pack(x: Tensor) -> Any:
    """A naive codec whose codes cannot hold a NaN, and that does not check for one."""
    return naive_pack(x.nan_to_num(0, 0, 0))


@pytest.mark.parametrize("policy", ["hidden", *QUANTIZING])
def test_grad_scaler_sees_the_overflow(policy: str) -> None:
    module = Apply(torch.mul, nn.Parameter(torch.ones(8, 256)))
    weight, before = module.weights[0], module.weights[0].detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    x = torch.randn(8, 256).index_put((torch.tensor([2]), torch.tensor([5])), torch.tensor(math.inf))
    if policy == "hidden":  # the control
        with saved_tensors_hooks(hiding_pack, lambda p: p.codes.view(p.shape) * p.scale + p.lo):
            output = module(x)
    else:
        output = QuantBackwardWrapper(module, policy=policy)(x)
    scaler.scale(output.nan_to_num(0, 0, 0).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight, before) == (policy != "hidden")


# H12. Constants, and numbers of any size.


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 6e-8])
def test_constant_is_exact(value: float, dtype: torch.dtype, policy: str) -> None:
    x = torch.full((64, 64), value, dtype=dtype)
    assert ((x - x.min()) / (x.max() - x.min())).isnan().all()  # the control: 0 / 0
    assert torch.equal(elementwise(x, act_quant=Nearest1, policy=policy), x)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_numbers_of_any_size_quantize_alike(size: float) -> None:
    x = torch.linspace(0, 3, 256).round()
    scaled = x * size
    seen = elementwise(scaled, act_quant=Nearest2, bucket_size=256)
    # The data lies on the four levels, so the error is a few float32 roundings of the largest value.
    assert (seen - scaled).abs().max() <= 2**-21 * scaled.max()


def test_float16_epsilon_underflows_where_arithmetic_is_float16() -> None:
    x = torch.full((256,), 6e-8, dtype=torch.float16)
    naive = (x - x.min()) / (x.max() - x.min() + torch.tensor(1e-8, dtype=torch.float16))
    assert naive.isnan().all()  # the control
    assert torch.equal(elementwise(x), x)


# H13. Empty, 0-d and tiny tensors.


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 18, 19, 255, 257])
def test_encoding_that_would_not_be_smaller_is_not_done(numel: int) -> None:
    x = torch.randn(numel)
    # Buckets of 256 at 2 bits take 64 bytes of codes, and a scale and an offset of 4 bytes each.
    stored = -(-numel // 256) * (64 + 4 + 4)
    kept = stored >= 4 * numel
    row = rows_of(Apply(torch.sin), x, policy="all", bucket_size=256).get("float32")
    if numel:
        assert row is not None
        assert row.stored_bytes == (4 * numel if kept else stored)
    if kept:
        plain, wrapped = run(Apply(torch.sin), x), wrapped_run(Apply(torch.sin), x, policy="all")
        assert torch.equal(wrapped.grads["input 0"], plain.grads["input 0"])


def test_naive_codes_of_a_scalar_are_larger_than_the_scalar() -> None:
    packed = naive_pack(torch.tensor(3.0))
    assert sum(t.nbytes for t in (packed.codes, packed.lo, packed.scale)) > 4


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (3, 0, 2)])
def test_awkward_shape_gets_its_exact_gradient(shape: tuple[int, ...], policy: str) -> None:
    x = torch.randn(shape)
    plain, wrapped = run(Apply(torch.sin), x), wrapped_run(Apply(torch.sin), x, policy=policy)
    assert torch.equal(wrapped.grads["input 0"], plain.grads["input 0"])


# H15. All float dtypes, with float32 noise.


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_dtype_is_quantized_without_bias(dtype: torch.dtype, policy: str) -> None:
    x = torch.rand(1024, dtype=torch.float64).to(dtype)
    n, alpha = 400, 1e-9
    draws = (elementwise(x, act_quant=Stochastic2, policy=policy, seed=s) for s in range(n))
    mean = sum(draw.double() for draw in draws) / n
    # Hoeffding's bound per element, within a step. The range is below 1, so a step is below 1 / 3.
    tolerance = math.sqrt(math.log(2 * x.numel() / alpha) / (2 * n)) / 3
    # Decoded values are rounded to the dtype.
    tolerance += torch.finfo(dtype).eps
    assert (mean - x.double()).abs().max() <= tolerance


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_dtype_is_really_packed(dtype: torch.dtype, policy: str) -> None:
    x = torch.randn(64, 256).to(dtype)
    module = Apply(torch.mul, nn.Parameter(torch.ones(256, dtype=dtype)))
    rows = rows_of(module, x, policy=policy, bucket_size=256)
    row = rows[str(dtype).removeprefix("torch.")]
    metadata = 8 if dtype == torch.float64 else 4
    assert row.exact_bytes == 64 * 256 * dtype.itemsize
    assert row.stored_bytes == 64 * (64 + 2 * metadata)


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_plain_autograd(dtype: torch.dtype, policy: str) -> None:
    module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64)).to(dtype)
    x = torch.randn(40, 32).to(dtype)
    plain, wrapped = run(module, x), wrapped_run(module, x, policy=policy)
    assert torch.equal(wrapped.output, plain.output)
    assert {k: g.dtype for k, g in wrapped.grads.items()} == {
        k: g.dtype for k, g in plain.grads.items()}


class Sparse(nn.Module):
    """Products with a sparse matrix, beside frozen weights and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = torch.eye(32).roll(1, 0).to_sparse()
        self.inner, self.norm = nn.Linear(16, 64), nn.BatchNorm1d(64)
        self.outer = nn.Linear(64, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(torch.sparse.mm(self.graph, self.inner(x))))


@pytest.mark.parametrize("policy", [*QUANTIZING, "exact"])
def test_sparse_tensors_are_kept(policy: str) -> None:
    module, x = Sparse(), torch.randn(32, 16)
    plain, wrapped = run(module, x), wrapped_run(module, x, policy=policy)
    assert torch.equal(wrapped.output, plain.output)
    if policy == "exact":
        assert_same(wrapped.grads, plain.grads)


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("function", [torch.abs, torch.square, torch.tanh])
def test_complex_numbers_are_kept(function: Callable[[Tensor], Tensor], policy: str) -> None:
    x = torch.randn(32, 32, dtype=torch.complex64)
    assert rows_of(Apply(function), x, policy=policy)["complex64"].ratio == 1
