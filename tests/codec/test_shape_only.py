"""Saved tensors that backward never reads: replacing them with garbage changes no bit."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shape_only import ShapeOnly, shape_only
from tests.codec.support import Op, run
from tests.strategies import LAYOUTS, normals
from tests.support import same_bits


class Garbage(Codec):
    """The worst content of uninitialised memory."""

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        return Packed(self, (), TensorLayout.of(x))

    def decode(self, packed: Packed) -> Tensor:
        x = shape_only().encode(torch.empty(0)).codec.decode(packed)
        return x.fill_(float("nan") if x.is_floating_point() else 0)


class Case(NamedTuple):
    """An operation on a float tensor [2, 4, 8, 6], and the saved tensors that backward does not read."""

    op: Op
    unread: tuple[int, ...]


def integers(shape: tuple[int, ...], high: int) -> Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(5))


INDEX = integers((2, 3, 8, 6), 4)
TARGET = integers((2, 8, 6), 4)
GRID = torch.rand((2, 5, 5, 2), generator=torch.Generator().manual_seed(5)) * 2 - 1

UNREAD: dict[str, Case] = {
    "max_pool1d": Case(lambda x: F.max_pool1d(x[0], 2), (0,)),
    "max_pool2d": Case(lambda x: F.max_pool2d(x, 2), (0,)),
    "max_pool3d": Case(lambda x: F.max_pool3d(x, 2), (0,)),
    "adaptive_max_pool1d": Case(lambda x: F.adaptive_max_pool1d(x[0], 2), (0,)),
    "adaptive_max_pool2d": Case(lambda x: F.adaptive_max_pool2d(x, 2), (0,)),
    "adaptive_max_pool3d": Case(lambda x: F.adaptive_max_pool3d(x, 2), (0,)),
    "fractional_max_pool2d": Case(lambda x: F.fractional_max_pool2d(x, 2, 3), (0,)),
    "fractional_max_pool3d": Case(lambda x: F.fractional_max_pool3d(x, 2, 2), (0,)),
    "avg_pool1d": Case(lambda x: F.avg_pool1d(x[0], 2), (0,)),
    "avg_pool2d": Case(lambda x: F.avg_pool2d(x, 2), (0,)),
    "avg_pool3d": Case(lambda x: F.avg_pool3d(x, 2), (0,)),
    "adaptive_avg_pool1d": Case(lambda x: F.adaptive_avg_pool1d(x[0], 2), (0,)),
    "adaptive_avg_pool2d": Case(lambda x: F.adaptive_avg_pool2d(x, 2), (0,)),
    "adaptive_avg_pool3d": Case(lambda x: F.adaptive_avg_pool3d(x, 2), (0,)),
    "interpolate area": Case(lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), (0,)),
    "reflect 1": Case(lambda x: F.pad(x[0], (1, 1), "reflect"), (0,)),
    "reflect 2": Case(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), (0,)),
    "reflect 3": Case(lambda x: F.pad(x[None], (1,) * 6, "reflect"), (0,)),
    "replicate 1": Case(lambda x: F.pad(x[0], (1, 1), "replicate"), (0,)),
    "replicate 2": Case(lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), (0,)),
    "replicate 3": Case(lambda x: F.pad(x[None], (1,) * 6, "replicate"), (0,)),
    "gather": Case(lambda x: x.gather(1, INDEX), (1,)),
    "take": Case(lambda x: x.take(INDEX), (1,)),
    "take_along_dim": Case(lambda x: x.take_along_dim(INDEX, 1), (1,)),
    "masked_select": Case(lambda x: x.masked_select(x > 0), (1,)),
    "cummax": Case(lambda x: x.cummax(1)[0], (0,)),
    "cummin": Case(lambda x: x.cummin(1)[0], (0,)),
    "nll_loss": Case(lambda x: F.nll_loss(x, TARGET), (0,)),
    "nll_loss sum": Case(lambda x: F.nll_loss(x, TARGET, reduction="sum"), (0, 2)),
    "nll_loss none": Case(lambda x: F.nll_loss(x, TARGET, reduction="none"), (0, 2)),
    "nll_loss weight": Case(lambda x: F.nll_loss(x, TARGET, torch.ones(4)), (0,)),
    "grid_sample": Case(lambda x: F.grid_sample(x, GRID, align_corners=False), (1,)),
    "grid_sample nearest": Case(
        lambda x: F.grid_sample(x, GRID, mode="nearest", align_corners=False), (1,)),
    "rrelu in training": Case(lambda x: F.rrelu(x, training=True), (1,)),
    "rrelu_ in training": Case(lambda x: F.rrelu_(x, training=True), (1,)),
    "rrelu in evaluation": Case(lambda x: F.rrelu(x), (0,)),
    "rrelu_ in evaluation": Case(lambda x: F.rrelu_(x), (0,)),
    "sgn": Case(torch.sgn, (0, 1))}

#: Operations for which plain PyTorch raises.
REFUSE_CHANNELS_LAST = {"max_pool3d", *(name for name in UNREAD if name.startswith("nll_loss"))}

#: Operations that save nothing.
EMPTY: dict[str, Op] = {
    "adaptive_avg_pool2d to 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "pad": lambda x: F.pad(x, (1, 1)),
    "pad circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    **{f"interpolate {mode}": lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
       for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")},
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2),
    "fold": lambda x: F.fold(x.reshape(2, 4, 48)[..., :1], 2, 2),
    "expand": lambda x: x[:1].expand(4, 4, 8, 6),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: x.flip(1),
    "cat": lambda x: torch.cat([x, x]),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1)}


def sample() -> Tensor:
    return normals((2, 4, 8, 6)).float()


@pytest.mark.parametrize("name", UNREAD)
def test_backward_reads_nothing_else(name: str) -> None:
    case = UNREAD[name]
    x = sample()
    plain = run(case.op, x)
    for codec in (Garbage(), shape_only()):
        stored = run(case.op, x, dict.fromkeys(case.unread, codec))
        assert len(stored.packed) == len(case.unread)
        assert same_bits(stored.grad, plain.grad) and not plain.grad.isnan().any()
    if name in REFUSE_CHANNELS_LAST:
        return
    x = x.contiguous(memory_format=torch.channels_last)
    assert same_bits(
        run(case.op, x, dict.fromkeys(case.unread, Garbage())).grad, run(case.op, x).grad)


@pytest.mark.parametrize("name", UNREAD)
def test_the_other_saved_tensors_are_read(name: str) -> None:
    case = UNREAD[name]
    plain = run(case.op, sample())
    for i in set(range(len(plain.saved))) - set(case.unread):
        try:
            changed = not same_bits(run(case.op, sample(), {i: Garbage()}).grad, plain.grad)
        except RuntimeError:
            changed = True
        assert changed, (i, plain.saved[i].shape)


@pytest.mark.parametrize("name", EMPTY)
def test_these_save_nothing(name: str) -> None:
    assert run(EMPTY[name], sample()).saved == []


@pytest.mark.parametrize("op", [torch.relu, torch.exp, lambda x: x * x, lambda x: x.amax(1)])
def test_garbage_is_noticed_where_it_is_read(op: Op) -> None:
    plain = run(op, sample())
    assert not same_bits(run(op, sample(), {0: Garbage()}).grad, plain.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shape_strides_and_dtype_stay(layout: str) -> None:
    x = LAYOUTS[layout](normals((2, 3, 4, 5)).half())
    packed = ShapeOnly().encode(x)
    assert packed.tensors == () and packed.nbytes == 0 == ShapeOnly().stored_nbytes(packed.layout)
    decoded = packed.decode()
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    assert decoded.stride() == packed.layout.stride
    assert shape_only() is shape_only() == ShapeOnly()
