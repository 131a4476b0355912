"""Tensors that follow from what is stored already: outputs of norms, products, attention, copies."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from brevitas_bp import OpAware, QuantBackwardWrapper, register_op, track_saved_memory
from brevitas_bp.backward.operations import weighted
from brevitas_bp.backward.outputs import output_form
from brevitas_bp.backward.saved import Call
from brevitas_bp.backward.seam import listening
from brevitas_bp.codec import Packed
from brevitas_bp.errors import ModifiedInPlaceError
from brevitas_bp.quant import (
    RotatedNormal2DynamicActPerBucketFloat,
    RotatedNormal8DynamicActPerBucketFloat,
)
from tests.backward.support import Apply, Gated, assert_unbiased

WIDTH = 256


def names(module: nn.Module, *inputs: Tensor, **options: Any) -> list[tuple[str, str]]:
    """Returns operation and codec of each tensor that is saved rounded."""
    model, found = QuantBackwardWrapper(module, **options), []
    with listening(model, lambda saved, packed, *_: found.append((saved.op, packed.codec))):
        output = model(*inputs)
    del output
    return [(op, codec.name) for op, codec in found if codec.lossy]


def live_bytes(module: nn.Module, *inputs: Tensor, **options: Any) -> int:
    """Returns the bytes that the saved tensors occupy, each once."""
    model = QuantBackwardWrapper(module, **options)
    with track_saved_memory(model) as report:
        output = model(*inputs)
    del output
    return report.stored_bytes


class WrittenNorm(nn.Module):
    """The RMS norm of language models."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH) if weight is None else weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class PlusOne(WrittenNorm):
    """The same with ``1 + weight``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, True) + 1e-6) * (1.0 + self.weight)


def scales(kind: str) -> Tensor:
    torch.manual_seed(7)
    return {
        "ones": lambda: torch.ones(WIDTH), "near": lambda: torch.empty(WIDTH).uniform_(0.6, 1.4),
        "far": lambda: torch.randn(WIDTH), "zeros": lambda: torch.zeros(WIDTH),
        "some zero": lambda: (torch.arange(WIDTH) % 3).float() - 1}[kind]()


def layer_norm(kind: str, shift: float = 0.0) -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    norm.weight.data, norm.bias.data = scales(kind), torch.full((WIDTH,), shift)
    return norm


def rms_norm(kind: str) -> nn.Module:
    norm = nn.RMSNorm(WIDTH, eps=1e-6)
    norm.weight.data = scales(kind)
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    **{f"layer {kind}": lambda kind=kind: layer_norm(kind)
       for kind in ("ones", "near", "far", "zeros", "some zero")},
    "layer, shifted": lambda: layer_norm("near", 0.5), "layer, far off": lambda: layer_norm("near", 9.0),
    "layer, plain": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer, no shift": lambda: nn.LayerNorm(WIDTH, bias=False),
    **{f"rms {kind}": lambda kind=kind: rms_norm(kind) for kind in ("near", "far", "some zero")},
    "rms, plain": lambda: nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False),
    **{f"written {kind}": lambda kind=kind: WrittenNorm(scales(kind)) for kind in ("near", "far")},
    "written, plus one": lambda: PlusOne(scales("near") - 1)}
each_norm = pytest.mark.parametrize("name", NORMS)


def around(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, 8))


@each_norm
def test_norm_and_layer_store_one_tensor(name: str) -> None:
    x = torch.randn(128, WIDTH)
    module = around(NORMS[name]())
    without = live_bytes(module, x, policy=OpAware(hints=False))
    # An encoding takes two bits for each element, and two numbers for each row. Units may be kept.
    encoding, units = 128 * (WIDTH // 4 + 8), 3 * 4 * WIDTH
    spared = 2 if name.startswith(("rms", "written")) and "plain" not in name else 1
    assert live_bytes(module, x) <= without - spared * encoding + units


@pytest.mark.parametrize("name", [
    "layer near", "layer some zero", "layer, shifted", "layer, far off", "rms far", "rms some zero",
    "written near", "written far", "written, plus one"])
def test_gradients_are_unbiased(name: str) -> None:
    assert_unbiased(around(NORMS[name]()), torch.randn(64, WIDTH))


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_codes_give_exact_gradients(name: str, dtype: torch.dtype) -> None:
    # The way back from the output is right: 8-bit codes hardly move the gradient.
    module = around(NORMS[name]()).to(dtype)
    x = torch.randn(128, WIDTH, dtype=dtype)
    parameters = list(module.parameters())
    exact = torch.autograd.grad(module(x).square().sum(), parameters)
    model = QuantBackwardWrapper(module, RotatedNormal8DynamicActPerBucketFloat)
    rounded = torch.autograd.grad(model(x).square().sum(), parameters)
    allowed = 0.03 if dtype is torch.float32 else 0.1
    for a, b in zip(rounded, exact):
        assert float((a - b).norm()) <= allowed * float(b.norm()) + 1e-5


@each_norm
def test_storages_and_checksums_agree(name: str) -> None:
    assert_storages_agree(around(NORMS[name]()), torch.randn(128, WIDTH))


def assert_storages_agree(module: nn.Module, x: Tensor) -> None:
    found = []
    for options in ({}, {"storage": "quantize_on_backward"}, {"verify": True}):
        model = QuantBackwardWrapper(module, seed=3, **options)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(model(x).square().sum(), list(module.parameters())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, WIDTH), (1, WIDTH), (3, 5, WIDTH), (WIDTH,), (4, 0, WIDTH)])
@pytest.mark.parametrize("name", ["layer far", "layer near", "rms far", "rms near", "written far"])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    module, x = around(NORMS[name]()), torch.randn(*shape)
    assert torch.equal(QuantBackwardWrapper(module)(x), module(x))
    QuantBackwardWrapper(module)(x).sum().backward()


@pytest.mark.parametrize("shape", [(16, 16), (4, 32), (2, 8, 16)])
@pytest.mark.parametrize("turned", [False, True])
def test_norms_over_several_dimensions(shape: tuple[int, ...], turned: bool) -> None:
    # Scales that are far apart are kept as units, in the shape of the norm.
    torch.manual_seed(0)
    norm = nn.LayerNorm(shape)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if turned:
        norm.weight.data, norm.bias.data = (
            torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) for _ in range(2))
    module = nn.Sequential(nn.Linear(shape[-1], shape[-1]), norm, nn.Linear(shape[-1], 8))
    x = torch.randn(128, *shape)
    assert ("layer_norm", "8-bit rotated, as output") in names(
        module, x, act_quant=RotatedNormal8DynamicActPerBucketFloat)
    parameters = list(module.parameters())
    exact = torch.autograd.grad(module(x).square().sum(), parameters)
    model = QuantBackwardWrapper(module, RotatedNormal8DynamicActPerBucketFloat)
    for a, b in zip(torch.autograd.grad(model(x).square().sum(), parameters), exact, strict=True):
        assert float((a - b).norm()) <= 0.03 * float(b.norm()) + 1e-5


def test_values_out_of_order_have_the_right_gradient() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(WIDTH, WIDTH), layer_norm("near")
            self.last = nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x).transpose(0, 1)).transpose(0, 1))

    torch.manual_seed(0)
    module, x = Turned(), torch.randn(8, 16, WIDTH)
    assert_unbiased(module, x)


def test_rows_of_any_size_keep_their_error() -> None:
    # Outliers in one channel, which the norm's scale makes small: the output must not suffer.
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH)
    norm.weight.data[3] = 1e-3
    module, x = nn.Sequential(norm, nn.Linear(WIDTH, 64)), torch.randn(128, WIDTH)
    x[:, 3] *= 1000
    x.requires_grad_()

    def error(policy: Any) -> float:
        model = QuantBackwardWrapper(module, policy=policy, seed=1)
        exact, = torch.autograd.grad(module(x).square().sum(), module[1].weight)
        drawn = [torch.autograd.grad(model(x).square().sum(), module[1].weight)[0] for _ in range(20)]
        return sum(float((d - exact).square().sum()) for d in drawn)

    assert error(OpAware()) <= 1.2 * error(OpAware(hints=False))


def test_two_norms_of_one_tensor_share_it() -> None:
    first, second = layer_norm("ones"), layer_norm("near")
    x = torch.randn(64, WIDTH, requires_grad=True)
    one = live_bytes(Apply(lambda x: first(x)), x)
    both = live_bytes(Apply(lambda x: first(x) + second(x)), x)
    assert both - one <= 2 * 64 * 4


def test_an_output_that_was_changed_is_stored_apart() -> None:
    torch.manual_seed(0)
    norm, last = layer_norm("ones"), nn.Linear(WIDTH, 8)
    module = nn.ModuleList([norm, last])

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            return last(norm(x).mul_(3))

    x = torch.randn(64, WIDTH, requires_grad=True)
    assert live_bytes(Changed(), x) > live_bytes(nn.Sequential(norm, last), x) + 64 * WIDTH // 8
    assert_unbiased(Changed(), x)


def test_a_scale_that_changes_before_backward_is_an_error() -> None:
    norm = layer_norm("near")
    output = QuantBackwardWrapper(norm)(torch.randn(64, WIDTH, requires_grad=True))
    with torch.no_grad():
        norm.bias.add_(1)
    with pytest.raises(ModifiedInPlaceError):
        output.sum().backward()


def test_nothing_is_kept_longer() -> None:
    model, payloads = QuantBackwardWrapper(around(rms_norm("far"))), []

    def note(saved: Any, packed: Packed, *_: Any) -> None:
        payloads.extend(weakref.ref(t) for t in packed.tensors if packed.codec.lossy)

    with listening(model, note):
        output = model(torch.randn(128, WIDTH))
    gc.disable()
    try:
        output.sum().backward()
        del output
        assert payloads and not any(p() is not None for p in payloads)
    finally:
        gc.enable()


class Follows(nn.Module):
    """Counts the tensors of an RMS norm that live after the next layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.weight, self.alive = nn.Parameter(scales("far")), 0

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        h = self.first(x)
        seen.append(weakref.ref(h.untyped_storage()))
        h = rms(h)
        seen.append(weakref.ref(h.untyped_storage()))
        h = h * self.weight
        seen.append(weakref.ref(h.untyped_storage()))
        h = self.last(h).sin().sin()
        self.alive = sum(s() is not None for s in seen)
        return h


