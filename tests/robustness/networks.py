"""Small networks as programs: lines that can be printed, parsed and run again.

A program is a start (shapes, dtype, layout of three inputs) and steps ``operation i j k``. A step
applies the operation to values ``i`` and ``j`` (modulo the number of values), in variant ``k``. Every
result is a new value.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.strategies import DTYPES, LAYOUTS, normals

SHAPES = ((4, 8, 16), (2, 4, 8, 8), (16, 32), (3, 5), (1, 16, 16), (2, 3, 9, 11))
_LARGEST = 1 << 13


class Step(NamedTuple):
    """One operation."""

    op: str
    i: int
    j: int
    k: int


@dataclass(frozen=True)
class Program:
    """A network."""

    start: tuple[int, int, int]
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        lines = ["start " + " ".join(map(str, self.start))]
        return "; ".join([*lines, *(" ".join(map(str, step)) for step in self.steps)])

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Inverse of ``str``."""
        start, *steps = (line.split() for line in text.split(";"))
        shape, dtype, layout = (int(word) for word in start[1:])
        return cls((shape, dtype, layout), tuple(
            Step(op, *(int(n) for n in numbers)) for op, *numbers in steps))  # pyright: ignore

    def inputs(self) -> list[Tensor]:
        """Three leaves of one shape, the last one in the default layout."""
        shape, dtype, layout = self.start
        make = list(LAYOUTS.values())[layout % len(LAYOUTS)]
        x = [normals(SHAPES[shape % len(SHAPES)], seed).to(DTYPES[dtype % 4]) for seed in range(3)]
        return [t.detach().requires_grad_() for t in (make(x[0]), make(x[1]), x[2])]


