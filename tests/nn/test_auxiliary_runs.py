"""A run stores one auxiliary tensor, hands it to all of its layers, and is freed with the graph."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp import Codec, codec_from, quant, track_saved_memory
from brevitas_bp.codec import PerSampleCodec
from brevitas_bp.nn import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    AuxiliaryRun,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
)
from tests.stats import hoeffding

Rotated2 = quant.RotatedNormal2DynamicActPerBucketFloat
Stochastic2 = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
Nearest2 = quant.ShiftedUint2DynamicActPerBucketFloat
WIDTH = 32


class Chain(nn.Module):
    """Residual blocks ``x + layer(x)`` with hidden activations that save nothing else."""

    def __init__(self, run: AuxiliaryRun, blocks: int = 3) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList(
            AuxiliaryResidualLinear(WIDTH, WIDTH, bias=False, run=run) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        with self.run.over(x):
            for layer in self.layers:
                x = x + layer(x)
        return x


def inputs(rows: int = 16) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def storages_saved(function: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """Returns an output, and the storages that its graph keeps: address -> bytes."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        return function(), found


def test_all_layers_of_a_run_save_one_tensor_and_no_input() -> None:
    chain, x = Chain(AuxiliaryRun()), inputs()
    _, found = storages_saved(lambda: chain(x))
    weights = {layer.weight.untyped_storage().data_ptr() for layer in chain.layers}  # pyright: ignore
    assert found.keys() - weights == {x.untyped_storage().data_ptr()}
    # The control: ordinary layers save one input each.
    plain = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def run() -> Tensor:
        y = x
        for layer in plain:
            y = y + layer(y)
        return y

    # The first input needs no gradient, so the first layer does not save its weight.
    assert len(storages_saved(run)[1]) == 3 + 2


def test_the_report_counts_it_once() -> None:
    chain, x = Chain(AuxiliaryRun()), inputs()
    with track_saved_memory(chain) as report:
        y = chain(x)
    assert report.stored_bytes == report.exact_bytes == x.nbytes and y.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv", "conv, channels last", "one image"])
