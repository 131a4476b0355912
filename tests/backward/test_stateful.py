"""H20: quantizers that learn their ranges, one per saved tensor, with a snapshot in the payload."""

from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.quant import StochasticRounding
from tests.backward.support import QUANTIZING, Apply

STOCK = [Int8ActPerTensorFloat, ShiftedUint8ActPerTensorFloat]
SMALL, LARGE = torch.linspace(-1, 1, 4096).view(64, 64), torch.linspace(-50, 70, 4096).view(64, 64)


class Two(nn.Module):
    """Saves a small and a large tensor; their gradients show the stored values."""

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        return small.square().sum() + large.square().sum()


def bound(x: Tensor) -> Tensor:
    """Returns one 8-bit step over at most twice the largest magnitude, clipped top end included."""
    return 2 * x.abs().max() / 255 * 1.01


def stored(model: nn.Module) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (SMALL, LARGE)]
    return [g / 2 for g in torch.autograd.grad(model(*leaves), leaves)]


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("quantizer", STOCK, ids=lambda q: q.__name__)
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
def test_each_saved_tensor_has_statistics_of_its_own(
        quantizer: Any, storage: Any, policy: str) -> None:
    model = QuantBackwardWrapper(
        Two(), quantizer, policy=policy, collect_stats_steps=3, storage=storage)
    for _ in range(5):  # first while collecting, then with the learned scale
        small, large = stored(model)
        for seen, x in ((small, SMALL), (large, LARGE)):
            assert (seen - x).abs().max() <= bound(x)
            assert not torch.equal(seen, x)
    assert len(list(model.quantizer_modules())) == 2


def test_one_shared_quantizer_mixes_up_the_ranges() -> None:
    quantizer = Int8ActPerTensorFloat.let(collect_stats_steps=3).tensor_quant
    with saved_tensors_hooks(lambda x: quantizer(x.detach())[0], lambda x: x):
        small = [stored(Two())[0] for _ in range(5)][-1]
    assert (small - SMALL).abs().max() > 3 * bound(SMALL)  # the control: a scale made for LARGE


@pytest.mark.parametrize("policy", QUANTIZING)
def test_payload_is_not_changed_by_later_statistics(policy: str) -> None:
    def first_gradient(later: bool) -> Tensor:
        model = QuantBackwardWrapper(
            Apply(torch.square), Int8ActPerTensorFloat, policy=policy, collect_stats_steps=5)
        leaf = SMALL.clone().requires_grad_()
        loss = model(leaf).sum()
        if later:
            model(LARGE.clone().requires_grad_())
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(first_gradient(later=False), first_gradient(later=True))


def test_live_scale_changes_what_a_naive_payload_decodes_to() -> None:
    scale = torch.tensor(1.0)

    def pack(x: Tensor) -> Tensor:
        scale.copy_(x.detach().abs().max() / 127)
        return (x.detach() / scale).round()

    leaf = SMALL.clone().requires_grad_()
    with saved_tensors_hooks(pack, lambda codes: codes * scale):
        loss = leaf.square().sum()
        LARGE.clone().requires_grad_().square()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad / 2 - SMALL).abs().max() > 10


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
def test_decoding_twice_collects_no_statistics_twice(storage: Any, policy: str) -> None:
    model = QuantBackwardWrapper(
        Two(), Int8ActPerTensorFloat, policy=policy, collect_stats_steps=5, storage=storage)
    stored(model)
    leaves = [(3 * x).requires_grad_() for x in (SMALL, LARGE)]
    loss = model(*leaves)

    def statistics() -> list[Tensor]:
        quantizers = list(model.quantizer_modules())
        return [t.detach().clone() for q in quantizers for t in (*q.buffers(), *q.parameters())]

    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    collected = statistics()
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert collected
    assert all(torch.equal(a, b) for a, b in zip(collected, statistics()))


@pytest.mark.parametrize("policy", QUANTIZING)
def test_stock_quantizer_turned_stochastic_draws_from_the_wrapper(policy: str) -> None:
    class Mine(StochasticRounding, Int8ActPerTensorFloat):
        """A stock quantizer with noise."""

    first, second, other = (
        QuantBackwardWrapper(Two(), Mine, policy=policy, seed=seed) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    draws = [stored(model)[0] for model in (first, second, other)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
