"""The form of the bucket quantizer that compilers trace gives the reference's bytes."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from brevitas_bp.kernels import masks, reference, traced
from brevitas_bp.kernels.reference import Encoded
from brevitas_bp.kernels.spec import BucketQuantSpec
from tests.kernels.table import SPECS, check, samples
from tests.strategies import DTYPES, dtype_name

# Tensors of two widths have no traced form.
ONE_WIDTH = [spec for spec in SPECS if spec.mix_bit_width is None]
WHOLE = [
    replace(spec, bucket_size=size)
    for spec, size in product(ONE_WIDTH[::7] + ONE_WIDTH[-1:], (8, 64, None))]


class Traced:
    """The reference, decoded by the traced form, uncompiled."""

    encode = staticmethod(reference.encode)

    def decode(
            self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
            dtype: torch.dtype) -> Tensor:
        return traced.decode(encoded.tensors, spec, numel, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bytes_equal_the_reference(dtype: torch.dtype) -> None:
    specs = ONE_WIDTH + WHOLE
    # Other dtypes differ from float32 in their conversion and limits only: a part of the specs will do.
    for spec, x in product(
            specs if dtype == torch.float32 else specs[::7], samples(dtype).values()):
        check(Traced(), x, spec)


@pytest.mark.parametrize("numel", [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 191])
def test_every_tail(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    for width, size in product(range(1, 9), (8, 64, None)):
        check(Traced(), x, BucketQuantSpec(width, size))


def test_another_value_is_seen() -> None:
    class Off(Traced):
        def decode(self, *args: Any) -> Tensor:
            return super().decode(*args) + 1e-6

    with pytest.raises(AssertionError):
        check(Off(), samples(torch.float32)["normal"], BucketQuantSpec())


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64, 1001])
def test_masks(numel: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = traced.pack_bits(mask)
    assert torch.equal(packed, masks.pack_bits(mask))
    assert torch.equal(traced.unpack_bits(packed, numel), mask)
    flipped = mask.clone()
    flipped[-1] ^= True
    assert not torch.equal(traced.pack_bits(flipped), packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "spec", [BucketQuantSpec(2, 64), BucketQuantSpec(5, 24, metadata_dtype=torch.bfloat16)],
    ids=["2 bits", "5 bits, bfloat16"])
def test_compiled_by_inductor(spec: BucketQuantSpec) -> None:
    compiled = torch.compile(traced.decode, dynamic=False)

    class Compiled(Traced):
        def decode(
                self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
                dtype: torch.dtype) -> Tensor:
            return compiled(encoded.tensors, spec, numel, dtype)

    torch._dynamo.reset()
    form = Compiled()
    # All kinds of values at one size, so that it is compiled once.
    for name, x in samples(torch.float32).items():
        x = x.repeat(-(-1000 // x.numel()))[:1000]
        if name == "broken":
            # Inductor converts a NaN to another NaN.
            packed = form.encode(x, spec, 3)
            assert torch.equal(
                form.decode(packed, spec, 3, 1000, x.dtype).isnan(),
                reference.decode(packed, spec, 3, 1000, x.dtype).isnan())
        else:
            check(form, x, spec)
    torch._dynamo.reset()
