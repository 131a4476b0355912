"""H1, H2: each version of a storage is encoded once, and never identified by its address."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor, codec_from, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import listening
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import Apply, HalfCodec, assert_same, run


def whole_numbers(*shape: int) -> Tensor:
    """Returns values that float16 holds exactly."""
    return torch.randint(-8, 9, shape).float()


def half_wrapped(module: nn.Module) -> tuple[QuantBackwardWrapper, HalfCodec]:
    half = HalfCodec()
    return QuantBackwardWrapper(module, policy=lambda saved: half), half


def attention(x: Tensor, *weights: Tensor) -> Tensor:
    return sum((F.linear(x, w) for w in weights), torch.zeros(()))


#: name -> (module, number of its inputs, how often autograd saves the shared tensor)
SHARED: dict[str, tuple[nn.Module, int, int]] = {
    "relu and conv": (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)), 1, 2),
    "x * x": (Apply(torch.mul), 2, 2),
    "q, k, v": (Apply(attention, *(nn.Parameter(torch.eye(16)) for _ in range(3))), 1, 3),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_tensor_is_encoded_once(name: str) -> None:
    module, inputs, saves = SHARED[name]
    x = whole_numbers(2, 4, 8, 16).requires_grad_()
    hooked: list[int] = []

    def naive(saved: Tensor) -> Tensor:
        hooked.append(saved.untyped_storage()._cdata)
        return saved

    with saved_tensors_hooks(naive, lambda saved: saved):
        output = module(*[x] * inputs)
    assert max(map(hooked.count, hooked)) == saves  # the control: packed for each operation

    model, half = half_wrapped(module)
    with track_saved_memory(model) as report:
        output = model(*[x] * inputs)
    assert len(half.seeds) == report.tensors == 1
    assert output.requires_grad


def test_tensor_that_was_modified_between_two_saves_is_encoded_again() -> None:
    def twice(x: Tensor) -> Tensor:
        y = x * 1
        first = y.square()
        with torch.no_grad():
            y.add_(1)
        return first + y.square()

    module, x = Apply(twice), whole_numbers(16, 16)
    model, half = half_wrapped(module)
    grad = run(model, x, copied=False).grads["input 0"]
    # Plain autograd refuses this graph. Each square must see the value at the time it was saved.
    leaf = x.clone().requires_grad_()
    output = leaf.square() + (leaf + 1).square()
    output.backward(torch.linspace(-1, 2, 256).cos().view(16, 16))
    assert len(half.seeds) == 2
    assert torch.equal(grad, leaf.grad)  # pyright: ignore[reportArgumentType]


def test_views_with_other_strides_are_tensors_of_their_own() -> None:
    model, half = half_wrapped(Apply(lambda x: (x.t().square() + x.square()).sum()))
    x = whole_numbers(16, 16).requires_grad_()
    model(x).backward()
    assert len(half.seeds) == 2
    assert torch.equal(x.grad, 4 * x)  # pyright: ignore[reportArgumentType]


def test_negated_view_is_not_taken_for_what_it_negates() -> None:
    # z.conj().imag has the memory and strides of z.imag, and the other sign.
    a, b = (nn.Parameter(torch.zeros(16, 16)) for _ in range(2))
    z = torch.complex(whole_numbers(16, 16), whole_numbers(16, 16))
    model, half = half_wrapped(Apply(lambda a, b: z.imag * a + z.conj().imag * b, a, b))
    model().sum().backward()
    assert len(half.seeds) == 2
    assert torch.equal(a.grad, z.imag)  # pyright: ignore[reportArgumentType]
    assert torch.equal(b.grad, -z.imag)  # pyright: ignore[reportArgumentType]


class Recycled(nn.Module):
    """Makes many short-lived tensors, so that the allocator reuses addresses."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for k in range(1, 30):
            shifted = x + k
            total = total + (shifted * shifted).sum()
        return total


def test_freed_address_is_not_taken_for_the_tensor_that_was_there() -> None:
    x = whole_numbers(64, 64)
    by_address: dict[Any, Tensor] = {}

    def naive(saved: Tensor) -> Tensor:
        key = saved.data_ptr(), saved.shape
        return by_address.setdefault(key, saved.detach().half())

    plain = run(Recycled(), x).grads
    with saved_tensors_hooks(naive, lambda packed: packed.float()):
        naively = run(Recycled(), x).grads
    assert not torch.equal(naively["input 0"], plain["input 0"])  # the control: addresses collide

    model, half = half_wrapped(Recycled())
    assert_same(run(model, x, copied=False).grads, plain)
    assert len(half.seeds) == 29


def test_payload_of_a_freed_graph_is_not_reused() -> None:
    def forgetful(x: Tensor) -> Tensor:
        y = x * 1
        y.square()  # its graph is freed at once, and the payload with it
        return y.square()

    model, half = half_wrapped(Apply(forgetful))
    x = whole_numbers(16, 16).requires_grad_()
    model(x).sum().backward()
    assert len(half.seeds) == 2
    assert torch.equal(x.grad, 2 * x)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy", ["all_but_relu", "op_aware"])
def test_same_tensor_under_two_codecs_has_both_payloads(policy: str) -> None:
    # H6: the output of a ReLU that also feeds a convolution is stored as mask and as codes.
    packed: list[Packed] = []
    model = QuantBackwardWrapper(
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3)), policy=policy, seed=0)

    def note(saved: object, p: Packed, decision: object, originals: object) -> None:
        packed.append(p)

    x = torch.randn(2, 4, 16, 16)
    with listening(model, note):
        output = model(x.requires_grad_())
    mask, codes = (p.decode() for p in packed)
    assert torch.equal(mask > 0, x > 0)
    # 2 bits: within a step of the ReLU's output, unlike a mask of 0 and 1.
    assert 0 < (codes - x.relu()).abs().max() <= x.max() / 3 * 1.001
    assert x.max() > 1.5 * 1.001
    del output


def test_codecs_of_different_quantizers_share_nothing() -> None:
    nearest = codec_from(ShiftedUint2DynamicActPerBucketFloat, bucket_size=64, bit_width=4)
    random = codec_from(ShiftedUint4DynamicActPerBucketFloatStochastic, bucket_size=64)

    class Mine(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            wanted = {"mul": nearest, "linear": random}.get(str(saved.op))
            return decision if decision.codec is None or wanted is None else (
                decision._replace(codec=wanted))

    weight = nn.Parameter(torch.randn(64))
    layer = nn.Linear(64, 64)
    model = QuantBackwardWrapper(Apply(lambda x: (x * weight).sum() + layer(x).sum()), policy=Mine())
    model(torch.randn(32, 64))
    assert {(site.op, site.stored) for site in model.explain().sites.values()} >= {
        ("mul", "4-bit nearest"), ("linear", "4-bit stochastic")}
