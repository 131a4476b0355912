"""EfficientNetV2 compared with torchvision's, and tests of the small variants."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brevitas_bp.models import (
    EfficientNetV2,
    StageConfig,
    efficientnet_v2_l,
    efficientnet_v2_m,
    efficientnet_v2_nano,
    efficientnet_v2_s,
    efficientnet_v2_tiny,
    nominal_megabytes,
    stage_output_elements,
    stage_output_shapes,
    thesis_efficientnet_v2,
)
from tests.support import import_torchvision

Build = Callable[..., EfficientNetV2]

BUILDERS: list[Build] = [
    efficientnet_v2_s,
    efficientnet_v2_m,
    efficientnet_v2_l,
    efficientnet_v2_tiny,
    efficientnet_v2_nano,
    thesis_efficientnet_v2,
]
STAGE = StageConfig("mbconv", 4, 3, 2, 8, 16, layers=2)
CIFAR_BATCH = (128, 3, 32, 32)


def theirs(name: str, **kwargs: Any) -> nn.Module:
    """Returns torchvision's model with random weights."""
    return getattr(import_torchvision().models, name)(weights=None, **kwargs)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def on_meta(build: Build, **kwargs: Any) -> EfficientNetV2:
    with torch.device("meta"):
        return build(**kwargs)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert list(a) == list(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


def drop_probabilities(model: nn.Module) -> list[float]:
    """Returns the probabilities of stochastic depth and dropout; both libraries call it `p`."""
    return [float(vars(module)["p"]) for module in model.modules() if "p" in vars(module)]


def layer_settings(model: nn.Module) -> list[str]:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    return [repr(module) for module in model.modules() if isinstance(module, kinds)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


def train_step(model: nn.Module, images: Tensor, seed: int) -> Tensor:
    """Returns the output of a forward pass in training mode; leaves gradients on the parameters."""
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(images)
    output.square().mean().backward()
    return output.detach()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """Returns our S and torchvision's, each built with one seed; ten classes keep it quick."""
    ours = seeded(1, partial(efficientnet_v2_s, num_classes=10))
    return ours, seeded(1, partial(theirs, "efficientnet_v2_s", num_classes=10))


def test_importing_torchvision_twice_gives_the_same_module() -> None:
    assert import_torchvision() is import_torchvision()


@pytest.mark.parametrize("build", [efficientnet_v2_s, efficientnet_v2_m, efficientnet_v2_l])
def test_names_order_shapes_and_settings_are_torchvisions(build: Build) -> None:
    ours = on_meta(build)
    with torch.device("meta"):
        reference = theirs(build.__name__)
    ours_state, reference_state = ours.state_dict(), reference.state_dict()
    assert list(ours_state) == list(reference_state)
    for name, tensor in reference_state.items():
        assert (ours_state[name].shape, ours_state[name].dtype) == (tensor.shape, tensor.dtype)
    # Settings that no tensor shows: strides, padding, groups and epsilons, then the drops.
    assert layer_settings(ours) == layer_settings(reference)
    assert drop_probabilities(ours) == drop_probabilities(reference)


def test_the_same_seed_gives_torchvisions_initial_weights(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    ours, reference = pair
    assert differing(ours.state_dict(), reference.state_dict()) == []


def test_state_dicts_load_strictly_both_ways(
    pair: tuple[nn.Module, nn.Module], images: Tensor
) -> None:
    ours, reference = pair
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.25)
    assert differing(ours.state_dict(), reference.state_dict())  # control: now they differ
    ours.load_state_dict(reference.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), reference.eval()(images))
    reference.load_state_dict(ours.state_dict(), strict=True)


def test_training_matches_torchvision_bit_for_bit(
    pair: tuple[nn.Module, nn.Module], images: Tensor
) -> None:
    ours, reference = pair
    assert torch.equal(train_step(ours, images, 7), train_step(reference, images, 7))
    ours_gradients = gradients(ours)
    assert len(ours_gradients) == len(list(reference.parameters()))
    assert differing(ours_gradients, gradients(reference)) == []
    # Batch-norm statistics changed alike, so evaluation agrees after training too.
    assert differing(ours.state_dict(), reference.state_dict()) == []
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), reference.eval()(images))


def test_control_another_seed_changes_the_training_output(images: Tensor) -> None:
    model = efficientnet_v2_s(num_classes=10)
    assert not torch.equal(train_step(model, images, 7), train_step(model, images, 8))


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_stem_stride_decides_the_size_of_every_stage(stem_stride: int) -> None:
    model = on_meta(efficientnet_v2_s, stem_stride=stem_stride)
    shapes = stage_output_shapes(model, (2, 3, 32, 32))
    sides = [shape[-1] * stem_stride for shape in list(shapes.values())[:-1]]
    assert sides == [32, 32, 16, 8, 4, 4, 2, 2]
    assert shapes["pool"] == (2, 1280, 1, 1)


def test_options_reach_the_network() -> None:
    model = efficientnet_v2_nano(
        num_classes=7,
        in_channels=1,
        dropout=0.25,
        stochastic_depth_prob=0.5,
        norm_layer=partial(nn.GroupNorm, 4),
    )
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    # Five blocks, with probabilities linear from 0; then the classifier.
    assert drop_probabilities(model) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.25]