class Network(nn.Module):
    """Runs a program. Steps that need equal parameters share them; the first such step makes them."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.weights, self.layers = nn.ParameterDict(), nn.ModuleDict()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for step in self.program.steps:
            values.append(self.apply_step(step, values))
        return values

    def apply_step(self, step: Step, values: list[Tensor]) -> Tensor:
        """Returns the result of a step.

        Raises:
            ValueError: the result is too large, empty or not a float tensor. torch raises other errors.
        """
        a, b = values[step.i % len(values)], values[step.j % len(values)]
        y = OPS[step.op](self, a, b, step.k)
        if not 0 < y.numel() <= _LARGEST or not y.is_floating_point():
            raise ValueError(f"{step} gives {y.dtype} {tuple(y.shape)}")
        return y

    def weight(self, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        """Returns one of two parameters of this shape and dtype."""
        key = f"{k % 2} {shape} {dtype}".replace(".", "_")
        if key not in self.weights:
            values = normals(shape, zlib.crc32(key.encode())) * 0.5
            self.weights[key] = nn.Parameter(values.to(dtype))
        return self.weights[key]

    def layer(self, make: Callable[[int], nn.Module], x: Tensor) -> nn.Module:
        """Returns a layer with state, one for each number of channels and dtype."""
        key = f"{make.__name__} {x.shape[1]} {x.dtype}".replace(".", "_")
        if key not in self.layers:
            self.layers[key] = make(x.shape[1]).to(x.dtype)
        return self.layers[key]


Op = Callable[[Network, Tensor, Tensor, int], Tensor]


def _image(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.reshape(1, 1, -1, x.shape[-1])


def _linear(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    out = 4 + 4 * (k % 4)
    bias = None if k % 3 else net.weight(k, (out,), a.dtype)
    return F.linear(a, net.weight(k, (out, a.shape[-1]), a.dtype), bias)


def _conv(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    x, size = _image(a), 1 + k % 3
    weight = net.weight(k, (4, x.shape[1], size, size), a.dtype)
    return F.conv2d(x, weight, stride=1 + k % 2, padding=size // 2)


def _batch_norm(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    return net.layer(nn.BatchNorm2d, _image(a))(_image(a))


def _layer_norm(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    weight = net.weight(k, a.shape[-1:], a.dtype) if k % 2 else None
    return F.layer_norm(a, a.shape[-1:], weight)


def _prelu(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    return F.prelu(a, net.weight(k, (1,), a.dtype))


def _tied(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    """Uses one weight in a layer, and transposed in another."""
    weight = net.weight(k, (8, a.shape[-1]), a.dtype)
    return F.linear(F.linear(a, weight).tanh(), weight.t())


def _product(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    return a @ (a if k % 2 else b).transpose(-1, -2)


def _attention(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    q, v = (a, b if b.shape == a.shape and b.dtype == a.dtype else a)
    return F.scaled_dot_product_attention(q, q, v, dropout_p=0.2 * (k % 2), is_causal=k % 3 == 0)


def _index(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    index = torch.arange(3) * (k + 1) % a.shape[0]
    return (a[index], a.index_select(0, index), a[a > 0], a.flatten().gather(0, index))[k % 4]


def _no_grad(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        scale = F.gelu(_linear(net, a, b, k)).mean()
    return a * scale


def _checkpointed(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    def island(x: Tensor) -> Tensor:
        return F.dropout(F.silu(_tied(net, x, b, k)), 0.3) * x

    return checkpoint(island, a, use_reentrant=k % 2 == 0)  # pyright: ignore[reportReturnType]


def _written(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    """Overwrites a part of a value."""
    a[..., ::2] *= 0.5
    return a


def _pooled(net: Network, a: Tensor, b: Tensor, k: int) -> Tensor:
    pools = (F.max_pool2d, F.avg_pool2d, lambda x, size: F.adaptive_max_pool2d(x, 2),
             lambda x, size: F.adaptive_avg_pool2d(x, 3))
    return pools[k % 4](_image(a), 2)


#: Kind -> name -> operation. In-place operations return the value that they changed.
KINDS: dict[str, dict[str, Op]] = {
    "layers": {
        "linear": _linear, "conv": _conv, "batch_norm": _batch_norm, "layer_norm": _layer_norm,
        "prelu": _prelu, "tied": _tied, "pool": _pooled, "attention": _attention,
        "group_norm": lambda net, a, b, k: F.group_norm(_image(a), 1),
        "checkpoint": _checkpointed, "no_grad": _no_grad},
    "activations": {
        "relu": lambda net, a, b, k: F.relu(a), "gelu": lambda net, a, b, k: F.gelu(a),
        "silu": lambda net, a, b, k: F.silu(a), "tanh": lambda net, a, b, k: a.tanh(),
        "sigmoid": lambda net, a, b, k: a.sigmoid(), "elu": lambda net, a, b, k: F.elu(a),
        "hardtanh": lambda net, a, b, k: F.hardtanh(a), "mish": lambda net, a, b, k: F.mish(a),
        "hardswish": lambda net, a, b, k: F.hardswish(a), "abs": lambda net, a, b, k: a.abs(),
        "softplus": lambda net, a, b, k: F.softplus(a), "square": lambda net, a, b, k: a.square(),
        "exp": lambda net, a, b, k: a.clamp(-3, 3).exp(), "sin": lambda net, a, b, k: a.sin(),
        "softmax": lambda net, a, b, k: a.softmax(-1 - k % 2 * (a.dim() > 1)),
        "log_softmax": lambda net, a, b, k: a.log_softmax(-1),
        "dropout": lambda net, a, b, k: F.dropout(a, 0.1 + 0.2 * (k % 4)),
        "alpha_dropout": lambda net, a, b, k: F.alpha_dropout(a, 0.2, training=True),
        "normalize": lambda net, a, b, k: F.normalize(a, dim=-1),
        "sum": lambda net, a, b, k: a.sum(-1, keepdim=True), "std": lambda net, a, b, k: a.std()},
    "pairs": {
        "mul": lambda net, a, b, k: a * b, "add": lambda net, a, b, k: a + b,
        "sub": lambda net, a, b, k: a - b, "div": lambda net, a, b, k: a / (b.abs() + 0.5),
        "matmul": _product, "cat": lambda net, a, b, k: torch.cat([a, b], k % a.dim()),
        "stack": lambda net, a, b, k: torch.stack([a, b]), "self": lambda net, a, b, k: a * a,
        "where": lambda net, a, b, k: torch.where(a > 0, a, b),
        "maximum": lambda net, a, b, k: torch.maximum(a, b),
        "addcmul": lambda net, a, b, k: a.addcmul(b, b)},
    "in place": {
        "relu_": lambda net, a, b, k: a.relu_(), "tanh_": lambda net, a, b, k: a.tanh_(),
        "leaky_relu_": lambda net, a, b, k: F.leaky_relu_(a),
        "silu_": lambda net, a, b, k: F.silu(a, inplace=True),
        "elu_": lambda net, a, b, k: F.elu_(a),
        "dropout_": lambda net, a, b, k: F.dropout(a, 0.2, inplace=True),
        "add_": lambda net, a, b, k: a.add_(b), "mul_": lambda net, a, b, k: a.mul_(b),
        "double_": lambda net, a, b, k: a.mul_(2), "zero_": lambda net, a, b, k: a.zero_(),
        "copy_": lambda net, a, b, k: a.copy_(b), "write": _written,
        "clamp_": lambda net, a, b, k: a.clamp_(-1, 1)},
    "views": {
        "transpose": lambda net, a, b, k: a.transpose(k % a.dim(), -1),
        "flatten": lambda net, a, b, k: a.flatten(k % a.dim()),
        "reshape": lambda net, a, b, k: a.reshape(4, -1),
        "view": lambda net, a, b, k: a.view(2, -1), "chunk": lambda net, a, b, k: a.chunk(2, -1)[k % 2],
        "expand": lambda net, a, b, k: a[..., :1].expand_as(a) if k % 2 else a.expand(2, *a.shape),
        "slice": lambda net, a, b, k: a[..., k % 2::2], "select": lambda net, a, b, k: a[k % a.shape[0]],
        "index": _index, "flip": lambda net, a, b, k: a.flip(-1),
        "detach": lambda net, a, b, k: a.detach(),
        "unfold": lambda net, a, b, k: a.unfold(-1, 2, 1), "clone": lambda net, a, b, k: a.clone(),
        "contiguous": lambda net, a, b, k: a.contiguous(),
        "channels_last": lambda net, a, b, k: _image(a).contiguous(memory_format=torch.channels_last),
        "cast": lambda net, a, b, k: a.to(DTYPES[k % 4]),
        "other dtype": lambda net, a, b, k: a.to(b.dtype)}}
OPS: dict[str, Op] = {
    name.replace(" ", "_"): op for kind in KINDS.values() for name, op in kind.items()}
NAMES = {kind: tuple(name.replace(" ", "_") for name in ops) for kind, ops in KINDS.items()}