def test_no_tensor_of_a_norm_lives_until_the_end_of_the_pass() -> None:
    module = Follows()
    gc.disable()
    try:
        QuantBackwardWrapper(module)(torch.randn(128, WIDTH)).sum().backward()
    finally:
        gc.enable()
    assert module.alive == 0


class Interrupted(nn.Module):
    """An RMS norm that stops half-way."""

    def __init__(self, stop: bool, backward: bool) -> None:
        super().__init__()
        self.stop, self.backward, self.found = stop, backward, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.backward:
            self.found, = torch.autograd.grad(y.sum(), x, retain_graph=True)
        if self.stop:
            raise KeyboardInterrupt
        return y


def test_a_norm_without_its_end_is_stored_all_the_same() -> None:
    x = torch.randn(64, WIDTH, requires_grad=True)
    module = Interrupted(False, True)
    model = QuantBackwardWrapper(module)
    y = model(x)
    assert torch.equal(y, Interrupted(False, False)(x))
    exact, = torch.autograd.grad(Interrupted(False, False)(x).sum(), x)
    assert float((module.found - exact).norm()) < 0.2 * float(exact.norm())
    y.sum().backward()
    assert {name for op, name in names(Interrupted(False, False), x) if op in ("pow", "mul")} == {
        "2-bit rotated"}