def test_bytes_of_sign_layers(kind: str) -> None:
    layer: nn.Module
    if kind == "linear":
        layer, x = AuxiliarySignLinear(13, 4), torch.randn(3, 5, 13)
    else:
        layer = AuxiliarySignConv2d(3, 4, 3, padding=1, padding_mode="reflect")
        x = torch.randn(2, 3, 5, 7)
        x = x[0] if kind == "one image" else x
        if "last" in kind:
            x = x.contiguous(memory_format=torch.channels_last)
    with track_saved_memory(layer) as report:
        y = layer(x.requires_grad_())
    assert report.stored_bytes == -(-x.numel() // 8) and y.requires_grad
    _, found = storages_saved(lambda: layer(x))
    weight: Any = layer.weight
    assert sum(found.values()) == -(-x.numel() // 8) + weight.nbytes


#: Every kind of codec that a quantizer has.
CODECS: dict[str, Callable[[], Any]] = {
    "rotated": lambda: codec_from(Rotated2), "stochastic": lambda: codec_from(Stochastic2),
    "nearest": lambda: codec_from(Nearest2),
    "averages": lambda: codec_from(quant.ShiftedUint2Avg2DynamicActPerBucketFloat),
    "stock": lambda: codec_from(Int8ActPerTensorFloat),
    "integer zero point": lambda: codec_from(Nearest2, quantize_zero_point=True),
    "per sample": lambda: PerSampleCodec(Stochastic2, average_bits=3)}


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_stores_it(name: str) -> None:
    codec: Codec = CODECS[name]()
    chain, x = Chain(AuxiliaryRun(codec, seed=3)), inputs(64)
    with track_saved_memory(chain) as report:
        y = chain(x)
    _, found = storages_saved(lambda: chain(x))
    weights = sum(layer.weight.nbytes for layer in chain.layers)  # pyright: ignore
    assert report.stored_bytes == sum(found.values()) - weights < x.nbytes // 3
    assert torch.equal(y, Chain.forward(chain, x))

    node: Any = chain.layers[2]  # the last layer, whose gradient takes the stored activation
    y.sum().backward()
    chain.run.set_noise_state({"base": 3, "position": 0})
    with chain.run.over(x):
        last: Any = node(x)
    stored: Any = last.grad_fn
    a = stored.auxiliary.restored(stored.saved_tensors[1:], x.dtype)
    assert a.shape == x.shape and not torch.equal(a, x)
    error = (a - x).square().mean() / x.square().mean()
    # Any 2-bit code of a normal row is closer than this. Averages of pairs lose half of it.
    assert error < 1
    plain = torch.ones(64, WIDTH).t() @ a
    assert torch.allclose(node.weight.grad, plain, atol=1e-4)


def test_a_codec_that_would_not_be_smaller_is_not_used() -> None:
    chain, x = Chain(AuxiliaryRun(Rotated2)), torch.randn(1, WIDTH)[:, :WIDTH].half()
    chain.half()
    with track_saved_memory(chain) as report:
        y = chain(x[:, :WIDTH])
    assert report.stored_bytes <= x.nbytes and y.requires_grad


def mean_error(config: Any, draws: int) -> tuple[float, float]:
    """Returns the largest error of the mean gradient over seeds, in steps, and its limit."""
    x = inputs(1)
    run = AuxiliaryRun(config, seed=5, bucket_size=WIDTH)
    layer = AuxiliaryResidualLinear(WIDTH, 1, bias=False, run=run)
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(draws):
        with run.over(x):
            grad, = torch.autograd.grad(layer(x).sum(), layer.weight)
        total += grad[0].double()
    step = float(x.max() - x.min()) / 3
    return float((total / draws - x[0].double()).abs().max()) / step, hoeffding(draws, WIDTH)


def test_a_stochastic_codec_adds_no_bias() -> None:
    # Each element of a draw lies within one step, so Hoeffding's bound holds for its mean. float32
    # metadata adds less than 1e-6 of a step.
    error, limit = mean_error(Stochastic2, 1000)
    assert error < limit + 1e-6
    # The control: rounding to nearest is off by up to half a step.
    assert mean_error(Nearest2, 10)[0] > limit


def test_seeds() -> None:
    def gradient(run: AuxiliaryRun) -> Tensor:
        with torch.random.fork_rng():
            chain = Chain(run)
        for layer in chain.layers:
            torch.nn.init.constant_(layer.weight, 0.01)  # pyright: ignore
        chain(inputs()).sum().backward()
        return chain.layers[1].weight.grad  # pyright: ignore

    state = torch.get_rng_state()
    one, same, other = (gradient(AuxiliaryRun(Rotated2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    first, second = AuxiliaryRun(Rotated2), AuxiliaryRun(Rotated2)
    assert not torch.equal(gradient(first), gradient(second))
    # A resumed run continues with the noise that it would have drawn.
    resumed = AuxiliaryRun(Rotated2)
    resumed.set_noise_state(first.noise_state())
    assert torch.equal(gradient(first), gradient(resumed))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("codec", [None, Rotated2])
def test_it_is_freed_when_backward_has_passed_the_first_layer(codec: Any) -> None:
    chain = Chain(AuxiliaryRun(codec))
    leaf = inputs().requires_grad_()
    x = leaf * 2
    loss = chain(x).sum()
    held = weak_storages(loss)
    del x
    gc.collect()
    assert any(not storage.expired() for storage in held)
    loss.backward()
    gc.collect()
    # The loss and its graph are alive, and their tensors are gone.
    assert loss.grad_fn is not None and all(storage.expired() for storage in held)


def weak_storages(loss: Tensor) -> list[StorageWeakRef]:
    """Returns weak references to all tensors but parameters that auxiliary nodes of a graph save."""
    found, waiting, seen = [], [loss.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "WithAuxiliary" in node.name():
            found += [StorageWeakRef(t.untyped_storage()) for t in node.saved_tensors[1:]]
        waiting += [source for source, _ in node.next_functions]
    assert len(found) >= 3
    return found


def test_it_is_freed_when_the_graph_is() -> None:
    chain = Chain(AuxiliaryRun(Rotated2))
    loss = chain(inputs()).sum()
    held = weak_storages(loss)
    del loss
    gc.collect()
    assert all(storage.expired() for storage in held)


class Delivered(torch.autograd.Function):
    """The delivery of the paper: the stored tensor takes the place of a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a)
        return x.clone(), a.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.saved_tensors[0]


def test_the_auxiliary_activation_is_no_path_for_gradients() -> None:
    x = inputs().requires_grad_()
    ones = torch.ones_like(x)
    # The control: an auxiliary activation that is not detached is added to the gradient of x.
    for a, expected in ((x.clone(), ones + x.detach()), (x.detach().clone(), ones)):
        y, _ = Delivered.apply(x, a)  # pyright: ignore
        assert torch.equal(torch.autograd.grad(y, x, ones)[0], expected)
    chain = Chain(AuxiliaryRun())
    y = x
    for layer in chain.layers:
        y = y + nn.functional.linear(y, layer.weight)  # pyright: ignore
    plain, = torch.autograd.grad(y.sum(), x)
    found, = torch.autograd.grad(chain(x).sum(), x)
    assert torch.allclose(found, plain)


def test_several_forward_passes_before_backward() -> None:
    chain, x = Chain(AuxiliaryRun()), inputs()
    apart = []
    for part in (x, -2 * x):
        chain.zero_grad()
        chain(part).sum().backward()
        apart.append([layer.weight.grad.clone() for layer in chain.layers])  # pyright: ignore
    chain.zero_grad()
    (chain(x).sum() + chain(-2 * x).sum()).backward()
    for layer, *grads in zip(chain.layers, *apart):
        assert torch.allclose(layer.weight.grad, grads[0] + grads[1], atol=1e-5)  # pyright: ignore


def test_a_change_in_place_is_noticed() -> None:
    chain, x = Chain(AuxiliaryRun()), inputs().requires_grad_() * 1
    y = chain(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_other_shapes_are_refused() -> None:
    run = AuxiliaryRun(name="stage 1")
    layer = AuxiliaryResidualConv2d(4, 4, 3, run=run)
    for shape in ((2, 4, 5, 5), (2, 8, 6, 6), (4, 6, 6)):
        with run.over(torch.randn(shape)), pytest.raises(
                ValueError, match=r"AuxiliaryResidualConv2d: .*run 'stage 1' has shape .*stride"):
            layer(torch.randn(2, 4, 6, 6))
    with run.over(torch.randn(2, 4, 6, 6, device="meta")), pytest.raises(ValueError, match="on meta"):
        layer(torch.randn(2, 4, 6, 6))


def test_runs_that_are_not_open_open_twice_or_never_begun() -> None:
    run, x = AuxiliaryRun(), inputs()
    layer = AuxiliaryResidualLinear(WIDTH, WIDTH, run=run)
    with pytest.raises(RuntimeError, match="the run is not open"):
        layer(x)
    with pytest.raises(RuntimeError, match="ends, but it has not begun"):
        run.end()
    run.begin(x)
    with pytest.raises(RuntimeError, match="begins again before it has ended"):
        run.begin(x)
    run.end()
    with torch.no_grad():
        assert layer(x).shape == x.shape
        run.begin(x)
    with pytest.raises(RuntimeError, match="began without gradients"):
        layer(x)
    run.reset()
    with pytest.raises(ValueError, match="stop"), run.over(x):
        raise ValueError("stop")
    assert not run.is_open


@pytest.mark.parametrize("x", [None, torch.arange(4), [1.0]])
def test_a_run_begins_with_floats(x: Any) -> None:
    with pytest.raises(TypeError, match="tensor of floats"):
        AuxiliaryRun().begin(x)


def test_arguments_of_a_run() -> None:
    with pytest.raises(TypeError, match="would do nothing"):
        AuxiliaryRun(bit_width=2)
    with pytest.raises(TypeError, match="would do nothing"):
        AuxiliaryRun(codec_from(Rotated2), bit_width=2)
    with pytest.raises(TypeError, match="expected a Brevitas config class"):
        AuxiliaryRun("2 bits")
    assert repr(AuxiliaryRun(Rotated2, bit_width=4, name="a")) == "AuxiliaryRun('a', 4-bit rotated)"
    assert repr(AuxiliaryRun()) == "AuxiliaryRun(exact)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_the_gradient(value: float) -> None:
    for codec in (None, Rotated2):
        chain, x = Chain(AuxiliaryRun(codec)), inputs()
        x[0, 0] = value
        chain(x).sum().backward()
        assert not chain.layers[2].weight.grad.isfinite().all()  # pyright: ignore


def test_threads_have_runs_of_their_own() -> None:
    """Replicas of nn.DataParallel share the run object."""
    chain, meet = Chain(AuxiliaryRun()), threading.Barrier(2, timeout=30)
    expected = [grads_at(chain, x, None) for x in (inputs(), -3 * inputs())]
    found: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: found.update({i: grads_at(chain, x, meet)}))
        for i, x in enumerate((inputs(), -3 * inputs()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[i], expected[i]))


def grads_at(chain: Chain, x: Tensor, meet: threading.Barrier | None) -> list[Tensor]:
    y = x
    with chain.run.over(x):
        for layer in chain.layers:
            if meet is not None:
                meet.wait()
            y = y + layer(y)
    return list(torch.autograd.grad(y.sum(), list(chain.parameters())))
