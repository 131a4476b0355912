"""``OpAware(recompute_logits=True)``: losses compute their logits again, and store nothing as large."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from brevitas_bp import (
    ModifiedInPlaceError,
    OpAware,
    QuantBackwardWrapper,
    SavedTensor,
    SecondDerivativeError,
    track_saved_memory,
)
from brevitas_bp.backward.saved import RECOMPUTED, Decision
from tests.backward.support import run

CLASSES, WIDTH = 900, 32
Loss = Callable[[Tensor, Tensor], Tensor]


def _shifted(z: Tensor, t: Tensor) -> Tensor:
    """As language models of transformers do."""
    z = z.float()
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, CLASSES), t[..., 1:].flatten())


def _ignored(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(
        z.transpose(1, 2), torch.where(t % 3 == 0, -100, t), label_smoothing=0.1,
        weight=torch.linspace(0.5, 1, CLASSES))


#: name -> loss of logits [2, 16, CLASSES] and targets [2, 16].
LOSSES: dict[str, Loss] = {
    "flat": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
    "shifted": _shifted, "ignored": _ignored,
    "sum": lambda z, t: F.cross_entropy(target=t.flatten(), input=z.view(-1, CLASSES), reduction="sum"),
    "half": lambda z, t: F.cross_entropy(z.double().flatten(0, 1), t.flatten()),
    "log_softmax": lambda z, t: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), t.flatten()),
    "method": lambda z, t: -z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).mean(),
    "probabilities": lambda z, t: F.cross_entropy(
        z.flatten(0, 1), torch.full((t.numel(), CLASSES), 1 / CLASSES))}
each_loss = pytest.mark.parametrize("name", LOSSES)


class Tokens(nn.Module):
    """A language model of one layer; with ``tied``, the weight of the embedding is that of the head."""

    def __init__(self, loss: Loss, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.loss = nn.Linear(WIDTH, CLASSES), loss
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.loss(self.head(torch.tanh(self.layer(self.embedding(t)))), t)


def tokens() -> Tensor:
    return torch.randint(0, CLASSES, (2, 16), generator=torch.Generator().manual_seed(1))


class Seeing(OpAware):
    """Counts what is kept for recomputed logits, and notes the largest tensor that is saved."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        SEEN.append((saved.role, saved.tensor.numel(), decision.codec is None))
        return decision


SEEN: list[tuple[str | None, int, bool]] = []


def recomputed() -> bool:
    return any(role == RECOMPUTED for role, _, _ in SEEN)


@pytest.fixture(autouse=True)
def _unseen() -> None:
    SEEN.clear()


def wrapped(module: nn.Module) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module, seed=0, policy=Seeing(recompute_logits=True))


@each_loss
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_the_gradient_of_the_logits_is_exact(name: str, tied: bool, amp: bool) -> None:
    """So that of the bias is exact: it is the sum of the gradients of the logits."""
    module = Tokens(LOSSES[name], tied)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        exact = run(module, tokens())
        rounded = run(wrapped(copy.deepcopy(module)), tokens(), copied=False)
    assert torch.equal(exact.output, rounded.output) and torch.equal(exact.rng, rounded.rng)
    assert torch.equal(exact.grads["head.bias"], rounded.grads["head.bias"])
    weight = "embedding.weight" if tied else "head.weight"
    assert not torch.equal(exact.grads[weight], rounded.grads[weight])
    assert recomputed()


@each_loss
def test_nothing_of_the_size_of_the_logits_is_stored(name: str) -> None:
    if name == "probabilities":
        pytest.skip("these targets are as large as the logits")
    stored = []
    for policy in (OpAware(), OpAware(recompute_logits=True)):
        with track_saved_memory(model := QuantBackwardWrapper(
                Tokens(LOSSES[name]), seed=0, policy=policy)) as report:
            loss = model(tokens())
        del loss
        rows = [row for row in report.rows if row.op in ("cross_entropy", "log_softmax")]
        stored.append(sum(row.stored_bytes for row in rows))
    # The exact input of the head, targets, and weights of classes.
    assert stored[1] <= 32 * WIDTH * 4 + 2 * 32 * 2 + (4 * CLASSES if name == "ignored" else 0)
    assert stored[0] - stored[1] > 32 * CLASSES * 0.2


def _scaled_in_place(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.mul_(0.5).flatten(0, 1), t.flatten())


