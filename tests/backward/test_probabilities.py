"""Softmax, log_softmax and cross entropies are stored as what their backward is linear in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SavedTensor, plan_bit_widths, track_saved_memory
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec import codec_from
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloatStochastic as Stochastic4
from tests.backward.support import Apply

ROWS, CLASSES = 64, 48
Function = Callable[[Tensor], Tensor]


def _targets(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(3))


def _some_ignored(targets: Tensor, index: int) -> Tensor:
    targets = targets.clone()
    targets[::3] = index
    return targets


_ROW_TARGETS = _targets(ROWS)
_IMAGE_TARGETS = _targets(2, 8, 8, classes=5)
_SOFT = torch.softmax(torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(4)), -1)
#: name -> (shape of the logits, loss).
LOSSES: dict[str, tuple[tuple[int, ...], Function]] = {
    "mean": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _ROW_TARGETS)),
    "keywords": ((ROWS, CLASSES), lambda z: F.cross_entropy(target=_ROW_TARGETS, input=z)),
    "sum": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _ROW_TARGETS, reduction="sum")),
    "none": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _ROW_TARGETS, reduction="none")),
    "weights": ((ROWS, CLASSES), lambda z: F.cross_entropy(
        z, _ROW_TARGETS, torch.linspace(0.5, 2, CLASSES, dtype=z.dtype))),
    "ignored": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _some_ignored(_ROW_TARGETS, -100))),
    "ignored, positive": ((ROWS, CLASSES), lambda z: F.cross_entropy(
        z, _some_ignored(_ROW_TARGETS, 255), ignore_index=255)),
    "all ignored": ((ROWS, CLASSES), lambda z: F.cross_entropy(
        z, torch.full((ROWS,), -100), reduction="sum") + z.sum()),
    "smoothing": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _ROW_TARGETS, label_smoothing=0.1)),
    "smoothing and weights": ((ROWS, CLASSES), lambda z: F.cross_entropy(
        z, _some_ignored(_ROW_TARGETS, -100), torch.linspace(0.5, 2, CLASSES, dtype=z.dtype),
        label_smoothing=0.1)),
    "probabilities": ((ROWS, CLASSES), lambda z: F.cross_entropy(z, _SOFT)),
    "one row": ((CLASSES * ROWS,), lambda z: F.cross_entropy(z, torch.tensor(7))),
    "image": ((2, 5, 8, 8), lambda z: F.cross_entropy(z, _IMAGE_TARGETS)),
    "volume": ((2, 5, 4, 4, 4), lambda z: F.cross_entropy(z, _targets(2, 4, 4, 4, classes=5))),
    "nll_loss": ((ROWS, CLASSES), lambda z: F.nll_loss(F.log_softmax(z, -1), _ROW_TARGETS)),
    "kl_div": ((ROWS, CLASSES), lambda z: F.kl_div(z.log_softmax(-1), _SOFT, reduction="batchmean")),
    "log_softmax": ((ROWS, CLASSES), lambda z: torch.log_softmax(z, 1).square().sum()),
    "softmax": ((ROWS, CLASSES), lambda z: torch.softmax(z, -1).square().sum()),
    "softmax, other dimension": ((ROWS, CLASSES), lambda z: z.softmax(0).square().sum()),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def _gradient(name: str, spread: float = 2.0, dtype: torch.dtype = torch.float32,
              **options: Any) -> tuple[Tensor, Tensor, QuantBackwardWrapper]:
    shape, loss = LOSSES[name]
    z = (spread * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    z.requires_grad_()
    model = QuantBackwardWrapper(Apply(loss), bucket_size=64, **options)
    out = model(z)
    cotangent = torch.linspace(0.5, 1, out.numel()).view_as(out).to(out.dtype)
    return out, torch.autograd.grad(out, z, cotangent)[0], model


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forward_has_equal_bits_and_the_gradient_a_small_error(name: str, dtype: torch.dtype) -> None:
    out, exact, _ = _gradient(name, dtype=dtype, policy="exact")
    stored, rounded, _ = _gradient(name, dtype=dtype, seed=0)
    assert torch.equal(out, stored)
    if exact.count_nonzero() == 0:
        assert torch.equal(rounded, exact)
        return
    assert float((rounded - exact).norm() / exact.norm()) < 0.3
    _, fine, _ = _gradient(name, dtype=dtype, seed=0, policy=OpAware(multiplier_bits=8))
    assert float((fine - exact).norm() / exact.norm()) < (0.06 if dtype == torch.bfloat16 else 0.03)


def _bias(name: str, draws: int = 400, **options: Any) -> float:
    """Returns the relative bias of the gradient, less the part due to chance."""
    _, exact, _ = _gradient(name, policy="exact")
    drawn = torch.stack([_gradient(name, seed=seed, **options)[1].double() for seed in range(draws)])
    by_chance = drawn.var(0).sum() / draws
    off = (drawn.mean(0) - exact).square().sum() - by_chance
    return float(off.clamp(min=0).sqrt() / exact.norm())


@pytest.mark.parametrize("name", [
    "mean", "weights", "ignored", "smoothing and weights", "image", "nll_loss", "probabilities"])
def test_gradients_of_losses_are_unbiased(name: str) -> None:
    assert _bias(name) < 0.004


def test_rounded_logarithms_would_be_biased() -> None:
    """The control: log-probabilities rounded as they are, which log_softmax exponentiates."""
    codec = codec_from(Stochastic4, bucket_size=64)
    assert _bias("mean", policy=lambda saved: codec if saved.tensor.dim() == 2 else None) > 0.008


def test_softmax_has_a_small_bias() -> None:
    assert _bias("softmax") < 0.005


@pytest.mark.parametrize("confidence", [4, 8, 16, 40])
def test_the_error_is_relative_to_the_gradient_of_confident_predictions(confidence: float) -> None:
    z = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1))
    z[torch.arange(ROWS), _ROW_TARGETS] += confidence
    z.requires_grad_()

    def gradient(loss: Function, **options: Any) -> Tensor:
        model = QuantBackwardWrapper(Apply(loss), bucket_size=64, seed=0, **options)
        return torch.autograd.grad(model(z), z)[0]

    loss = LOSSES["mean"][1]
    exact, rounded = gradient(loss, policy="exact"), gradient(loss)
    assert float((rounded - exact).norm() / exact.norm()) < 0.3
    if confidence == 40:
        # The control: probabilities, without the targets.
        apart = gradient(LOSSES["nll_loss"][1], policy=OpAware(multiplier_bits=3))
        assert float((apart - exact).norm() / exact.norm()) > 1000


def test_masked_entries_stay_zero_and_the_product_shares_the_probabilities() -> None:
    mask = torch.ones(32, 32).tril().bool()

    def attention(qk: Tensor) -> Tensor:
        q, k, v = qk.chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
        p = torch.softmax(scores, -1)
        return p @ v

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 144), Apply(attention))
    model = QuantBackwardWrapper(net, seed=0, bucket_size=256)
    with track_saved_memory(model) as report:
        out = model(torch.randn(4, 32, 48))
    rows = {row.op: row for row in report.rows}
    elements = 4 * 32 * 32
    # Four bits for each element and two float32 for each row of 32.
    assert rows["softmax"].stored_bytes == elements // 2 + 4 * 32 * 8
    assert rows["softmax"].exact_bytes == elements * 4
    probabilities = next(
        saved for saved in _saved_by(out.grad_fn) if saved.shape[-2:] == (32, 32))
    assert not probabilities.reshape(4, 32, 32)[:, ~mask].any()
    assert probabilities.count_nonzero() > elements / 8


def _saved_by(node: Any) -> list[Tensor]:
    """Returns the saved tensors of the nodes of a graph."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        for name in dir(node):
            if name.startswith("_saved") and isinstance(getattr(node, name), Tensor):
                found.append(getattr(node, name))
        waiting += [source for source, _ in node.next_functions if source is not None]
    return found


