"""PReLU: the sign is exact, and another codec stores the negative part."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import codec_from
from brevitas_bp.codec import Codec, Keep
from brevitas_bp.codec.signed import sign_exact
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint8DynamicActPerBucketFloat,
)
from tests.codec.support import run
from tests.strategies import DTYPES, LAYOUTS, dtype_name, normals
from tests.support import same_bits

STOCHASTIC = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)


def prelu(x: Tensor) -> Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    return F.prelu(x, torch.linspace(0.1, 0.4, channels, dtype=x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_gradient_of_the_input_is_bit_equal(layout: str, dtype: torch.dtype) -> None:
    x = normals((2, 6, 9, 11))
    x.view(-1)[:7] = torch.tensor([0.0, -0.0, math.inf, 1e-30, -1e-30, 65504, -65504])
    x = LAYOUTS[layout](x.to(dtype))
    plain = run(prelu, x)
    stored = run(prelu, x, {0: sign_exact(STOCHASTIC)})
    assert same_bits(plain.saved[0], x.add(0.0)) and same_bits(stored.grad, plain.grad)
    assert not same_bits(run(prelu, x, {0: STOCHASTIC}).grad, plain.grad)


def test_nan_and_infinities_stay() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -2.0, 3.0, 0.0])
    packed = sign_exact(Keep()).encode(x, seed=0)
    expected = torch.tensor([math.nan, 1.0, -math.inf, -2.0, 1.0, 0.0])
    assert torch.equal(packed.decode().nan_to_num(7), expected.nan_to_num(7))
    # A quantizer turns the whole bucket to NaN. But no number turns positive, nor NaN where x > 0.
    decoded = sign_exact(STOCHASTIC).encode(x, seed=0).decode()
    assert decoded[0].isnan() and decoded[1] == decoded[4] == 1 and not (decoded[[2, 3, 5]] > 0).any()


def test_bytes_are_those_of_the_mask_and_of_the_inner_codec() -> None:
    x = torch.randn(1024)
    packed = sign_exact(STOCHASTIC).encode(x, seed=0)
    assert packed.nbytes == 1024 // 8 + 4 * (64 + 8)
    assert sign_exact(STOCHASTIC) == sign_exact(STOCHASTIC)


def test_the_inner_codec_is_left_alone() -> None:
    x = torch.randn(100)
    before = x.clone()
    packed = sign_exact(Keep()).encode(x, seed=0)
    first = packed.decode()
    first.fill_(5)
    assert torch.equal(x, before) and not torch.equal(packed.decode(), first)


def weight_grad(codec: Codec | None, x: Tensor, seed: int = 0) -> Tensor:
    layer = nn.PReLU(4).double()
    torch.manual_seed(3)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t if codec is None or t.shape != x.shape else codec.encode(t, seed=seed),
        lambda t: t if isinstance(t, Tensor) else t.decode())
    with hooks:
        output = layer(x)
    output.backward(upstream)
    grad = layer.weight.grad
    assert grad is not None
    return grad


def test_gradient_of_the_weight_is_unbiased() -> None:
    x = normals((8, 4, 16)).requires_grad_()
    exact = weight_grad(None, x)
    seeds = 400
    got = torch.stack([weight_grad(sign_exact(STOCHASTIC), x, seed) for seed in range(seeds)])
    # Each element errs by d with |d| <= step, so within +-step * |g|. Hoeffding's bound is two-sided,
    # with alpha = 1e-9, over the sum of squares of these ranges (a width of one step each, times |g|).
    torch.manual_seed(3)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    step = float(-x.detach().min()) / 3
    squares = (upstream.square() * step**2).sum((0, 2))
    tolerance = (squares * math.log(2 / 1e-9) / (2 * seeds)).sqrt()
    assert ((got.mean(0) - exact).abs() <= tolerance).all()
    assert (got.std(0) > 0).all()


def test_a_nearest_quantizer_has_a_bias_of_its_own() -> None:
    x = normals((8, 4, 16)).requires_grad_()
    exact = weight_grad(None, x)
    nearest = weight_grad(sign_exact(codec_from(ShiftedUint2DynamicActPerBucketFloat)), x)
    fine = weight_grad(sign_exact(codec_from(ShiftedUint8DynamicActPerBucketFloat)), x)
    assert (nearest - exact).abs().max() > 10 * (fine - exact).abs().max() > 0
