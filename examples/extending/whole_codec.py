"""A codec of your own: bfloat16 with stochastic rounding, at half the bytes of float32.

    python examples/extending/whole_codec.py

A codec turns a tensor into stored tensors and back. Write one if your code is no bucket quantizer. It
needs ``encode`` and ``decode``. ``tensor_types`` and ``stored_nbytes`` are worth their few lines.

Expect unbiased values, the layout of the input, half the bytes, and an error of the gradient below 1 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brevitas_bp import Codec, Packed, QuantBackwardWrapper, check_gradients, track_saved_memory
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.random import uniform


class StochasticBfloat16(Codec):
    """Stores float32 as bfloat16, rounded up or down at random so that the mean is right.

    A float32 has 16 more bits of mantissa than a bfloat16. Random 16 bits are added to them, and the 16
    are cut off. The relative error is at most 2**-7. NaN and infinities stay what they are.
    """

    name = "stochastic bfloat16"         # for reports
    restores = (torch.float32,)          # other dtypes are refused with a message, in forward
    decodes_anew = True                  # each decode returns new memory

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores ``x``. All randomness comes from ``seed``, so a step can run again bit for bit."""
        layout = self.layout_of(x, where)             # shape, strides, dtype and device
        flat = layout.flatten(x.detach())             # 1-D, in the order of memory
        noise = (uniform(seed, (flat.numel(),), flat.device) * 2**16).to(torch.int32)
        bits = (flat.view(torch.int32) + noise) & -(2**16)
        # Beyond the largest bfloat16 the sum would be infinite, and a NaN could become a number.
        limit = torch.finfo(torch.bfloat16).max
        other = torch.where(flat.isfinite(), flat.clamp(-limit, limit), flat)
        rounded = torch.where(flat.abs() < limit, bits.view(torch.float32), other)
        # Now the low bits are zero, so that the cast is exact.
        return Packed(self, (rounded.to(torch.bfloat16),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Restores the tensor in its old shape and strides."""
        return packed.layout.restore_flat(packed.tensors[0].float())

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        """Says what must be stored: a payload that was damaged is then refused, not decoded."""
        return [TensorType.flat(packed.layout.numel, torch.bfloat16)]

    def stored_nbytes(self, layout: TensorLayout) -> int:
        """Returns the bytes beforehand: a tensor that would not get smaller is not encoded at all."""
        return 2 * layout.numel


def bias(copies: int = 4096) -> float:
    """Returns the largest relative bias of 64 values."""
    x = torch.linspace(1, 2, 64)
    decoded = StochasticBfloat16().encode(x.expand(copies, 64).contiguous(), seed=0).decode()
    return float(((decoded.double().mean(0) - x) / x).abs().max())


def main() -> None:
    torch.manual_seed(0)
    codec = StochasticBfloat16()
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    packed = codec.encode(image, seed=0)
    print(f"{image.nbytes} bytes are stored in {packed.nbytes}")
    print("strides are kept:", packed.decode().stride() == image.stride())
    print(f"largest error {float(((packed.decode() - image) / image).abs().max()):.4f}, "
          f"bias {bias():.5f}")

    # As act_quant, in overrides, or returned by a policy:
    model = QuantBackwardWrapper(
        nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10)), codec)
    x = torch.randn(512, 64)
    with track_saved_memory(model) as report:
        loss = model(x).logsumexp(1).mean()
    loss.backward()
    print(report)
    print(check_gradients(model, x, lambda m, x: m(x).logsumexp(1).mean(), top=0))


if __name__ == "__main__":
    main()
