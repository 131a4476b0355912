"""Norms that are written out: their input is stored once, as the input of a norm."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import (
    ModifiedInPlaceError,
    QuantBackwardWrapper,
    SavedTensor,
    check_gradients,
    track_saved_memory,
)
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import listening
from brevitas_bp.codec import Codec, Copy, Packed
from brevitas_bp.codec.layout import TensorLayout
from tests.backward.support import Apply

WIDTH = 128
Norm = Callable[[Tensor], Tensor]


def _llama(x: Tensor) -> Tensor:
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + 1e-6)


def _manual_root(x: Tensor) -> Tensor:
    return (x * x).mean(-1, keepdim=True).add(1e-6).sqrt().reciprocal() * x


def _euclidean(x: Tensor) -> Tensor:
    return x * (torch.square(x).sum(dim=-1, keepdim=True).clamp(min=1e-6) ** -0.5)


NORMS: dict[str, Norm] = {
    "rsqrt": _llama, "sqrt and reciprocal": _manual_root, "sum": _euclidean,
    "power operator": lambda x: torch.mean(x ** 2, -1, keepdim=True).add(1e-6).rsqrt() * x}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


class _Written(nn.Module):
    """A linear layer, a norm without a weight, and another linear layer."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def _wrapped(module: nn.Module, **options: object) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module, seed=0, bucket_size=128, **options)


def _stored(model: QuantBackwardWrapper) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in model.explain().sites.values():
        found.setdefault(site.op, []).append(site.stored)
    return found


@each_norm
def test_the_input_is_stored_once_with_the_configured_bits(norm: Norm) -> None:
    torch.manual_seed(0)
    plain, x = _Written(norm), torch.randn(64, WIDTH)
    model = _wrapped(plain)
    with track_saved_memory(model) as report:
        out = model(x)
    assert torch.equal(out, plain(x))
    names = ("pow", "square", "mul", "__mul__")
    of_norm = [row for row in report.rows if row.op in names]
    # Two bits for each element, and two float32 for each row; the factors [64, 1] are exact.
    exact = 64 * WIDTH * 4
    assert sum(row.stored_bytes for row in of_norm) <= exact * 2 / 32 + 64 * 8 + 3 * 64 * 4
    assert sum(row.exact_bytes for row in of_norm) >= exact


@each_norm
def test_gradients_have_a_small_bias(norm: Norm) -> None:
    torch.manual_seed(0)
    plain, x = _Written(norm), torch.randn(64, WIDTH)
    cotangent = torch.randn(64, 8)
    parameters = list(plain.parameters())

    def gradient(model: nn.Module) -> Tensor:
        return torch.cat([
            g.flatten().double() for g in torch.autograd.grad(model(x), parameters, cotangent)])

    exact, model, draws = gradient(plain), _wrapped(plain), 200
    drawn = torch.stack([gradient(model) for _ in range(draws)])
    by_chance = drawn.var(0).sum() / draws
    off = ((drawn.mean(0) - exact).square().sum() - by_chance).clamp(min=0).sqrt()
    # Of order 1 / WIDTH, times the relative variance of a rounding.
    assert float(off / exact.norm()) < 0.01
    assert 0.05 < float((drawn[0] - exact).norm() / exact.norm()) < 0.5


@each_norm
def test_with_copies_gradients_have_equal_bits(norm: Norm) -> None:
    class Copies(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            return decision._replace(codec=Copy()) if decision.codec is not None and (
                decision.codec.lossy) else decision

    torch.manual_seed(0)
    plain, x = _Written(norm), torch.randn(64, WIDTH)
    grads = [
        torch.autograd.grad(model(x).square().sum(), list(plain.parameters()))
        for model in (plain, _wrapped(plain, policy=Copies()))]
    assert all(map(torch.equal, *grads))


def test_other_squares_get_the_bits_of_a_factor() -> None:
    x = torch.randn(64, WIDTH)
    cases: dict[str, Norm] = {
        "activation": lambda x: x.relu().square() + 0,
        "last operation": lambda x: x.square(),
        "mean of everything": lambda x: x.square().mean(),
        "mean of columns": lambda x: x.square().mean(0),
        "something between": lambda x: x.square().exp().mean(-1, keepdim=True),
        "distance": lambda x: x.square().mean(-1),
        "mean of another tensor": lambda x: x.square() + x.mean(-1, keepdim=True),
        "short rows": lambda x: x.view(-1, 8).square().mean(-1, keepdim=True)}
    for name, function in cases.items():
        model = _wrapped(nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(function)))
        model(x)
        (stored,) = _stored(model)["square"]
        assert stored.partition(",")[0] == "4-bit dithered", name


