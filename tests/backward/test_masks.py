"""Float masks of attention: one bit for two values, once for all layers, at their own size."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import listening

BATCH, HEADS, TIME, FEATURES, LAYERS = 2, 4, 64, 8, 3
_FUTURE = torch.ones(TIME, TIME).triu(1).bool()


def _additive(low: float) -> Tensor:
    return torch.zeros(TIME, TIME).masked_fill(_FUTURE, low)


MASKS: dict[str, Callable[[], Tensor]] = {
    "inf": lambda: _additive(-math.inf)[None, None].repeat(BATCH, 1, 1, 1),
    "lowest": lambda: _additive(torch.finfo(torch.float32).min)[None, None].repeat(BATCH, 1, 1, 1),
    "of a product": lambda: (1 - (~_FUTURE).float()) * torch.finfo(torch.float32).min,
    "expanded": lambda: _additive(-math.inf)[None, None].expand(BATCH, HEADS, TIME, TIME)}


class Decoder(nn.Module):
    """Attention layers that share a mask, of which each takes its own view."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * FEATURES
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).view(BATCH, TIME, 3, HEADS, FEATURES).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., :k.shape[-2]])
            x = x + y.transpose(1, 2).reshape(x.shape)
        return x


def masks_of(model: QuantBackwardWrapper, x: Tensor, mask: Tensor) -> tuple[Tensor, list[Packed]]:
    """Returns the output, and what is stored for each saved tensor of the mask's size."""
    found: list[Packed] = []

    def note(saved: SavedTensor, packed: Packed, decision: Decision, originals: Any) -> None:
        if saved.tensor.shape[-2:] == (TIME, TIME):
            found.append(packed)

    with listening(model, note):
        return model(x, mask), found


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("attention", ["replay", "exact"])
@pytest.mark.parametrize("name", MASKS)
def test_a_bit_for_all_layers_together(name: str, attention: Any, amp: bool) -> None:
    model = QuantBackwardWrapper(Decoder(), policy=OpAware(attention=attention), seed=0)
    x, mask = torch.randn(BATCH, TIME, HEADS * FEATURES), MASKS[name]()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        plain = model.module(x, mask)
        out, found = masks_of(model, x, mask)
    assert torch.equal(out, plain)
    if attention == "exact" and not found:
        pytest.skip("this kernel saves no mask")
    assert all(packed.codec.name == "mask of two values" for packed in found)
    if attention == "replay":
        elements = mask.untyped_storage().nbytes() // 4
        assert len(found) == LAYERS and all(packed is found[0] for packed in found)
        assert found[0].nbytes == elements // 8


def test_the_gradient_is_that_of_an_exact_mask() -> None:
    x, mask = torch.randn(BATCH, TIME, HEADS * FEATURES), MASKS["inf"]()
    grads = []
    for given in (mask, mask == 0):
        model = QuantBackwardWrapper(Decoder(), policy=OpAware(attention_bits=None), seed=0)
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(model(leaf, given).square().sum(), leaf)[0])
    torch.testing.assert_close(*grads)


def test_other_masks_are_exact() -> None:
    model = QuantBackwardWrapper(Decoder(), seed=0)
    x = torch.randn(BATCH, TIME, HEADS * FEATURES)
    distances = MASKS["inf"]() - torch.arange(float(TIME))
    learned = torch.randn(1, HEADS, TIME, TIME, requires_grad=True)
    for mask in (distances, learned):
        out, found = masks_of(model, x, mask)
        assert {packed.codec.name for packed in found} == {"exact"}
        assert out.isfinite().all()
    out.sum().backward()
    assert learned.grad is not None


def test_a_mask_that_changes_between_layers_is_stored_twice() -> None:
    class Changed(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            mask = mask.clone()
            mask[..., 5] = 0.0
            return F.scaled_dot_product_attention(first, q, q, attn_mask=mask)

    q = torch.randn(BATCH, HEADS, TIME, FEATURES, requires_grad=True)
    model = QuantBackwardWrapper(Changed(), policy=OpAware(attention_bits=None), seed=0)
    with track_saved_memory(model):
        _, found = masks_of(model, q, _additive(-math.inf))
    assert len({id(packed) for packed in found}) == 2