def test_an_interrupt_within_a_norm_leaves_nothing() -> None:
    x = torch.randn(64, WIDTH, requires_grad=True)
    model = QuantBackwardWrapper(Interrupted(True, False))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(QuantBackwardWrapper(rms_norm("near"))(x), rms_norm("near")(x))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.sampled_from([16, 24, 64, 256]), st.floats(0, 3), st.floats(-2, 2),
       st.integers(0, 2**31))
def test_forms_lead_back(rows: int, width: int, spread: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, width), torch.randn(width) * spread
    bias = torch.randn(width) * shift
    y = F.layer_norm(x, (width,), weight, bias)
    form = output_form(Call(F.layer_norm, (x, (width,), weight, bias), {}, 0), x, y)
    if form is None:
        return
    normalized = F.layer_norm(x, (width,))
    torch.testing.assert_close(form.normalized()(form.tensor), normalized, rtol=1e-3, atol=2e-4)
    if form.to_output is not None:
        torch.testing.assert_close(form.to_output(form.tensor), y, rtol=1e-4, atol=1e-4)


class Own(nn.Module):
    """A network of a first layer, some function with parameters, and a last layer."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, WIDTH), nn.Linear(WIDTH, 8)
        self.function, self.own = function, nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), *self.own))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def scaled_in_place(x: Tensor, weight: Tensor) -> Tensor:
    y = rms(x)
    y *= weight
    return y


def changed_between(x: Tensor, weight: Tensor) -> Tensor:
    y = rms(x)
    with torch.no_grad():
        y.mul_(3)
    return y * weight


def rows_and_columns(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # Both norms save the same memory, one of them transposed.
    x, turned = x.view(WIDTH, WIDTH), x.view(WIDTH, WIDTH).t()
    rows = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    columns = torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rows * first + (turned * columns).t() * second


TRAPS: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "scales of one row": (lambda x, w: rms(x) * (1 + w), 1, 1),
    "scales of one row, fused": (lambda x, w: F.rms_norm(x, (WIDTH,), 1 + w), 1, 1),
    "scaled in place": (scaled_in_place, 64, 1), "changed between": (changed_between, 64, 1),
    "rows and columns": (rows_and_columns, WIDTH, 2)}


@pytest.mark.parametrize("name", TRAPS)
def test_what_only_looks_like_part_of_a_norm(name: str) -> None:
    function, rows, count = TRAPS[name]
    torch.manual_seed(3)
    module, x = Own(function, *torch.randn(count, WIDTH)), torch.randn(rows, 32)
    parameters = list(module.parameters())
    exact = torch.autograd.grad(module(x).square().sum(), parameters)
    model = QuantBackwardWrapper(module, RotatedNormal8DynamicActPerBucketFloat)
    for a, b in zip(torch.autograd.grad(model(x).square().sum(), parameters), exact):
        assert float((a - b).norm()) <= 0.03 * float(b.norm()) + 1e-5


TWICE: dict[str, Callable[..., Tensor]] = {
    "two norms of one tensor": lambda x, v, w: F.linear(
        F.layer_norm(x, (WIDTH,), v), F.layer_norm(x, (WIDTH,), w)[:8]),
    "a norm and its normalized input": lambda x, v, w: F.linear(rms(x) * v, (rms(x) * w)[:8]),
    "one normalized input": lambda x, v, w: (lambda n: F.linear(n * v, (n * w)[:8]))(rms(x))}


@pytest.mark.parametrize("name", TWICE)
def test_no_rounding_of_a_norm_is_multiplied_by_itself(name: str) -> None:
    class Without(Own):
        def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
            super().__init__(function, *parameters)
            del self.last

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.first(x), *self.own)

    torch.manual_seed(3)
    assert_unbiased(
        Without(TWICE[name], torch.randn(WIDTH), torch.randn(WIDTH)), torch.randn(16, 32))


def centred(x: Tensor, weight: Tensor) -> Tensor:
    """A user's layer that saves a function of its input."""
    if has_torch_function((x, weight)):
        return handle_torch_function(centred, (x, weight), x, weight)
    return F.linear(x - x.mean() + 1, weight)


