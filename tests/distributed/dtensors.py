"""Single DTensors: they pass through a codec, are encoded once, and are watched for changes."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
    all_gather_tensor_autograd,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from brevitas_bp import ModifiedInPlaceError, OpAware, UnsupportedQuantizerError
from brevitas_bp.codec import Codec, Copy
from brevitas_bp.codec.shard import ShardCodec, is_partial, shard_of
from brevitas_bp.grad import QuantGradientWrapper
from tests.backward.support import Apply
from tests.distributed.support import Facts, digest, local, wrapper


def shards(folder: Path) -> Facts:
    """Encodes and decodes a DTensor, for all placements and uneven shards."""
    mesh, codec = init_device_mesh("cpu", (2,)), ShardCodec(Copy())
    facts: Facts = {}
    for name, x in {
            "replicated": distribute_tensor(torch.randn(6, 5), mesh, [Replicate()]),
            "rows": distribute_tensor(torch.randn(5, 3), mesh, [Shard(0)]),
            "columns": distribute_tensor(torch.randn(3, 5).t(), mesh, [Shard(1)]),
            "empty shard": distribute_tensor(torch.randn(1, 5), mesh, [Shard(0)]),
            "summands": distribute_tensor(torch.randn(4, 8), mesh, [Shard(1)]).sum(1)}.items():
        back = codec.encode(x, seed=0).decode()
        assert isinstance(back, DTensor)
        facts[name] = [
            back.placements == x.placements, back.shape == x.shape, back.stride() == x.stride(),
            digest([local(back)]) == digest([local(x)]), is_partial(x), shard_of(x).numel()]
    return facts


class Counting(Codec):
    """Counts its encodes; keeps a copy of the tensor."""

    def __init__(self) -> None:
        self.encoded, self.copy = 0, Copy()

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Any:
        self.encoded += 1
        half = self.copy.encode(x.to(torch.bfloat16), seed=seed)
        return type(half)(self, half.tensors, self.copy.encode(x, seed=seed).layout, None, where)

    def decode(self, packed: Any) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))


def once(folder: Path) -> Facts:
    """Encodes a DTensor once for several operations, and again after a change in place."""
    mesh = init_device_mesh("cpu", (2,))

    def count(change: bool) -> int:
        codec = Counting()

        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x * 2
                z = y.square().sum()
                if change:
                    with torch.no_grad():
                        y.add_(1)
                return z + y.square().sum() + y.t().exp().sum()

        x = distribute_tensor(torch.randn(64, 64), mesh, [Shard(0)]).requires_grad_()
        model = wrapper(policy=lambda saved: codec if saved.op == "square" else None)(Net())
        model(x).full_tensor()  # type: ignore[operator]
        return codec.encoded

    return {"same": count(False), "changed": count(True)}


class ChangedLater(nn.Module):
    """Changes a tensor after it was saved."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.square()
        with torch.no_grad():
            y.add_(1)
        return z


def change(folder: Path) -> Facts:
    """Kept DTensors are watched: exact ones, small ones, and those quantized when backward starts."""
    mesh = init_device_mesh("cpu", (2,))

    def error(rows: int, width: int = 64, **options: Any) -> str:
        x = distribute_tensor(torch.randn(rows, width), mesh, [Shard(0)]).requires_grad_()
        loss = wrapper(**options)(ChangedLater())(x).sum()
        try:
            loss.backward()
        except ModifiedInPlaceError as found:
            return type(found).__name__
        return ""

    return {
        "exact": error(64, policy="exact"), "small": error(2, width=1),
        "late": error(64, storage="quantize_on_backward"), "encoded": error(64)}


def gathered(folder: Path) -> Facts:
    """Activations of a collective's result: it may still be incomplete, and is no ordinary tensor."""
    errors: Facts = {}
    for function in (F.silu, F.gelu, torch.tanh):
        x = torch.randn(64, 64, requires_grad=True)

        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = all_gather_tensor_autograd(x, 0, dist.group.WORLD)
                assert isinstance(y, AsyncCollectiveTensor)
                return function(y)  # noqa: B023

        found = []
        for model in (Net(), wrapper(policy=OpAware(multiplier_bits=8))(Net())):
            (grad,) = torch.autograd.grad(model(x).sum(), x)
            found.append(grad)
        errors[function.__name__] = float((found[0] - found[1]).abs().max())
    return errors


def losses(folder: Path) -> Facts:
    """Losses of DTensors run as they are; layers with such weights round no gradients."""
    mesh, errors = init_device_mesh("cpu", (2,)), {}
    labels = distribute_tensor(torch.arange(64) % 48, mesh, [Shard(0)])
    targets = distribute_tensor(torch.ones(64, 48), mesh, [Shard(0)])
    for name, loss in {
            "cross entropy": lambda z: F.cross_entropy(z, labels, reduction="sum"),
            "mse": lambda z: F.mse_loss(z, targets, reduction="sum")}.items():
        torch.manual_seed(0)
        z = distribute_tensor(torch.randn(64, 48), mesh, [Shard(0)]).requires_grad_()
        found = [torch.autograd.grad(model(z), z)[0] for model in (loss, wrapper()(Apply(loss)))]
        errors[name] = float(local((found[0] - found[1]).abs().max()))
    layer = nn.Linear(48, 8)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
    layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Replicate()]))
    try:
        QuantGradientWrapper(layer)(distribute_tensor(torch.ones(4, 48), mesh, [Replicate()]))
    except UnsupportedQuantizerError as error:
        errors["gradients"] = str(error)
    return errors


SCENARIOS = {
    "tp losses": losses, "tp shards": shards, "tp once": once, "tp change": change,
    "tp gathered": gathered}
