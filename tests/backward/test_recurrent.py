"""Recurrent layers: what reaches a weight alone is rounded; gates, states and workspaces are exact."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor
from brevitas_bp.backward.saved import Decision
from brevitas_bp.backward.seam import listening
from tests.backward.support import run, wrapped_run
from tests.stats import normal

TIME, BATCH, INPUTS, HIDDEN = 12, 8, 32, 48
DRAWS = 100
#: name -> layer. The last one runs without oneDNN.
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}), "gru": (nn.GRU, {}), "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}), "dropout": (nn.LSTM, {"dropout": 0.3}),
    "gru dropout": (nn.GRU, {"dropout": 0.3}), "two ways": (nn.LSTM, {"bidirectional": True}),
    "batch first": (nn.GRU, {"batch_first": True}), "projection": (nn.LSTM, {"proj_size": 16}),
    "without onednn": (nn.LSTM, {})}
each_layer = pytest.mark.parametrize("name", LAYERS)


class First(nn.Module):
    """Returns the output of a recurrent layer, without the last states."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, options = LAYERS[name]
        torch.manual_seed(0)
        self.layer = kind(INPUTS, HIDDEN, num_layers=2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def flags(name: str) -> Any:
    return torch.backends.mkldnn.flags(enabled=False) if "without" in name else nullcontext()


def inputs() -> Tensor:
    return torch.randn(TIME, BATCH, INPUTS, generator=torch.Generator().manual_seed(1))


pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")]


@each_layer
def test_all_gradients_but_the_weights_are_exact(name: str) -> None:
    with flags(name):
        exact, rounded = run(First(name), inputs()), wrapped_run(First(name), inputs())
    assert torch.equal(exact.output, rounded.output) and torch.equal(exact.rng, rounded.rng)
    changed = {
        parameter for parameter, grad in exact.grads.items()
        if not torch.equal(grad, rounded.grads[parameter])}
    assert {"layer.weight_ih_l0", "layer.weight_ih_l1"} <= changed
    assert all("weight_ih" in parameter or "weight_hh" in parameter for parameter in changed)


@each_layer
def test_weights_are_unbiased(name: str) -> None:
    module, x = First(name), inputs()
    weights = [p for n, p in module.named_parameters() if "weight_ih" in n]
    wrapped = QuantBackwardWrapper(module, seed=0)
    cotangent = torch.linspace(-1, 2, 4096).cos()

    def gradient(model: nn.Module) -> Tensor:
        torch.manual_seed(2)
        out = model(x)
        loss = (out.flatten() * cotangent.repeat(-(-out.numel() // 4096))[:out.numel()]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()

    with flags(name):
        exact = gradient(module)
        drawn = torch.stack([gradient(wrapped) for _ in range(DRAWS)])
    # Each is a sum of TIME * BATCH rounded numbers. A sample deviation of DRAWS draws is at least 0.6 of
    # the deviation, all of them together, with a probability of 1 - 1e-9.
    z = (drawn.mean(0) - exact) / drawn.std(0).clamp(min=1e-12) * DRAWS**0.5
    assert float(z.abs().max()) <= normal(len(exact)) / 0.6
    # The control: one draw, again and again, as a rounding to nearest would be.
    repeated = (drawn[0] - exact) / drawn.std(0).clamp(min=1e-12) * DRAWS**0.5
    assert float(repeated.abs().max()) > 2 * normal(len(exact)) / 0.6


def stored(model: nn.Module, *arguments: Any) -> list[tuple[str, int, bool]]:
    """Returns (codec, dimensions, whether numbers) of each saved tensor that is no parameter."""
    found = []

    def note(saved: SavedTensor, packed: Packed, decision: Decision, originals: Any) -> None:
        if "parameter" not in decision.reason and packed.codec.name != "exact":
            found.append((packed.codec.name, saved.tensor.dim(), saved.tensor.is_floating_point()))

    wrapped = QuantBackwardWrapper(model, seed=0)
    with listening(wrapped, note):
        wrapped(*arguments)
    return found


def test_which_tensors_are_rounded() -> None:
    # Input and output of each of two layers; the output of the first is the input of the second.
    assert stored(First("lstm"), inputs()) == [("2-bit rotated", 3, True)] * 4
    assert stored(First("gru"), inputs()) == [("2-bit rotated", 2, True)] * 2
    masks = [name for name, _, _ in stored(First("gru dropout"), inputs()) if "mask" in name]
    assert masks == ["mask of two values"]


def test_one_step_rounds_the_input_alone() -> None:
    """States of single steps have the shape of the input then."""
    assert len(stored(First("gru"), torch.randn(1, 64, INPUTS))) == 1


def test_packed_sequences() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.GRU(INPUTS, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([12, 10, 9, 7, 5, 3, 2, 1]))
            return self.layer(packed)[1]

    exact, rounded = run(Last(), inputs()), wrapped_run(Last(), inputs())
    assert torch.equal(exact.output, rounded.output)
    assert ("2-bit rotated", 2, True) in stored(Last(), inputs())


def test_explained() -> None:
    model = QuantBackwardWrapper(First("gru"), seed=0)
    model(inputs())
    assert "a recurrent layer: gates and states" in str(model.explain())
