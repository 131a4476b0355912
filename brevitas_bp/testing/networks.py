"""The check that a codec works in a wrapped network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from brevitas_bp.backward import QuantBackwardWrapper, SavedTensor
from brevitas_bp.codec import Codec
from brevitas_bp.testing.checks import Check, found
from brevitas_bp.testing.subject import Subject, differing, same_bits


class Network(nn.Module):
    """Saves float32 inputs and outputs, int64 indices and a bool mask for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, indices: Tensor, mask: Tensor) -> Tensor:
        """Returns outputs [n, 16] for indices [n] and a mask [n, 64]."""
        return self.layers(self.table(indices).masked_fill(mask, 0.0))


def _run(
        subject: Subject, policy: Callable[[SavedTensor], Codec | None] | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns output, gradients of two backward passes, and the state of torch's generator after it."""
    torch.manual_seed(0)
    net = Network().to(subject.device)
    indices = torch.arange(128, device=subject.device).remainder(90)
    mask = torch.randn(128, 64, device=subject.device) > 1
    model = net if policy is None else QuantBackwardWrapper(net, policy=policy, seed=1)
    output = model(indices, mask)
    state = torch.get_rng_state()
    parameters, loss = list(net.parameters()), output.square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    return output.detach(), [*first, *torch.autograd.grad(loss, parameters)], state


def _works_in_a_network(subject: Subject) -> None:
    codec, dtypes, encoded = subject.fresh(), subject.dtypes, 0

    def policy(saved: SavedTensor) -> Codec | None:
        nonlocal encoded
        encoded += saved.tensor.dtype in dtypes
        return codec if saved.tensor.dtype in dtypes else None

    case = "a network with an embedding, two linear layers, tanh and dropout"
    plain, wrapped = _run(subject, None), _run(subject, policy)
    if not encoded:
        return
    if not same_bits(wrapped[0], plain[0]):
        found(case, "the output of the network without the wrapper", differing(wrapped[0], plain[0]))
    if not torch.equal(wrapped[2], plain[2]):
        found(case, "torch's random state as without the wrapper", "another state")
    half = len(plain[1]) // 2
    for i, (got, expected) in enumerate(zip(wrapped[1], plain[1])):
        if not got.isfinite().all():
            found(case, f"a finite gradient of parameter {i % half}", "NaN or Inf")
        if not codec.lossy and not same_bits(got, expected):
            found(case, f"the exact gradient of parameter {i % half}, because lossy is False",
                  differing(got, expected))
    if not all(map(same_bits, wrapped[1][:half], wrapped[1][half:])):
        found(f"{case}, backward twice", "the same gradients", "other gradients")


def _fits(subject: Subject) -> bool:
    return subject.decodes_to is None and not subject.given


#: name -> check of a codec in a network.
NETWORKS: dict[str, Check[Subject]] = {
    "wrapper": Check(
        "in QuantBackwardWrapper a codec leaves the forward pass as it is, and backward works",
        _works_in_a_network, _fits)}
