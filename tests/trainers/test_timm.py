"""Models of timm without pretrained weights: forward, exact gradients, and what the policy stores."""

import copy
from typing import Any

import pytest
import torch
import torchvision_first  # noqa: F401
from model_coverage import measure
from timm import create_model
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper

_WINDOWS = {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 64}

#: One small model per family: model -> (settings, pixels, least ratio for a batch of two).
MODELS: dict[str, tuple[dict[str, Any], int, float]] = {
    "resnet10t": ({}, 64, 9.0),
    # With two small images, batch norms have fewer than 16 elements per statistic and are exact.
    "tf_efficientnetv2_b0": ({}, 64, 5.0),
    "convnext_atto": ({}, 64, 8.0),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, 64, 4.0),
    "swin_tiny_patch4_window7_224": (_WINDOWS, 56, 3.0),
    "mixer_s32_224": ({}, 224, 8.0),
    "regnetx_002": ({}, 64, 5.0),
    "mobilenetv3_small_050": ({}, 64, 7.0),
    # Standardised weights are exact, and large compared with two small images.
    "nf_regnet_b0": ({}, 64, 1.0),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, 64, 4.0),
    "xcit_nano_12_p16_224": ({"depth": 4}, 64, 4.0),
    "poolformer_s12": ({}, 64, 8.0),
}


def gradients(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module(images).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_exact_gradients(name: str) -> None:
    settings, pixels, least = MODELS[name]
    torch.manual_seed(0)
    module = create_model(name, pretrained=False, **settings).train()
    images = torch.randn(2, 3, pixels, pixels)
    twin = QuantBackwardWrapper(copy.deepcopy(module), policy="exact")
    row = measure(name, copy.deepcopy(module), (images,))
    assert (row.forward, row.gradients, row.unknown) == ("identical", "finite", [])
    assert row.ratio > least
    plain, exact = gradients(module, images), gradients(twin, images)
    assert plain.keys() == exact.keys()
    assert all(torch.equal(exact[key], grad) for key, grad in plain.items())