def _scaled(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy((z * 0.5).flatten(0, 1), t.flatten())


def _of_one_token(z: Tensor, t: Tensor) -> Tensor:
    """Its probabilities are smaller than the input of the layer."""
    return F.cross_entropy(z[:1, -1], t[:1, -1])


@pytest.mark.parametrize("loss", [_scaled_in_place, _scaled, _of_one_token])
def test_other_logits_are_stored_as_always(loss: Loss) -> None:
    exact, rounded = run(Tokens(loss), tokens()), run(wrapped(Tokens(loss)), tokens(), copied=False)
    assert torch.equal(exact.output, rounded.output) and not recomputed()
    error = rounded.grads["head.bias"] - exact.grads["head.bias"]
    assert float(error.norm() / exact.grads["head.bias"].norm()) < 0.3


def test_an_input_or_weight_that_changes_before_the_loss_is_noticed() -> None:
    class Changed(Tokens):
        def forward(self, t: Tensor) -> Tensor:
            h = torch.tanh(self.layer(self.embedding(t)))
            z = self.head(h)
            with torch.no_grad():
                (h if self.changes == "input" else self.head.weight).add_(0.5)
            return self.loss(z, t)

        changes = "input"

    for changes in ("input", "weight"):
        module = Changed(LOSSES["flat"])
        module.changes = changes
        loss = wrapped(module)(tokens())
        assert not recomputed()
        (grad,) = torch.autograd.grad(loss, module.head.bias) if changes == "input" else (None,)
        plain = Changed(LOSSES["flat"])
        plain.changes = "nothing"
        if grad is not None:
            z = plain.head(torch.tanh(plain.layer(plain.embedding(tokens()))))
            (exact,) = torch.autograd.grad(LOSSES["flat"](z, tokens()), plain.head.bias)
            assert float((grad - exact).norm() / exact.norm()) < 0.5


def test_a_weight_that_changes_before_backward_raises() -> None:
    model = wrapped(Tokens(LOSSES["flat"]))
    loss = model(tokens())
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(ModifiedInPlaceError, match="cross_entropy"):
        loss.backward()


def test_a_weight_whose_memory_is_freed_raises() -> None:
    model = wrapped(Tokens(LOSSES["flat"]))
    loss = model(tokens())
    model.head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="leave recompute_logits out"):
        loss.backward()


def test_backward_runs_twice_but_not_for_second_derivatives() -> None:
    model = wrapped(Tokens(LOSSES["flat"]))
    loss = model(tokens())
    grads = [torch.autograd.grad(loss, model.head.bias, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    with pytest.raises(SecondDerivativeError):
        torch.autograd.grad(loss, model.head.bias, create_graph=True)


def test_two_heads_and_two_losses() -> None:
    class Two(Tokens):
        def __init__(self) -> None:
            super().__init__(LOSSES["flat"])
            self.second = nn.Linear(WIDTH, CLASSES)

        def forward(self, t: Tensor) -> Tensor:
            h = torch.tanh(self.layer(self.embedding(t)))
            first, second = self.head(h), self.second(h * 1)
            return self.loss(first, t) + self.loss(second, t.flip(1))

    exact, rounded = run(Two(), tokens()), run(wrapped(Two()), tokens(), copied=False)
    for bias in ("head.bias", "second.bias"):
        assert torch.equal(exact.grads[bias], rounded.grads[bias])


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpointing_losses_are_themselves(reentrant: bool) -> None:
    class Checkpointed(Tokens):
        def forward(self, t: Tensor) -> Tensor:
            h = torch.tanh(self.layer(self.embedding(t)))
            return checkpoint(  # pyright: ignore[reportReturnType]
                lambda h: self.loss(self.head(h), t), h, use_reentrant=reentrant)

    exact = run(Checkpointed(LOSSES["flat"]), tokens())
    rounded = run(wrapped(Checkpointed(LOSSES["flat"])), tokens(), copied=False)
    assert torch.equal(exact.grads["head.bias"], rounded.grads["head.bias"])
    assert not recomputed()


def test_nothing_outlives_the_graph() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Noting(Tokens):
        def forward(self, t: Tensor) -> Tensor:
            h = torch.tanh(self.layer(self.embedding(t)))
            kept.append(weakref.ref(h.untyped_storage()))  # pyright: ignore[reportArgumentType]
            kept.append(weakref.ref(h))
            return self.loss(self.head(h), t)

    gc.disable()
    try:
        model = wrapped(Noting(LOSSES["shifted"]))
        with torch.no_grad():
            model(tokens())
        assert kept[1]() is None
        loss = model(tokens())
        loss.backward()
        del loss
        assert kept[3]() is None
    finally:
        gc.enable()


def test_a_layer_whose_input_is_larger_than_probabilities_is_left_alone() -> None:
    """32 features of 32 bits are more than 100 probabilities of 3 bits."""
    net = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 100))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), torch.arange(64))

    wrapped(Classifier())(torch.randn(64, 8)).backward()
    assert not recomputed()


def test_sharded_parameters_are_left_alone() -> None:
    model = wrapped(Tokens(LOSSES["flat"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "brevitas_bp.backward.parameters.ParameterSet.gathered", property(lambda self: True))
        model(tokens()).backward()
    assert not recomputed()
    model(tokens())
    assert recomputed()
