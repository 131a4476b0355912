"""Rotation and levels as Brevitas components, alone and in layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.nn import QuantIdentity, QuantLinear
from torch import Tensor

from brevitas_bp import codec_from, quant
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.levels import BucketLevelQuant, NormalLevels, UnbiasedScaling
from brevitas_bp.core.rotation import RandomRotation
from brevitas_bp.format.random import derive, seeded
from brevitas_bp.format.rotation import sign_words
from brevitas_bp.format.stages import CENTRED, NORMAL, ROTATED, ROTATED_TWICE, UNBIASED
from brevitas_bp.quant.act import rotated
from tests.stats import normal
from tests.strategies import DTYPES, dtype_name, normals
from tests.support import same_bits

CONFIGS = [getattr(quant, name) for name in rotated.__all__]
LEVELS = [config for config in CONFIGS if "Normal" in config.__name__]
DITHERED = [config for config in CONFIGS if "Dithered" in config.__name__]
STRICT = [config for config in DITHERED if "Rotated" in config.__name__]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def value_of(quantizer: Any, x: Tensor, seed: int) -> Tensor:
    with torch.no_grad(), seeded(seed):
        return quantizer(x)[0]


# The rotation.


@pytest.mark.parametrize("rotations", [1, 2])
def test_the_module_rotates_as_the_row(rotations: int) -> None:
    rotation, x = RandomRotation(rotations), normals((5, 64)).float()
    row = rotation.bucket_stage("transform_impl")
    assert row is (ROTATED, ROTATED_TWICE)[rotations - 1]
    assert rotation.bucket_stage("scaling_impl") is None
    with seeded(8):
        signs = rotation.draw(x)
    assert torch.equal(signs, sign_words(torch.arange(5), 64, 8))
    y = rotation(x, signs)
    assert torch.equal(y, row.apply(x, torch.arange(5), 8))
    assert torch.equal(rotation.inverse(y, signs), row.undo(y, torch.arange(5), 8))
    torch.testing.assert_close(rotation.inverse(y, signs), x)


def test_each_call_draws_other_signs_and_torch_governs_them() -> None:
    rotation, x = RandomRotation(), torch.zeros(4, 32)
    torch.manual_seed(2)
    first, second = rotation.draw(x), rotation.draw(x)
    torch.manual_seed(2)
    assert torch.equal(rotation.draw(x), first) and not torch.equal(first, second)
    assert first.shape == (4, 2) and first.dtype == torch.int32
    assert derive(1, 2) != derive(1, 3)


@pytest.mark.parametrize("rotations", [0, 3, "2"])
def test_another_number_of_rotations_is_refused(rotations: Any) -> None:
    with pytest.raises(ValueError, match="rotations must be 1 or 2"):
        RandomRotation(rotations)


def test_a_rotation_is_linear_for_autograd() -> None:
    rotation, x = RandomRotation(), normals((2, 32)).requires_grad_()
    signs, weights = rotation.draw(x), normals((2, 32), 1)
    (rotation(x, signs) * weights).sum().backward()
    # The transposed map: H is symmetric, and inverse() lacks the division by the size.
    expected = rotation.inverse(weights, signs) / 32**2
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("operator", ["sign_words_like", "metadata_words_like"])
def test_operators_have_the_shapes_that_tracing_expects(operator: str) -> None:
    function = getattr(torch.ops.brevitas_bp, operator)
    real = function(torch.zeros(3, 48))
    fake = function(torch.zeros(3, 48, device="meta"))
    assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


# Levels.


def test_parts_of_levels_name_their_rows() -> None:
    assert NormalLevels().bucket_stage("levels_impl") is NORMAL
    assert NormalLevels().bucket_stage("other") is None
    assert UnbiasedScaling().bucket_stage("scaling_impl") is CENTRED
    assert UnbiasedScaling(remove_mean=False).bucket_stage("scaling_impl") is UNBIASED
    assert UnbiasedScaling().bucket_stage("other") is None


def test_the_scale_keeps_the_length_along_the_values() -> None:
    scaling, levels = UnbiasedScaling(), NormalLevels()
    x = normals((10, 64), 3)
    q = levels.restore(levels(x / scaling.spread(x), 2), 2)
    scale = scaling(x, q)
    torch.testing.assert_close((scale * q * x).sum(-1), x.square().sum(-1))
    assert torch.equal(scaling(torch.zeros(1, 8), torch.ones(1, 8)), torch.zeros(1, 1))


@pytest.mark.parametrize("width", [0, 9])
def test_a_width_that_does_not_fit_a_byte_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="BucketLevelQuant: bit_width must be an integer in"):
        BucketLevelQuant(
            NormalLevels(), UnbiasedScaling(), BitWidthConst(width), OverBucketView(64, True))


def test_levels_without_a_rotation_are_biased() -> None:
    # Positive control: every draw has the same error.
    plain = quant.RotatedNormal2DynamicActPerBucketFloat.let(transform_impl=None).tensor_quant
    x = normals((256,), 1).float()
    values = [value_of(plain, x, seed) for seed in range(3)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
    assert (values[0] - x).norm() > 0.3 * x.norm()


# Quantizers in layers.


@each_config
def test_a_layer_returns_values_near_its_input(config: Any) -> None:
    x = normals((3, 700)).float()
    value = QuantIdentity(config, return_quant_tensor=False)(x)
    assert value.shape == x.shape
    bits = min(codec_from(config).bit_widths)
    # Of all configs, dithered codes in the range of the whole tensor have the largest error.
    assert (value - x).norm() / x.norm() < 8 / 2**bits


@each_config
def test_each_pass_draws_anew_also_in_eval(config: Any) -> None:
    quantizer, x = config.tensor_quant, normals((700,)).float()
    assert same_bits(value_of(quantizer, x, 1), value_of(quantizer, x, 1))
    assert same_bits(value_of(quantizer.eval(), x, 1), value_of(quantizer.train(), x, 1))
    assert not torch.equal(quantizer(x)[0], quantizer(x)[0])


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@each_config
def test_a_copy_computes_the_same(config: Any, clone: Callable[[Any], Any]) -> None:
    quantizer, x = config.tensor_quant, normals((700,)).float()
    assert same_bits(value_of(clone(quantizer), x, 1), value_of(quantizer, x, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@each_config
def test_the_forward_returns_what_brevitas_expects(config: Any, dtype: torch.dtype) -> None:
    quantizer = config.tensor_quant
    value, scale, zero_point, bit_width = quantizer(normals((3, 700)).to(dtype))
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    buckets = 1 if "PerTensor" in config.__name__ else 9
    assert value.dtype == dtype and scale.dtype == zero_point.dtype == computed
    assert scale.shape == (buckets, 1) and zero_point.numel() in (1, buckets)
    assert set(bit_width.flatten().tolist()) <= set(quantizer.bit_widths)


@each_config
def test_an_empty_tensor_is_returned(config: Any) -> None:
    x = torch.empty(0, 3)
    assert config.tensor_quant(x)[0] is x


@each_config
def test_an_observer_passes_values_through(config: Any) -> None:
    quantizer, x = config.tensor_quant, normals((700,)).float()
    quantizer.observer_only = True
    assert quantizer(x)[0] is x


# Gradients.


def gradient(config: Any, x: Tensor, weights: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    layer = QuantIdentity(config, return_quant_tensor=False, **settings)
    with seeded(seed):
        (layer(leaf) * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("config", LEVELS, ids=lambda config: config.__name__)
@pytest.mark.parametrize("metadata_dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_the_gradient_of_levels_is_that_of_the_identity(
        config: Any, metadata_dtype: torch.dtype) -> None:
    x, weights = normals((3, 700)).float(), normals((3, 700), 1).float()
    assert torch.equal(gradient(config, x, weights, metadata_dtype=metadata_dtype), weights)


@pytest.mark.parametrize("config", DITHERED, ids=lambda config: config.__name__)
def test_the_gradient_of_dithered_codes_differs_at_the_ends_of_a_range_only(config: Any) -> None:
    x, weights = normals((768,)).float(), normals((768,), 1).float()
    difference = (gradient(config, x, weights) - weights).view(-1, 256)
    if config in STRICT:
        # The ends are those of the rotated bucket: turn the difference as the forward pass did.
        with seeded(0):
            rotation = RandomRotation(1)
            difference = rotation(difference, rotation.draw(difference)) * 16
    for bucket in difference:
        large = bucket.abs() > 1e-4 * weights.norm()
        assert int(large.sum()) <= 2
    assert difference.isfinite().all()


@pytest.mark.parametrize("config", STRICT[:2], ids=lambda config: config.__name__)
def test_the_mean_gradient_of_strict_mode_is_that_of_the_identity(config: Any) -> None:
    x, weights, draws = normals((256,)).float(), normals((256,), 1).float(), 200
    found = torch.stack([gradient(config, x, weights, seed) for seed in range(draws)])
    deviation = found.std(0) / draws**0.5
    # Student's distribution with 199 degrees of freedom has heavier tails; a quarter more is enough.
    assert ((found.mean(0) - weights).abs() < 1.25 * normal(256) * deviation + 1e-5).all()


@each_config
def test_the_gradient_of_a_constant_bucket_is_finite(config: Any) -> None:
    for value in (3.7, 0.0):
        found = gradient(config, torch.full((300,), value), torch.ones(300))
        assert found.isfinite().all()


@each_config
def test_a_linear_layer_with_a_quantized_input_trains(config: Any) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(64, 32, bias=True, input_quant=config, weight_quant=None)
    x = normals((16, 64)).float().requires_grad_()
    with seeded(5):
        out = layer(x)
    out.square().sum().backward()
    assert out.shape == (16, 32) and isinstance(out, Tensor)
    assert x.grad is not None and layer.weight.grad is not None
    with torch.no_grad(), seeded(5):
        stored = layer.input_quant(x)
        value = getattr(stored, "value", stored)
    upstream = 2 * out.detach()
    torch.testing.assert_close(layer.weight.grad, upstream.T @ value, rtol=1e-4, atol=1e-4)
    if config in LEVELS:
        torch.testing.assert_close(x.grad, upstream @ layer.weight.detach())
