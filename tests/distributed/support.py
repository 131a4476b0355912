"""Shared by the distributed scenarios: networks, one way to train, and facts that fit into JSON.

Facts are plain values. Tensors are compared by digests of their bytes, so that the tests can compare
processes, and jobs of different size.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import NaiveCodes, OpAwareSpy, Spy, naive_pack, naive_unpack

Facts = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]
#: Makes a job from a network; ``wrap`` wraps it, inside the engine or around it.
Strategy = Callable[[nn.Module, Wrap], nn.Module]

ROWS = 64
WIDTH = 64


def integers(*shape: int, seed: int) -> Tensor:
    """Returns whole numbers from -2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


def integer_net() -> nn.Module:
    """Returns a network whose gradients are whole numbers below 2**24: sums are equal in every order.

    With 64 rows, hidden values are below 2 * 2 * 16 + 2 = 66, gradients of the hidden layer are below 8
    * 2 * 2 = 32, and gradients of a weight are below 64 * 66 * 32 < 2**18. Divided by two processes, all
    are exact.
    """
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    for i, parameter in enumerate(net.parameters()):
        parameter.data = integers(*parameter.shape, seed=i)
    return net


def float_net(dropout: float = 0.0) -> nn.Module:
    """Norm, linear layers, a smooth and a piecewise linear activation."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH),
        nn.ReLU(), nn.Dropout(dropout), nn.Linear(WIDTH, 8))


def batch(rank: int, width: int = WIDTH, rows: int = ROWS) -> Tensor:
    """Returns the inputs of one process."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + rank))


def digest(tensors: Iterable[Tensor | None]) -> str:
    """Returns a digest that is equal only for equal bits."""
    found = hashlib.sha256()
    for x in tensors:
        if x is not None:
            found.update(f"{x.dtype}{tuple(x.shape)}".encode())
            found.update(x.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def whole(x: Tensor | None) -> Tensor | None:
    """Gathers a DTensor; a collective operation."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor | None) -> Tensor | None:
    """Returns the part that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def grads(model: nn.Module) -> list[Tensor | None]:
    """Returns the gradients, gathered."""
    return [whole(p.grad) for p in model.parameters()]


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the network without a wrapper."""
    return model


def wrapper(**options: Any) -> Wrap:
    """Wraps with a fixed seed."""
    return lambda module: QuantBackwardWrapper(module, **{"seed": 3, **options})


EXACT = wrapper(policy="exact")
QUANTIZED = wrapper()


@dataclass
class Trained:
    """A job after some steps, and facts about it."""

    model: nn.Module
    output: str
    grads: str
    parameters: str
    saved: tuple[int, int]

    @property
    def bits(self) -> tuple[str, str, str]:
        """Returns digests of everything computed."""
        return self.output, self.grads, self.parameters


def loss_of(output: Tensor) -> Tensor:
    """Returns the sum of the local outputs times whole numbers, which are equal for each row."""
    here = local(output)
    assert here is not None
    return (here * integers(here.shape[-1], seed=9).to(here.dtype)).sum()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Runs forward and backward."""
    output = model(x)
    loss_of(output).backward()
    return output.detach()


def for_each(
        orders: Mapping[str, Callable[..., nn.Module]], options: Mapping[str, dict[str, Any]],
        found: Callable[[Strategy], Facts]) -> Facts:
    """Returns the results for every order of wrapping with every option."""
    return {
        f"{order} {option}": found(partial(make, **settings))
        for order, make in orders.items() for option, settings in options.items()}


def train(
        strategy: Strategy, wrap: Wrap, net: nn.Module, x: Tensor, *, steps: int = 3,
        optimizer: Callable[..., Any] | None = None) -> Trained:
    """Runs steps with Adam; returns digests of first output, first gradients and last parameters."""
    model = strategy(net, wrap)
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    update = make(list(model.parameters()))
    with track_saved_memory(model) as report:
        output = model(x)
    loss_of(output).backward()
    found = digest(grads(model))
    update.step()
    for _ in range(steps - 1):
        update.zero_grad()
        step(model, x)
        update.step()
    parameters = digest([whole(p) for p in model.parameters()])
    return Trained(
        model, digest([local(output)]), found, parameters,
        (report.exact_bytes, report.stored_bytes))


def ratio(trained: Trained) -> float:
    """Returns bytes that plain autograd keeps, divided by bytes kept."""
    return trained.saved[0] / trained.saved[1]


class ShowsParameters:
    """Detects if a tensor holds the values of a parameter, or half of one, in any order and dtype.

    It compares values, because parameters come and go under other identities. Constant parameters look
    like any constant tensor.
    """

    def __init__(self, net: nn.Module) -> None:
        pieces = [(p, *p.chunk(2)) for p in net.parameters()]
        self._values = [
            p.detach().clone().flatten().sort()[0] for group in pieces for p in group]
        self._values = [v for v in self._values if v[0] != v[-1]]

    def __call__(self, x: Tensor) -> bool:
        x = x.detach()
        found = whole(x)
        assert found is not None
        flat = found.flatten()
        return any(
            v.numel() == flat.numel() and torch.equal(v.to(flat.dtype), flat.sort()[0])
            for v in self._values)


def asked_about_parameters(
        strategy: Strategy, make: Callable[[], nn.Module], x: Tensor, *,
        default: bool = False, spy: Spy | None = None) -> tuple[int, int]:
    """Returns how many parameters, and how many tensors, a policy is asked about in two steps."""
    shows, seen = ShowsParameters(make()), list[bool]()
    spy = spy or (OpAwareSpy() if default else Spy())
    spy.asked = _Checked(shows, seen)  # type: ignore[assignment]
    model = strategy(make(), wrapper(policy=spy))
    step(model, x)
    step(model, x)
    return sum(seen), len(seen)


class _Checked(list):  # type: ignore[type-arg]
    """Checks each saved tensor while it is alive."""

    def __init__(self, shows: ShowsParameters, seen: list[bool]) -> None:
        super().__init__()
        self.shows, self.seen = shows, seen

    def append(self, saved: Any) -> None:
        self.seen.append(saved.tensor.is_floating_point() and self.shows(saved.tensor))


@dataclass
class NaiveWrapper:
    """Counts the parameters among the tensors that a naive library packs."""

    shows: ShowsParameters
    packed: list[bool] = field(default_factory=list)

    def pack(self, x: Tensor) -> Any:
        """Packs everything; DTensors are only counted."""
        if isinstance(x, DTensor):
            self.packed.append(self.shows(x))
            return x
        packed = naive_pack(x)
        if isinstance(packed, NaiveCodes):
            self.packed.append(self.shows(x))
        return packed

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Packs every tensor saved in the block."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, naive_unpack):
            yield


def naive_count(strategy: Strategy, make: Callable[[], nn.Module], x: Tensor) -> int:
    """Returns the number of parameters that naive hooks pack."""
    naive = NaiveWrapper(ShowsParameters(make()))
    model = strategy(make(), unwrapped)
    with naive.hooks():
        step(model, x)
    return sum(naive.packed)


def rank() -> int:
    """Returns the rank of this process."""
    return dist.get_rank()
