"""H9, H10: backward receives the shape, dtype and strides of the saved tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import Codec, CorruptPayloadError, Packed, QuantBackwardWrapper, track_saved_memory
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloat as Nearest8
from tests.backward.support import Apply, SeeSaved, naive_hooks


def _images() -> Tensor:
    return torch.randn(4, 6, 8, 10)


#: Dense layouts are restored; a layout with gaps becomes the layout of ``empty_like``.
DENSE: dict[str, Tensor] = {
    "contiguous": _images(),
    "channels_last": _images().to(memory_format=torch.channels_last),
    "channels_last, 1 channel": torch.randn(8, 1, 16, 16).to(memory_format=torch.channels_last),
    "transposed": torch.randn(48, 40).t(),
    "permuted": _images().permute(3, 1, 0, 2),
    "offset view": torch.randn(3000)[100:].view(50, 58),
    "negated lazily": torch._neg_view(torch.randn(40, 60)),
    "size-1 dimensions": torch.randn(1, 40, 1, 30).transpose(0, 1),
}
EXPANDED: dict[str, Tensor] = {
    "rows": torch.randn(1, 600).expand(50, 600),
    "columns": torch.randn(600, 1).expand(600, 50),
    "middle": torch.randn(30, 1, 30).expand(30, 20, 30),
    "expanded and transposed": torch.randn(30, 1, 30).expand(30, 20, 30).transpose(0, 2),
}
GAPS: dict[str, Tensor] = {
    "every other column": torch.randn(40, 80)[:, ::2],
    "imaginary parts": torch.view_as_complex(torch.randn(1000, 2)).conj().imag,
    "overlapping windows": torch.randn(300).unfold(0, 50, 3),
    "cropped channels_last": _images().to(memory_format=torch.channels_last)[:, :, 1:-1, 2:],
}


def through_backward(x: Tensor, **options: Any) -> Tensor:
    leaf = x.detach().requires_grad_()
    QuantBackwardWrapper(Apply(SeeSaved.apply), Nearest8, policy="all", **options)(leaf).backward()
    return SeeSaved.seen


def step(x: Tensor) -> Tensor:
    """Returns the largest step of an 8-bit bucket of ``x``."""
    return (x.max() - x.min()) / 255


@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
@pytest.mark.parametrize("name", [*DENSE, *EXPANDED])
def test_strides_are_restored(name: str, storage: str) -> None:
    x = (DENSE | EXPANDED)[name]
    seen = through_backward(x, storage=storage)
    assert (seen.shape, seen.stride(), seen.dtype) == (x.shape, x.stride(), x.dtype)
    # Half a step for rounding to nearest, and a few float32 roundings at the size of the range.
    assert (seen - x).abs().max() <= step(x) / 2 + 2**-20 * (x.max() - x.min())
    assert not torch.equal(seen, x)


@pytest.mark.parametrize("name", GAPS)
def test_layout_with_gaps_is_closed_up(name: str) -> None:
    x = GAPS[name]
    seen = through_backward(x)
    assert seen.stride() == torch.empty_like(x).stride()
    assert (seen - x).abs().max() <= step(x) / 2 + 2**-20 * (x.max() - x.min())


@pytest.mark.parametrize("name", ["channels_last", "transposed", "rows"])
def test_naive_hooks_lose_strides(name: str) -> None:
    x = (DENSE | EXPANDED)[name]
    with naive_hooks():
        SeeSaved.apply(x.detach().requires_grad_()).backward()
    assert SeeSaved.seen.stride() != x.stride()


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_tensor_is_stored_at_its_base_size(name: str) -> None:
    x = EXPANDED[name]
    model = QuantBackwardWrapper(Apply(SeeSaved.apply), Nearest8, policy="all", bucket_size=8)
    with track_saved_memory(model) as report:
        output = model(x.detach().requires_grad_())
    base = x.untyped_storage().nbytes() // 4
    # One byte per code, and a scale and an offset of 4 bytes each per 8 codes. No size is padded.
    buckets = -(-base // 8)
    assert report.exact_bytes == 4 * base
    assert report.stored_bytes == buckets * (8 + 2 * 4)
    assert output.requires_grad


class Broken(Codec):
    """Decodes to something other than it encoded."""

    name = "broken"

    def __init__(self, change: Any) -> None:
        self.change = change

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        return Packed(self, (x.half(),), TensorLayout.of(x), None, where)

    def decode(self, packed: Packed) -> Tensor:
        return self.change(packed.tensors[0].float())


CHANGES: dict[str, Any] = {
    "wrong shape": lambda x: x.mean(),
    "missing row": lambda x: x[:1],
    "wrong dtype": lambda x: x.double(),
}


@pytest.mark.parametrize("name", ["wrong shape", "missing row"])
def test_autograd_broadcasts_a_wrong_shape_in_silence(name: str) -> None:
    leaf = torch.randn(8, 8, requires_grad=True)
    with saved_tensors_hooks(lambda x: x.detach(), CHANGES[name]):
        (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    assert not torch.allclose(leaf.grad, 2 * leaf)


@pytest.mark.parametrize("name", CHANGES)
def test_codec_that_decodes_something_else_is_caught(name: str) -> None:
    broken = Broken(CHANGES[name])
    model = QuantBackwardWrapper(Apply(torch.mul), policy=lambda saved: broken)
    leaf = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(CorruptPayloadError, match=r"'broken' decoded .* saved by mul"):
        model(leaf, leaf).sum().backward()


def test_layout_refuses_another_number_of_elements() -> None:
    layout = TensorLayout.of(torch.zeros(4, 4))
    with pytest.raises(CorruptPayloadError, match="expected 16 decoded elements"):
        layout.restore_flat(torch.zeros(15))
    with pytest.raises(CorruptPayloadError, match="expected decoded shape"):
        layout.restore(torch.zeros(16))