def test_a_function_of_the_input_is_no_copy_of_it(registry: None) -> None:
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(8, WIDTH)), nn.Linear(WIDTH, 8)
    register_op(centred, weighted())
    module = Apply(lambda x, weight: centred(x, weight) + other(x), weight)
    x = torch.randn(64, WIDTH, requires_grad=True)
    exact, = torch.autograd.grad(module(x).square().sum(), weight)
    model = QuantBackwardWrapper(module, RotatedNormal8DynamicActPerBucketFloat)
    found, = torch.autograd.grad(model(x).square().sum(), weight)
    assert float((found - exact).norm()) < 0.03 * float(exact.norm())


@pytest.mark.parametrize("name", ["layer far", "layer near", "rms far", "written near"])
def test_payloads_can_be_copied(name: str) -> None:
    packed: list[Packed] = []
    model = QuantBackwardWrapper(around(NORMS[name]()))
    with listening(model, lambda saved, found, *_: packed.append(found)):
        output = model(torch.randn(128, WIDTH))
    for one in packed:
        if one.codec.computes:
            for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
                assert torch.equal(copied.decode(), one.decode())
    assert any(one.codec.computes for one in packed)
    del output


# Products of stored factors.


class Squeezed(nn.Module):
    """Squeeze-and-excitation, and the convolution after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.last = (
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        return self.last(x * self.scale(x.mean((2, 3), keepdim=True)).sigmoid()).flatten(1)


FROM_FACTORS = "computed from its factors"


def last_name(module: nn.Module, x: Tensor, **options: Any) -> str:
    return names(module, x, **options)[-1][1]


def test_products_of_stored_factors_take_no_bytes() -> None:
    assert last_name(Gated(), torch.randn(64, 32)) == FROM_FACTORS
    assert last_name(Squeezed(), torch.randn(4, 3, 18, 18)) == FROM_FACTORS
    image = torch.randn(4, 3, 18, 18).contiguous(memory_format=torch.channels_last)
    assert last_name(Squeezed(), image) == FROM_FACTORS


@pytest.mark.parametrize(("change", "options"), [
    (lambda x: x.mul_(2), {}), (lambda x: x * 1.0, {}), (lambda x: x + 0, {}),
    (lambda x: x, {"policy": OpAware(hints=False)}), (lambda x: x, {"policy": "all"}),
    (lambda x: x, {"overrides": {"down": RotatedNormal8DynamicActPerBucketFloat}})])
def test_other_tensors_are_stored(change: Any, options: Any) -> None:
    assert last_name(Gated(change=change), torch.randn(64, 32), **options) != FROM_FACTORS


@pytest.mark.parametrize("module", [Gated, Squeezed])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_products_are_unbiased(module: Any, channels_last: bool) -> None:
    x = torch.randn(32, 32) if module is Gated else torch.randn(4, 3, 12, 12)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_unbiased(module(), x)


def test_storages_and_checksums_of_products_and_attention_agree() -> None:
    assert_storages_agree(Gated(), torch.randn(64, 32))
    assert_storages_agree(Squeezed(), torch.randn(4, 3, 18, 18))
    assert_storages_agree(Attention(), torch.randn(4, 32, 64))


class OwnWeight(nn.Module):
    """A layer whose weight is computed from its input, and so from the same roundings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(32, WIDTH), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.gate(x)) * self.up(x)
        return F.linear(y, y[:8] + y[8:16])


