"""The gradient's error is bounded in compiled graphs too: rows, channels, statistics of norms."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper
from brevitas_bp.backward.compiled import hooks as inlined
from brevitas_bp.backward.compiled import placement
from brevitas_bp.backward.compiled.rows import Grouping
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Dynamo does not know how to trace:UserWarning",
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Frees everything compiled in a test when it ends: other tests count live tensors."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


class _Images(nn.Module):
    """Channels of very different size, through a batch norm and a depthwise convolution."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        sizes = torch.logspace(-3, 2, channels)[torch.arange(channels) * 5 % channels]
        self.register_buffer("sizes", sizes.view(-1, 1, 1))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x) * self.sizes)
        return self.last(self.each(y * self.sizes))


class _Tokens(nn.Module):
    """Rows of very different size, through a layer norm and a linear layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = torch.logspace(-3, 2, 32)[torch.arange(32) * 11 % 32]
        self.register_buffer("sizes", sizes.unsqueeze(-1))
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x) * self.sizes)
        return self.last(y * self.sizes) / self.sizes


def _error(network: nn.Module, x: Tensor, compiled: nn.Module) -> float:
    weights = torch.randn(network(x).shape, generator=torch.Generator().manual_seed(2))

    def gradient(module: nn.Module) -> Tensor:
        loss = (module(x) * weights).sum()
        found = torch.autograd.grad(loss, list(network.parameters()))
        return torch.cat([g.flatten() for g in found])

    # Compare all parameters: a norm removes most of the gradient of the layer before it.
    exact, rounded = gradient(network), gradient(compiled)
    return float((rounded - exact).norm() / exact.norm())


def _wrapped(network: nn.Module, backend: str = "aot_eager") -> nn.Module:
    torch.compiler.reset()
    return QuantBackwardWrapper(
        torch.compile(network, backend=backend), ShiftedUint2DynamicActPerBucketFloatStochastic,
        policy=OpAware(recomputed_bits=8), seed=0, bucket_size=256, metadata_dtype=torch.bfloat16)


@pytest.mark.parametrize(("kind", "shape"), [(_Images, (8, 3, 8, 8)), (_Tokens, (2, 32, 64))])
def test_the_error_is_bounded(
        kind: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, x = kind(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert _error(network, x, _wrapped(network)) <= 2
    # The control: flat buckets through the whole tensor.
    monkeypatch.setattr(inlined, "grouping_of", lambda *arguments: Grouping())
    assert _error(network, x, _wrapped(network)) > 2


def test_a_norm_hands_its_statistics_to_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    found, original = [], placement.statistics_of

    def note(node: torch.fx.Node) -> object:
        found.append(original(node))
        return found[-1]

    monkeypatch.setattr(placement, "statistics_of", note)
    torch.manual_seed(0)
    # This backend decomposes norms, as Inductor does.
    _wrapped(_Images(), "aot_eager_decomp_partition")(torch.randn(8, 3, 8, 8)).sum().backward()
    assert any(statistics is not None for statistics in found)
