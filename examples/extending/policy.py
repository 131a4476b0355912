"""A policy of your own: the default policy, with two rules more.

    python examples/extending/policy.py

Derive a class from ``OpAware`` and override ``decide``. All that you do not decide stays as it was: the
rewritten activations and attention, masks, rows and units.

Expect a seventh more bytes than with the default policy, and a sixth of its error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, SavedTensor, track_saved_memory
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.backward.saved import Decision


@dataclass(frozen=True)
class Careful(OpAware):
    """Spends a few bytes more where they are cheap.

    Args:
        exact_below: tensors with fewer elements are kept exact.
        norms_below: inputs of norms with fewer elements get at least 4 bits. These are the late norms,
            which have the fewest elements to a statistic.
    """

    exact_below: int = 4096
    norms_below: int = 100_000

    def decide(self, saved: SavedTensor) -> Decision:
        """Returns codec and reason; called once for each tensor that autograd saves."""
        decision = super().decide(saved)
        codec, size = decision.codec, saved.tensor.numel()
        # None: kept exact. Masks and indices have a codec that loses nothing; leave them alone.
        if codec is None or not codec.lossy:
            return decision
        if size < self.exact_below:
            return decision._replace(codec=None, reason="small: few bytes")
        if decision.reach == "norm" and size < self.norms_below:
            # The user's quantizer with more bits. Do not build a codec here: a tensor that several
            # operations save is stored once only if they get the same codec object.
            return decision.with_codec(codec.at_least(4))
        return decision


def network() -> nn.Module:
    """Returns a network with norms, smooth activations and a small head."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 64, 3, 2), nn.BatchNorm2d(64),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.Tanh(),
        nn.Linear(64, 10))


def measure(policy: OpAware) -> tuple[int, float]:
    """Returns stored bytes, and the error of the gradient relative to its size."""
    torch.manual_seed(0)
    model = QuantBackwardWrapper(network(), policy=policy)
    images = torch.randn(32, 3, 16, 16)

    def loss(model: nn.Module) -> Tensor:
        return model(images).logsumexp(1).mean()

    with track_saved_memory(model) as report:
        value = loss(model)
    value.backward()
    total = measure_gradient_error(model, loss, draws=8).total
    return report.stored_bytes, (total.variance + max(total.offset, 0))**0.5 / total.size


def main() -> None:
    for name, policy in (
            ("default", OpAware()), ("small tensors exact", Careful(norms_below=0)),
            ("and late norms at 4 bits", Careful())):
        stored, error = measure(policy)
        print(f"{name}: {stored / 2**20:.2f} MiB, error {error:.3f}")
    model = QuantBackwardWrapper(network(), policy=Careful())
    model(torch.randn(32, 3, 16, 16)).sum().backward()
    print(model.explain())


if __name__ == "__main__":
    main()