def test_targets_with_a_gradient_keep_log_probabilities_exact() -> None:
    soft = _SOFT.clone().requires_grad_()
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    model = QuantBackwardWrapper(Apply(lambda z: F.cross_entropy(z, soft)), seed=0)
    plain = torch.autograd.grad(F.cross_entropy(z, soft), [z, soft])
    assert all(map(torch.equal, plain, torch.autograd.grad(model(z), [z, soft])))


def test_a_loss_saves_targets_in_the_narrowest_integer_and_once() -> None:
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    model = QuantBackwardWrapper(Apply(LOSSES["mean"][1]), bucket_size=64, seed=0)
    with track_saved_memory(model) as report:
        out = model(z)
    # Three bits for each logit, two float32 for each row, a byte for each target; the sum of weights.
    assert report.stored_bytes == ROWS * CLASSES * 3 // 8 + ROWS * 8 + ROWS + 4
    out.backward()


def test_quantizers_that_round_to_nearest_keep_probabilities_exact() -> None:
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    model = QuantBackwardWrapper(Apply(LOSSES["mean"][1]), Nearest2, bucket_size=64, seed=0)
    out = model(z)
    stored = {site.stored for site in model.explain().sites.values()}
    assert stored == {"exact", "narrowed"}
    assert torch.equal(
        torch.autograd.grad(out, z)[0], torch.autograd.grad(LOSSES["mean"][1](z), z)[0])