BAD_STAGES: list[tuple[str, object]] = [
    ("kind", "dense"),
    ("expand_ratio", 0),
    ("kernel", 4),
    ("kernel", -1),
    ("stride", 3),
    ("in_channels", 0),
    ("out_channels", -8),
    ("layers", 0),
]


@pytest.mark.parametrize(("field", "value"), BAD_STAGES)
def test_bad_stage_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"StageConfig\.{field} must be .*, got {value!r}"):
        replace(STAGE, **{field: value})  # pyright: ignore[reportArgumentType]


BAD_OPTIONS: list[tuple[str, object]] = [
    ("num_classes", 0),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("dropout", float("nan")),
    ("stochastic_depth_prob", 1.5),
    ("in_channels", 0),
    ("stem_stride", 4),
]


@pytest.mark.parametrize("build", [efficientnet_v2_s, efficientnet_v2_nano])
@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_bad_option_is_refused(build: Build, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"efficientnet_v2: {option} must be .*, got {value!r}"):
        build(**{option: value})


def test_bad_network_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one StageConfig"):
        EfficientNetV2([], 32)
    with pytest.raises(ValueError, match="head_channels must be at least 1, got 0"):
        EfficientNetV2([STAGE], 0)
    with pytest.raises(ValueError, match=r"stages\[1\]\.in_channels must be 16, .*, got 8"):
        EfficientNetV2([STAGE, STAGE], 32)
    with pytest.raises(TypeError, match="stem_strid"):
        efficientnet_v2_nano(stem_strid=1)  # pyright: ignore[reportCallIssue]


def test_thesis_table_of_stage_outputs() -> None:
    shapes = stage_output_shapes(on_meta(thesis_efficientnet_v2), CIFAR_BATCH)
    assert shapes == {
        "stem": (128, 24, 32, 32),
        "stage1": (128, 24, 32, 32),
        "stage2": (128, 48, 16, 16),
        "stage3": (128, 80, 8, 8),
        "stage4": (128, 160, 4, 4),
        "stage5": (128, 272, 4, 4),
        "stage6": (128, 384, 4, 4),
        "head": (128, 1280, 4, 4),
        "pool": (128, 1280, 1, 1),
    }


def test_thesis_table_of_nominal_megabytes() -> None:
    elements = stage_output_elements(on_meta(thesis_efficientnet_v2), CIFAR_BATCH)
    float32 = [nominal_megabytes(count, bits=32) for count in elements.values()]
    assert float32 == [12.0, 12.0, 6.0, 2.5, 1.25, 2.125, 3.0, 10.0, 0.625]
    total = sum(elements.values())
    assert total == 12_976_128
    assert nominal_megabytes(total, bits=32) == 49.5
    assert nominal_megabytes(total, bits=4) == 6.1875
    assert nominal_megabytes(total, bits=2) == 3.09375


@pytest.mark.parametrize(("elements", "bits"), [(-1, 4), (8, 0), (8, -2)])
def test_bad_nominal_arguments_are_refused(elements: int, bits: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        nominal_megabytes(elements, bits)


@pytest.mark.parametrize("shape", [(3, 32, 32), (0, 3, 32, 32)])
def test_bad_input_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape must be"):
        stage_output_shapes(on_meta(efficientnet_v2_nano), shape)


def test_measuring_shapes_leaves_the_model_as_it_was() -> None:
    model = efficientnet_v2_nano(dropout=0.5, stochastic_depth_prob=0.5)
    model.features[1].eval()  # a mixture of modes must be preserved
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()

    shapes = stage_output_shapes(model, (1, 3, 16, 16))

    assert [module.training for module in model.modules()] == modes
    assert differing(model.state_dict(), state) == []
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())
    # The meta device must report what a real pass gives.
    x = torch.zeros(1, 3, 16, 16)
    for name, module in model.eval().named_stages().items():
        x = module(x)
        assert shapes[name] == tuple(x.shape)


def test_measuring_shapes_cleans_up_after_an_error() -> None:
    model = efficientnet_v2_nano(in_channels=1)
    with pytest.raises(RuntimeError, match="channel"):
        stage_output_shapes(model, (1, 3, 16, 16))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("build", BUILDERS)
def test_every_variant_names_its_stages_and_can_be_measured(build: Build) -> None:
    model = on_meta(build)
    names = list(stage_output_elements(model, (2, 3, 32, 32)))
    body = [f"stage{i}" for i in range(1, len(model.features) - 1)]
    assert names == ["stem", *body, "head", "pool"]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (efficientnet_v2_nano, (8, 1, 8, 8)),
        (efficientnet_v2_nano, (8, 1, 16, 16)),
        (efficientnet_v2_tiny, (8, 3, 32, 32)),
    ],
)
def test_small_variants_train(build: Build, shape: tuple[int, ...]) -> None:
    """Every parameter gets a finite gradient, and the model overfits eight images."""
    torch.manual_seed(0)
    model = build(in_channels=shape[1])
    assert 50_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 600_000
    inputs, labels = torch.randn(shape), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(grad.isfinite().all() for grad in gradients(model).values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