class Both(OwnWeight):
    """A layer with a parameter takes the product first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.gate(x)) * self.up(x)
        return F.linear(y, self.last) + F.linear(y, y[:8] + y[8:16])


def test_a_weight_that_meets_the_same_rounding_gets_another_one() -> None:
    assert_unbiased(Both(), torch.randn(32, 32))
    x = torch.randn(32, 32)
    assert all(name != FROM_FACTORS for _, name in names(OwnWeight(), x))
    assert_unbiased(OwnWeight(), x)


class NormedWeight(nn.Module):
    """The same, for the output of a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(32, WIDTH), layer_norm("near")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return F.linear(y, y[:8] + y[8:16])


def test_a_weight_made_of_a_norms_output_gets_a_rounding_of_its_own() -> None:
    assert_unbiased(NormedWeight(), torch.randn(32, 32))


# The output of attention.


class Attention(nn.Module):
    """Self-attention with a projection."""

    def __init__(self, changed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.changed, self.options = changed, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        y = y.transpose(1, 2).flatten(2)
        return self.out(y.mul_(2) if self.changed else y)


AGAIN = "attention, run again"


class Multiplied(Attention):
    """The same with a matrix product in place of the projection, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.ParameterList([torch.zeros(64), torch.randn(64, 64)])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        bias, weight = self.out
        return torch.addmm(bias, y.view(-1, 64), weight)


def test_matrix_products_with_parameters_are_layers_too() -> None:
    assert last_name(Multiplied(), torch.randn(4, 32, 64)) == AGAIN


@pytest.mark.parametrize(("options", "expected"), [
    ({}, True), ({"policy": OpAware(attention_bits=4)}, False), ({"bit_width": 3}, False),
    ({"policy": OpAware(attention_bits=None)}, True), ({"policy": OpAware(hints=False)}, False),
    ({"policy": OpAware(attention="exact")}, False)])
def test_when_the_output_of_attention_is_computed(options: Any, expected: bool) -> None:
    found = last_name(Attention(), torch.randn(4, 32, 64), **options)
    # The value has two bits, so a layer that asks for more stores its input.
    assert (found == AGAIN) == (expected or options == {"bit_width": 3})
    assert last_name(Attention(changed=True), torch.randn(4, 32, 64), **options) != AGAIN


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_the_projection_has_a_small_bias(options: Any) -> None:
    module, x = Attention(**options), torch.randn(4, 32, 64)
    assert last_name(module, x) == AGAIN
    model = QuantBackwardWrapper(module, RotatedNormal2DynamicActPerBucketFloat, seed=0)

    def gradient(run: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return torch.autograd.grad(run(x).square().sum(), module.out.weight)[0].double()

    exact, drawn = gradient(module), torch.stack([gradient(model) for _ in range(200)])
    by_chance = drawn.var(0).sum() / 200
    off = ((drawn.mean(0) - exact).square().sum() - by_chance).clamp(min=0).sqrt()
    assert float(off / exact.norm()) < 0.01
    assert float((drawn[0] - exact).norm() / exact.norm()) > 0.01


class Detached(Attention):
    """The same with a second head, which sees no history."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y), self.head(y.detach())


@pytest.mark.parametrize("main_first", [True, False, None])
def test_a_head_without_history_needs_no_attention(main_first: bool | None) -> None:
    module, x = Detached(), torch.randn(4, 32, 64)
    main, head = QuantBackwardWrapper(module)(x)
    losses = [main.sum(), head.sum()]
    del main, head
    if main_first is None:
        del losses[0]
    for loss in losses if main_first else losses[::-1]:
        loss.backward()
    grad = module.head.weight.grad
    exact, = torch.autograd.grad(module(x)[1].sum(), module.head.weight)
    assert isinstance(grad, Tensor) and float((grad - exact).norm()) < 0.3 * float(exact.norm())


def test_attention_runs_again_once_for_each_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def run(self: Any, inputs: Any) -> Tensor:
        runs.append(1)
        return self.function(*inputs, *self.rest, **self.options)

    monkeypatch.setattr("brevitas_bp.backward.attention._Replay.run", run)
    module, x = Attention(), torch.randn(4, 32, 64)
    model = QuantBackwardWrapper(module, seed=1)
    output = model(x)
    runs.clear()
    first = torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True)
    assert len(runs) == 1
    # Only the projection's gradient: attention itself does not follow.
    torch.autograd.grad(output.sum(), module.out.weight, retain_graph=True)
    second = torch.autograd.grad(output.sum(), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(runs) == 2


# Copies.


class Three(nn.Module):
    """Three layers of one input, as query, key and value are."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 8) for _ in range(3)])
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).float() + 0
        if self.turned:
            x = x.transpose(0, 1)
        return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]


@pytest.mark.parametrize("turned", [False, True])
def test_copies_of_one_tensor_are_stored_once(turned: bool) -> None:
    x = torch.randn(4, 32, 32)

    def run(module: nn.Module) -> int:
        model = QuantBackwardWrapper(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=not turned), track_saved_memory(
                model) as report:
            output = model(x)
        del output
        return report.stored_bytes

    assert run(Three(turned)) < 128 * WIDTH // 4 * 1.6 + 128 * 32


def test_copies_have_unbiased_gradients() -> None:
    assert_unbiased(Three(turned=True), torch.randn(4, 16, 32))


def test_autocast_shares_the_output_of_a_norm() -> None:
    module, x = nn.Sequential(nn.Linear(32, WIDTH), layer_norm("ones"), nn.Linear(WIDTH, 8)), (
        torch.randn(128, 32))
    model = QuantBackwardWrapper(module)
    with torch.autocast("cpu", torch.bfloat16), track_saved_memory(model) as report:
        output = model(x)
    assert report.stored_bytes < 128 * WIDTH // 4 * 1.5 + 128 * 32
    output.float().sum().backward()
    exact = torch.autograd.grad(module(x).sum(), module[0].weight)[0]
    found = module[0].weight.grad
    assert isinstance(found, Tensor) and float((found - exact).norm()) < 0.5 * float(exact.norm())