def test_nan_and_huge_logits_reach_the_gradient() -> None:
    z = torch.randn(ROWS, CLASSES)
    z[0, 0], z[1, 1], z[2] = torch.nan, 1e30, -1e30
    z.requires_grad_()
    model = QuantBackwardWrapper(Apply(LOSSES["none"][1]), bucket_size=64, seed=0)
    grad = torch.autograd.grad(model(z).nansum(), z)[0]
    assert grad[0].isnan().all() and grad[1:].isfinite().all()


def test_second_derivatives_are_those_of_the_rounded_probabilities() -> None:
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    model = QuantBackwardWrapper(Apply(LOSSES["mean"][1]), bucket_size=64, seed=0)
    hessians = []
    for net in (Apply(LOSSES["mean"][1]), model):
        (grad,) = torch.autograd.grad(net(z), z, create_graph=True)
        hessians.append(torch.autograd.grad(grad.square().sum(), z)[0])
    assert float((hessians[1] - hessians[0]).norm() / hessians[0].norm()) < 0.5


def test_vector_norms_and_normalize_store_their_input_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128, requires_grad=True)
    for function in (
            lambda x: torch.linalg.vector_norm(x, dim=-1), lambda x: F.normalize(x, dim=-1)):
        model = QuantBackwardWrapper(Apply(function), seed=0, bucket_size=128)
        with track_saved_memory(model) as report:
            out = model(x)
        assert torch.equal(out, function(x)) and report.ratio > 5
        cotangent = torch.randn_like(out)
        exact, rounded = (
            torch.autograd.grad(f(x), x, cotangent)[0] for f in (function, model))
        assert float((rounded - exact).norm() / exact.norm()) < 0.2


def test_grouped_products_round_the_input_and_keep_the_weight() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 64, 32, dtype=torch.bfloat16))
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([16, 48, 96, 128], dtype=torch.int32)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight, offs=ends)

    plain = Experts()
    exact = torch.autograd.grad(plain(x).float().square().sum(), [x, weight])
    model = QuantBackwardWrapper(plain, seed=0, bucket_size=64)
    rounded = torch.autograd.grad(model(x).float().square().sum(), [x, weight])
    assert torch.equal(rounded[0], exact[0])
    assert 0.05 < float((rounded[1] - exact[1]).norm() / exact[1].norm()) < 0.6


