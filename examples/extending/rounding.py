"""A rounding of your own: stochastic rounding with few random bits, as hardware does it.

    python examples/extending/rounding.py

A part is an ``nn.Module`` that fills a slot of a config. This one fills ``float_to_int_impl``. It gets
values that are scaled already, and returns whole numbers.

Expect the bias to halve with each random bit, and a wrapped network that stores 2 bits per element.
"""

import torch
from brevitas.function.ops_ste import floor_ste
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, codec_from, track_saved_memory
from brevitas_bp.quant import ActQuantSolver, PerBucketMinMax


class FewRandomBits(nn.Module):
    """Stochastic rounding whose noise has ``random_bits`` bits. Fills ``float_to_int_impl``.

    ``q = floor(u + noise)``. The mean of ``q`` is the multiple of ``2**-random_bits`` that is nearest to
    ``u``, so the bias is at most ``2**-(random_bits + 1)`` steps.

    Args:
        random_bits: a setting. The config has an attribute of this name, and Brevitas passes it.
    """

    # A promise: the result for a bucket depends on this bucket alone. Large tensors are then encoded a
    # few buckets at a time.
    bucketwise = True

    # A part needs an __init__ of its own: Brevitas reads from its arguments what to pass.
    def __init__(self, random_bits: int) -> None:
        super().__init__()
        self.steps = 2**random_bits

    def forward(self, u: Tensor) -> Tensor:
        """Rounds scaled buckets [N, B] to whole numbers [N, B]."""
        # Uniform in [0, 1), from the seed of the encode. Never call torch.rand here: it would change the
        # dropout of the forward pass.
        noise = torch.ops.brevitas_bp.noise_like(u)
        few = (torch.floor(noise * self.steps) + 0.5) / self.steps
        # Backward of floor_ste is the identity, for use in QuantIdentity.
        return floor_ste(u + few.to(u.dtype))


class FewRandomBits2(PerBucketMinMax, ActQuantSolver):
    """Two bits for each element, and three random bits for each rounding."""

    float_to_int_impl = FewRandomBits  # pyright: ignore[reportAssignmentType]
    random_bits = 3
    bit_width = 2
    bucket_size = 256


def bias(random_bits: int, copies: int = 8192) -> float:
    """Returns the largest bias of an element, in steps between two codes."""
    bucket = torch.linspace(0, 3, 256)          # from 0 to 3: with 2 bits, a step is 1
    codec = codec_from(FewRandomBits2, random_bits=random_bits)
    decoded = codec.encode(bucket.expand(copies, 256).contiguous(), seed=0).decode()
    return float((decoded.double().mean(0) - bucket).abs().max())


def main() -> None:
    for random_bits in (1, 2, 3, 8):
        print(f"{random_bits} random bits: largest bias {bias(random_bits):.3f} steps; "
              f"{2**-(random_bits + 1):.3f} is expected, and chance adds up to 0.02")
    model = QuantBackwardWrapper(
        nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), FewRandomBits2)
    with track_saved_memory(model) as report:
        loss = model(torch.randn(512, 256)).logsumexp(1).mean()
    loss.backward()
    print(report)


if __name__ == "__main__":
    main()
