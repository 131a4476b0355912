"""Compares averages of neighbours with unbiased samples of rotated codes, below one bit per element.

    python examples/studies/below_one_bit.py [--models efficientnet_v2_tiny,resnet18] [--draws 32]

A rotated bucket may keep a random part of its codes. Decoding multiplies them by the inverse of that
part, so the decoded values are unbiased. An average of neighbours (Average Quantization) has less
error, but it is biased.

Only tensors that reach the gradient of one weight are rounded, because averages may serve no others. The
networks are those of ``bit_allocation.py``, after a few steps of training. Bias and noise are those of
all gradients, taken as one vector. "one step" is ``sqrt(bias**2 + noise**2)``, and "100 steps" is
``sqrt(bias**2 + noise**2 / 100)``: the error of the mean of 100 gradients with equal bias.

Samples are simulated: the codec below stores decoded values in float16. Its bytes do not count.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from bit_allocation import OPTIONS, batches, loss, trained
from tables import show_table
from torch import Tensor

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.allocate import measure_gradient_error
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.codec import Codec, Packed, codec_from
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.core.rotation import RandomRotation
from brevitas_bp.format.random import seeded
from brevitas_bp.quant import (
    RotatedNormal1DynamicActPerBucketFloat,
    RotatedNormal2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)


class SampledCodec(Codec):
    """Simulates that rotated buckets keep one of ``every`` codes. Stores decoded values in float16.

    Args:
        quantizer: config of rotated codes.
        every: codes for each code that is kept.
    """

    restores = FLOATS

    def __init__(self, quantizer: Any, every: int) -> None:
        self.inner = codec_from(quantizer, **OPTIONS)
        self.every = every
        self.name = f"1/{every} of {self.inner.name}"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = TensorLayout.of(x)
        decoded = self.inner.encode(layout.flatten(x.detach()), seed=seed).decode()
        size = OPTIONS["bucket_size"]
        buckets = torch.nn.functional.pad(decoded, (0, -len(decoded) % size)).view(-1, size)
        means = buckets.mean(-1, keepdim=True)
        rotation = RandomRotation()
        with seeded(seed + 1):
            signs = rotation.draw(buckets)
        turned = rotation(buckets - means, signs)
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(turned.shape, generator=generator).argsort(-1) < size // self.every
        values = rotation.inverse(turned * kept * self.every, signs) + means
        return Packed(self, (values.view(-1)[:len(decoded)].half(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return [TensorType.flat(packed.layout.numel, torch.float16)]


class WeightsAlone(OpAware):
    """Rounds what reaches the gradient of one weight, with one codec, and nothing else."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        object.__setattr__(self, "chosen", codec)

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        quantizes = decision.codec is saved.codec and decision.reach == "weight"
        codec: Codec = getattr(self, "chosen")  # noqa: B009  (set in a frozen dataclass)
        return decision._replace(codec=codec if quantizes else None)


def averages(quantizer: Any, size: int) -> Codec:
    """Returns the codec of averages of ``size`` neighbours, with two bits each."""
    codec = codec_from(quantizer, **OPTIONS).variant(2, None, size)
    assert codec is not None
    return codec


#: Nominal bits -> codecs.
WAYS: dict[str, list[Codec]] = {
    "1": [codec_from(RotatedNormal1DynamicActPerBucketFloat, **OPTIONS)],
    "0.5": [
        averages(ShiftedUint2DynamicActPerBucketFloatStochastic, 4),
        averages(RotatedNormal2DynamicActPerBucketFloat, 4),
        SampledCodec(RotatedNormal1DynamicActPerBucketFloat, 2),
        SampledCodec(RotatedNormal2DynamicActPerBucketFloat, 4)],
    "0.25": [
        averages(ShiftedUint2DynamicActPerBucketFloatStochastic, 8),
        averages(RotatedNormal2DynamicActPerBucketFloat, 8),
        SampledCodec(RotatedNormal1DynamicActPerBucketFloat, 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="efficientnet_v2_tiny,resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="steps of training before measuring")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    cells = []
    for name in options.models.split(","):
        *steps, batch = batches(options.steps + 1, options.batch)
        model = trained(name, steps)
        for bits, codecs in WAYS.items():
            for codec in codecs:
                wrapped = QuantBackwardWrapper(model, policy=WeightsAlone(codec))
                total = measure_gradient_error(
                    wrapped, lambda m, batch=batch: loss(m, batch), draws=options.draws).total
                one, many = (
                    (total.bias**2 + total.noise**2 / steps)**0.5 for steps in (1, 100))
                cells.append([name, bits, codec.name, *(
                    f"{value:.3f}" for value in (total.bias, total.noise, one, many))])
                print(*cells[-1], sep=" | ", flush=True)
    titles = ["network", "bits", "stored as", "bias", "noise", "one step", "100 steps"]
    show_table(titles, cells, options.markdown)


if __name__ == "__main__":
    main()