def test_checksums_hold_for_views_that_share_an_encoding() -> None:
    def attention(x: Tensor) -> Tensor:
        p = torch.softmax(x.view(4, 8, 32, 32), -1)
        return p.view(32, 32, 32) @ x.view(32, 32, 32)

    x = torch.randn(4, 8 * 32 * 32, requires_grad=True)
    model = QuantBackwardWrapper(Apply(attention), seed=0, bucket_size=64, verify=True)
    out = model(x)
    stored = [site.stored for site in model.explain().sites.values()]
    assert sorted(stored) == ["4-bit companded", "4-bit companded", "4-bit dithered"]
    exact = torch.autograd.grad(attention(x).sum(), x)[0]
    rounded = torch.autograd.grad(out.sum(), x)[0]
    assert float((rounded - exact).norm() / exact.norm()) < 0.3


def test_a_users_codec_in_place_of_the_policys_stores_log_probabilities_as_they_are() -> None:
    codec = codec_from(Stochastic4, bucket_size=64)

    class Mine(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            return decision._replace(codec=codec) if decision.probabilities else decision

    for name in ("mean", "log_softmax"):
        _, exact, _ = _gradient(name, policy="exact")
        _, rounded, _ = _gradient(name, policy=Mine(), seed=0)
        assert rounded.isfinite().all()
        assert float((rounded - exact).norm() / exact.norm()) < 1


def test_plans_leave_probabilities_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES), nn.LogSoftmax(-1))
    x = torch.randn(ROWS, 64)
    plan = plan_bit_widths(
        net, x, lambda model, x: F.nll_loss(model(x), _ROW_TARGETS), average_bits=2,
        candidates=(1, 2, "dithered 3"), sensitivity="closed_form")
    assert not [site for tensor in plan.tensors for site in tensor.sites if "softmax" in site]
    model = QuantBackwardWrapper(net, seed=0, plan=plan)
    model(x)
    assert "4-bit companded" in {site.stored for site in model.explain().sites.values()}


def test_an_offset_of_the_gradient_does_not_meet_the_rounding_of_softmax() -> None:
    z = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for offset in (0.0, 10.0, 100.0):
        cotangent = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) + offset
        for dim in (0, 1):
            softmax = Apply(lambda z, dim=dim: torch.softmax(z, dim))
            exact = torch.autograd.grad(softmax(z), z, cotangent)[0]
            drawn = torch.stack([
                torch.autograd.grad(QuantBackwardWrapper(softmax, seed=seed)(z), z, cotangent)[0]
                for seed in range(100)])
            by_chance = drawn.var(0).sum() / 100
            off = ((drawn.mean(0) - exact).square().sum() - by_chance).clamp(min=0).sqrt()
            assert float(off / exact.norm()) < 0.01
            assert float((drawn[0] - exact).norm() / exact.norm()) < 0.25


