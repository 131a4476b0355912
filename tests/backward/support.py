"""Shared by the tests of saved-tensor hooks: naive rivals, small networks, and one way to run them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from brevitas_bp import Codec, Packed, QuantBackwardWrapper, SavedTensor
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Decision
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat
from tests.stats import normal

#: Policies that must keep every promise: one rounds every float tensor, one rewrites operations.
QUANTIZING = ["all", "op_aware"]


@dataclass(frozen=True)
class NaiveCodes:
    """A naive stored tensor: 2-bit codes of the whole tensor, a byte each, and a shape."""

    codes: Tensor
    lo: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype


def naive_pack(x: Tensor) -> Any:
    """Quantizes any float tensor to 2 bits, to nearest, per tensor, without checks."""
    if not x.is_floating_point() or x.numel() == 0:
        return x
    lo = x.detach().min()
    scale = (x.detach().max() - lo) / 3
    codes = ((x.detach() - lo) / scale).round().to(torch.uint8).flatten()
    return NaiveCodes(codes, lo, scale, x.shape, x.dtype)


def naive_unpack(packed: Any) -> Tensor:
    """Inverse of :func:`naive_pack`."""
    if isinstance(packed, Tensor):
        return packed
    values = packed.codes * packed.scale + packed.lo
    return values.to(packed.dtype).reshape(packed.shape)


def naive_hooks() -> saved_tensors_hooks:
    """Returns the hooks of a naive library, which quantize every float tensor."""
    return saved_tensors_hooks(naive_pack, naive_unpack)


def identity_hooks() -> saved_tensors_hooks:
    """Returns hooks that keep the tensor itself, as a naive "exact" policy would."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class HalfCodec(Codec):
    """Stores float32 as float16. Small integers stay exact, so tests of mechanism see no rounding."""

    name = "half"

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        self.seeds.append(seed)
        layout = TensorLayout.of(x)
        return Packed(self, (layout.flatten(x).to(torch.float16),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))


@dataclass
class Spy:
    """A policy that records its questions, and answers with the configured codec for floats."""

    asked: list[SavedTensor] = field(default_factory=list)

    def __call__(self, saved: SavedTensor) -> Codec | None:
        self.asked.append(saved)
        return saved.codec if saved.tensor.is_floating_point() else None

    @property
    def places(self) -> list[tuple[str, str | None]]:
        """Returns (module, op) of every question."""
        return [(saved.module, saved.op) for saved in self.asked]


class OpAwareSpy(Spy):
    """Records the questions of the default policy, and decides and rewrites as that policy does."""

    policy = OpAware()

    def decide(self, saved: SavedTensor) -> Decision:
        self.asked.append(saved)
        return self.policy.decide(saved)

    def rewrite(self, function: Any) -> Rewrite | None:
        return self.policy.rewrite(function)


#: Spies for the policies of :data:`QUANTIZING`.
SPIES: dict[str, type[Spy]] = {"all": Spy, "op_aware": OpAwareSpy}


class Apply(nn.Module):
    """Runs a function of the inputs and the module's parameters."""

    def __init__(self, function: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


@dataclass(frozen=True)
class Run:
    """One forward and backward pass: every result to compare with plain autograd."""

    output: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    rng: Tensor


def cotangent(output: Tensor) -> Tensor:
    """Returns a gradient for ``output`` whose elements all differ."""
    return torch.linspace(-1, 2, output.numel()).cos().view(output.shape).to(output.dtype)


def run(module: nn.Module, *inputs: Tensor, seed: int = 0, copied: bool = True) -> Run:
    """Runs forward and backward of (a copy of) ``module``, with torch's generator at ``seed``."""
    model = copy.deepcopy(module) if copied else module
    leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    torch.manual_seed(seed)
    output = model(*leaves)
    rng = torch.get_rng_state()
    output.backward(cotangent(output))
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    named |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return Run(
        output.detach(), {name: grad for name, grad in named.items() if grad is not None},
        {name.removeprefix("module."): b for name, b in model.named_buffers()}, rng)


def wrapped_run(module: nn.Module, *inputs: Tensor, seed: int = 0, **options: Any) -> Run:
    """Runs :func:`run` on the wrapped module."""
    return run(
        QuantBackwardWrapper(copy.deepcopy(module), seed=1, **options), *inputs, seed=seed,
        copied=False)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


class InPlace(nn.Module):
    """In-place operations that autograd allows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu_()
        doubled = (hidden * 2).add_(1)
        doubled[:, ::2] *= 0.5
        return self.last(F.leaky_relu_(doubled))


class Views(nn.Module):
    """Chunks, transposes, expands and gathers between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.token = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.mT).softmax(-1)
        mixed = (scores @ v).transpose(1, 2).flip(1)[:, 4:]
        return mixed.gather(1, mixed.argsort(1)).expand(2, -1, -1, -1).square()