def test_a_statistic_of_another_tensor_is_an_ordinary_factor() -> None:
    def mixed(x: Tensor) -> Tensor:
        return x * (2 * x).pow(2).mean(-1, keepdim=True).rsqrt()

    model = _wrapped(nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(mixed)))
    model(torch.randn(64, WIDTH))
    assert "2-bit rotated" not in _stored(model).get("mul", []) + _stored(model).get("__mul__", [])


def test_a_part_is_no_norm_of_another_part_of_its_storage() -> None:
    def mixed(x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return first * torch.rsqrt(second.pow(2).mean(-1, keepdim=True))

    model = _wrapped(nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(mixed)))
    model(torch.randn(64, WIDTH))
    assert "4-bit dithered" in _stored(model)["mul"]


def test_short_rows_get_the_rules_of_products() -> None:
    x = torch.randn(2048, 8) * 10 ** (4 * torch.rand(2048, 1) - 2)
    x.requires_grad_()
    norm = Apply(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-9))
    cotangent = torch.randn(2048, 8)
    exact = torch.autograd.grad(norm(x), x, cotangent)[0]
    drawn = [torch.autograd.grad(_wrapped(norm)(x), x, cotangent)[0] for _ in range(20)]
    assert torch.stack(drawn).isfinite().all()
    model = _wrapped(norm)
    model(x)
    assert "of a norm that is written out" not in str(model.explain())
    assert exact.isfinite().all()


def test_the_check_of_gradients_sees_the_last_decision() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(_llama), nn.Linear(WIDTH, 8))
    check = check_gradients(
        _wrapped(net), torch.randn(64, WIDTH), lambda net, x: net(x).square().mean())
    assert {kind.name for kind in check.kinds} == {"inputs of layers", "inputs of norms"}


def test_a_users_codec_gets_no_graph_while_a_square_waits() -> None:
    class Half(Codec):
        name, compresses = "half", False

        def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
            return Packed(self, ((x / 2).half(),), TensorLayout.of(x), None, where)

        def decode(self, packed: Packed) -> Tensor:
            return packed.tensors[0].float() * 2

    half, held = Half(), []

    class Halves(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            return decision._replace(codec=half, rows=None) if saved.op == "square" else decision

    model = _wrapped(Apply(lambda x: (x * 1).square() + 0), policy=Halves())
    with listening(model, lambda saved, packed, decision, originals: held.append(packed)):
        out = model(torch.randn(8, WIDTH, requires_grad=True))
    assert [packed.tensors[0].requires_grad for packed in held if packed.codec is half] == [False]
    out.sum().backward()


def test_an_input_that_changes_later_is_stored_as_it_was() -> None:
    def changing(x: Tensor) -> Tensor:
        y = x * 1
        squares = y.square()
        torch._foreach_mul_([y], 2.0)
        return squares.mean(-1)

    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(changing))
    x = torch.randn(64, WIDTH)
    # The square is stored before the next operation, which changes its input.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain(x).sum().backward()
    model = _wrapped(plain)
    model(x).sum().backward()


def test_backward_within_the_forward_pass() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x).square()
            y.backward(torch.ones_like(y))
            return y.detach() + self.layer(x)

    torch.manual_seed(0)
    plain, x = Inner(), torch.randn(64, WIDTH)
    plain(x)
    exact = plain.layer.weight.grad
    plain.zero_grad()
    _wrapped(plain)(x)
    assert exact is not None and plain.layer.weight.grad is not None
    assert float((plain.layer.weight.grad - exact).norm() / exact.norm()) < 0.5


def test_backward_after_an_exception_in_the_forward_pass() -> None:
    features: list[Tensor] = []

    def stopping(x: Tensor) -> Tensor:
        features.append((x * 1).square())
        raise KeyError("early exit")

    x = torch.randn(8, WIDTH, requires_grad=True)
    with pytest.raises(KeyError, match="early exit"):
        _wrapped(Apply(stopping))(x)
    features[0].sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_nothing_waits_after_an_exception() -> None:
    held: list[weakref.ref[Tensor]] = []

    def failing(x: Tensor) -> Tensor:
        held.append(weakref.ref(x))
        x.square()
        raise ValueError("in the middle")

    model = _wrapped(nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(failing)))
    with pytest.raises(ValueError, match="in the middle"):
        model(torch.randn(64, WIDTH))
    gc.collect()
    assert held[0]() is None


def test_a_square_that_changes_before_the_next_operation_is_refused_in_backward() -> None:
    y = torch.randn(64, WIDTH, requires_grad=True)

    def changing(x: Tensor) -> Tensor:
        y = x * 1
        squares = y.square()
        # The mode of the pass does not see what runs without it.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            y.mul_(2)
        return squares + 0

    model = _wrapped(Apply(changing))
    out = model(y)
    with pytest.raises(ModifiedInPlaceError, match="modified by an inplace operation"):
        out.sum().backward()