@pytest.mark.parametrize("name", ["smoothing", "autocast", "weights"])
def test_targets_that_torch_copies_are_no_log_probabilities(name: str) -> None:
    counts = torch.randint(0, 200, (ROWS, CLASSES), generator=torch.Generator().manual_seed(3)).float()
    weights = torch.linspace(0.5, 2, CLASSES).requires_grad_()
    losses: dict[str, Function] = {
        "smoothing": lambda z: F.cross_entropy(z, counts, label_smoothing=0.1),
        "autocast": lambda z: F.cross_entropy(z, counts.bfloat16()),
        "weights": lambda z: F.cross_entropy(z, _SOFT, weights)}
    z = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = [z, weights] if name == "weights" else [z]
    model = QuantBackwardWrapper(Apply(losses[name]), seed=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        exact = torch.autograd.grad(losses[name](z), wanted)
        rounded = torch.autograd.grad(model(z), wanted)
    for a, b in zip(exact, rounded):
        assert float((a - b).norm() / a.norm()) < 0.15


@pytest.mark.parametrize("name", ["mean", "image", "volume"])
@pytest.mark.parametrize("options", [
    {"storage": "quantize_on_backward"}, {"verify": True},
    {"storage": "quantize_on_backward", "verify": True}], ids=str)
def test_targets_of_any_shape_are_stored_in_every_way(name: str, options: dict[str, Any]) -> None:
    _, exact, _ = _gradient(name, policy="exact")
    _, plain, _ = _gradient(name, seed=0)
    _, rounded, _ = _gradient(name, seed=0, **options)
    assert torch.equal(rounded, plain)
    assert float((rounded - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (ROWS, CLASSES)])
def test_targets_that_are_kept_belong_to_the_errors(shape: tuple[int, ...]) -> None:
    targets = _targets(*shape[:1], *shape[2:], classes=5)
    loss = Apply(lambda z: F.cross_entropy(z, targets, ignore_index=-2**40))
    z = torch.randn(shape, requires_grad=True)
    exact = torch.autograd.grad(loss(z), z)[0]
    rounded = torch.autograd.grad(QuantBackwardWrapper(loss, seed=0)(z), z)[0]
    assert float((rounded - exact).norm() / exact.norm()) < 0.3


def test_targets_under_vmap_keep_log_probabilities_exact() -> None:
    many = torch.stack([_targets(ROWS), _targets(ROWS).flip(0)])
    loss = Apply(lambda z: torch.vmap(lambda t: F.cross_entropy(z, t))(many).sum())
    z = torch.randn(ROWS, CLASSES, requires_grad=True)
    exact = torch.autograd.grad(loss(z), z)[0]
    assert torch.equal(torch.autograd.grad(QuantBackwardWrapper(loss, seed=0)(z), z)[0], exact)


def test_scores_that_a_loss_reshapes_are_stored_once() -> None:
    targets = _targets(8, 64)
    loss = Apply(lambda z: F.cross_entropy(z.transpose(1, 2), targets))
    z = torch.randn(8, 64, CLASSES, requires_grad=True)
    model = QuantBackwardWrapper(loss, seed=0, bucket_size=64)
    with track_saved_memory(model) as report:
        out = model(z)
    assert report.ratio > 5
    exact = torch.autograd.grad(loss(z), z)[0]
    rounded = torch.autograd.grad(out, z)[0]
    assert float((rounded - exact).norm() / exact.norm()) < 0.3


def test_norms_across_rows_and_of_short_rows_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 512, generator=generator) * torch.logspace(-3, 3, 512)
    short = torch.randn(512, 3, generator=generator) * 10 ** (4 * torch.rand(512, 1) - 2)
    cases: list[tuple[Function, Tensor]] = [
        (lambda x: torch.linalg.vector_norm(x, dim=0), wide), (lambda x: x.norm(dim=0), wide),
        (lambda x: x.norm(dim=-1), short), (lambda x: F.normalize(x, dim=-1), short)]
    for function, x in cases:
        x.requires_grad_()
        out = function(x)
        cotangent = torch.randn(out.shape, generator=generator)
        exact = torch.autograd.grad(out, x, cotangent)[0]
        model = QuantBackwardWrapper(Apply(function), seed=0)
        assert torch.equal(torch.autograd.grad(model(x), x, cotangent)[0], exact)


def test_exponentials_have_errors_relative_to_themselves() -> None:
    # Small gradients of a quotient meet exponentials of any size: here, of up to 2**90. The quotient's
    # own derivative is their square. See tests/backward/test_elementary.py for the bounds.
    x = (8 * torch.randn(8, 512)).requires_grad_()
    sigmoid = Apply(lambda x: 1 / (1 + torch.exp(-x)))
    exact = torch.autograd.grad(sigmoid(x).sum(), x)[0]
    rounded = torch.autograd.grad(QuantBackwardWrapper(sigmoid, seed=0)(x).sum(), x)[0]
    assert 1e-6 < float((rounded - exact).norm() / exact.norm()) < 0.4