class Shared(nn.Module):
    """One layer called twice; its weight, transposed, is also the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed = nn.Linear(64, 64), nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(torch.tanh(self.body(self.embed(x))))
        return F.linear(hidden, self.embed.weight.t())


class Encoder(nn.Module):
    """Layer norm, attention, GELU: one transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Recurrent(nn.Module):
    """An LSTM that returns its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _conjugates(x: Tensor, w: Tensor) -> Tensor:
    """Lazy conjugates and negations share storage, shape and strides with the original tensors."""
    z = torch.fft.rfft(x * w)
    return (z * z.conj()).real + (z.imag / 8).exp() + (z.conj().imag / 4).exp()


def _conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=4), nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout(0.3),
        nn.ConvTranspose2d(16, 8, 2), nn.GroupNorm(2, 8), nn.Hardswish(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(72, 10), nn.LogSoftmax(1))


_SPECTRAL = Apply(
    lambda x, w: torch.where(x > 0, torch.fft.rfft(x * w).abs().sum(-1, keepdim=True), x.cumprod(-1)),
    nn.Parameter(torch.ones(32)))

#: name -> (module, inputs). Together they save most kinds of tensors.
NETS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "conv": lambda: (_conv_net(), (torch.randn(8, 3, 16, 16),)),
    "encoder": lambda: (Encoder(), (torch.randn(4, 16, 32),)),
    "lstm": lambda: (Recurrent(), (torch.randn(4, 12, 16),)),
    "in_place": lambda: (InPlace(), (torch.randn(32, 64),)),
    "views": lambda: (Views(), (torch.randn(4, 15, 32),)),
    "shared": lambda: (Shared(), (torch.randn(8, 32),)),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(50, 32, max_norm=2.0), nn.Linear(32, 64), nn.Tanh()),
        (torch.arange(40).view(4, 10),)),
    "spectral": lambda: (copy.deepcopy(_SPECTRAL), (torch.randn(8, 32),)),
    "conjugates": lambda: (
        Apply(_conjugates, nn.Parameter(torch.ones(32))), (torch.randn(8, 32),)),
    "eval": lambda: (_conv_net().eval(), (torch.randn(8, 3, 16, 16),)),
    "channels_last": lambda: (
        _conv_net().to(memory_format=torch.channels_last),
        (torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last),)),
}


def net(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a network of :data:`NETS` and its inputs, the same at each call."""
    torch.manual_seed(5)
    return NETS[name]()


class SeeSaved(torch.autograd.Function):
    """Records the tensor that backward receives."""

    seen: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (SeeSaved.seen,) = ctx.saved_tensors
        return grad.expand(SeeSaved.seen.shape)


class Square(torch.autograd.Function):
    """A custom operation of a user."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Gated(nn.Module):
    """A gated linear unit of 32 inputs; ``change`` is applied to the product."""

    def __init__(
            self, function: Callable[[Tensor], Tensor] = F.silu,
            change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(32, 256), nn.Linear(32, 256), nn.Linear(256, 16)
        self.function, self.change = function, change

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.change(self.function(self.gate(x)) * self.up(x)))


def assert_unbiased(module: nn.Module, x: Tensor) -> None:
    """Compares the mean of 300 gradients with the exact one, in 8 directions of each parameter."""
    model = QuantBackwardWrapper(
        module, RotatedNormal2DynamicActPerBucketFloat, bucket_size=256, seed=5)
    parameters, generator = list(module.parameters()), torch.Generator().manual_seed(2)
    exact = torch.autograd.grad(module(x).square().sum(), parameters)
    directions = [torch.randn(8, p.numel(), generator=generator) / p.numel()**0.5 for p in parameters]
    draws = torch.stack([torch.cat([
        d @ (g - e).reshape(-1) for d, g, e in zip(
            directions, torch.autograd.grad(model(x).square().sum(), parameters), exact)])
        for _ in range(300)])
    # The tolerance of a z-test of all sums, plus the bias of rotated codes: 2e-3 of the gradient.
    sizes = torch.cat([e.norm().expand(8) / e.numel()**0.5 for e in exact])
    allowed = normal(len(sizes)) * draws.std(0) / 300**0.5 + 2e-3 * sizes
    assert bool((draws.mean(0).abs() < allowed).all())
