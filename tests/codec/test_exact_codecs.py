"""Lossless codecs decode to the very same values."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import ModifiedInPlaceError, codec_from
from brevitas_bp.codec import BitMask, Keep, NarrowInt
from brevitas_bp.codec.lossless import narrow_to
from brevitas_bp.codec.on_backward import QuantizeOnBackward
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic
from tests.codec.support import Op, run
from tests.strategies import LAYOUTS, normals
from tests.support import same_bits

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@each_layout
def test_a_mask_takes_one_bit_an_element(layout: Callable[[Tensor], Tensor]) -> None:
    mask = layout(normals((2, 3, 4, 5)) > 0)
    packed = BitMask().encode(mask)
    assert packed.nbytes == -(-packed.layout.numel // 8)
    decoded = packed.decode()
    assert decoded.dtype == torch.bool and torch.equal(decoded, mask)


@pytest.mark.parametrize("length", range(71))
def test_masks_of_every_length(length: int) -> None:
    mask = normals((length,)) > 0
    packed = BitMask().encode(mask)
    assert torch.equal(packed.decode(), mask)
    assert packed.nbytes == -(-length // 8) == BitMask().stored_nbytes(packed.layout)


INTEGERS: list[tuple[list[int], torch.dtype, torch.dtype]] = [
    ([0, 255], torch.int64, torch.uint8),
    ([-1, 127], torch.int64, torch.int8),
    ([-129, 5], torch.int64, torch.int16),
    ([0, 256], torch.int32, torch.int16),
    ([0, 40000], torch.int64, torch.int32),
    ([0, 2**31], torch.int64, torch.int64),
    ([-2**63, 2**63 - 1], torch.int64, torch.int64),
    ([0, 40000], torch.int32, torch.int32),
    ([-1, 5], torch.int8, torch.int8),
    ([0, 200], torch.uint8, torch.uint8),
    ([], torch.int64, torch.uint8)]


@pytest.mark.parametrize(("values", "dtype", "stored"), INTEGERS)
def test_integers_take_the_narrowest_dtype(
        values: list[int], dtype: torch.dtype, stored: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    packed = NarrowInt().encode(x)
    assert packed.tensors[0].dtype == stored
    assert packed.decode().dtype == dtype and torch.equal(packed.decode(), x)


@each_layout
def test_integers_keep_their_layout(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout((normals((2, 3, 4, 5)) * 100).long())
    assert torch.equal(NarrowInt().encode(x).decode(), x)


LIMITS: list[tuple[int, bool, torch.dtype]] = [
    (1, True, torch.int8), (128, True, torch.int8), (129, True, torch.int16),
    (2**15, True, torch.int16), (2**15 + 1, True, torch.int32), (2**31, True, torch.int32),
    (2**31 + 1, True, torch.int64), (1, False, torch.uint8), (256, False, torch.uint8),
    (257, False, torch.int16), (2**31, False, torch.int32), (2**31 + 1, False, torch.int64)]


@pytest.mark.parametrize(("limit", "signed", "stored"), LIMITS)
def test_a_limit_gives_the_narrowest_dtype(limit: int, signed: bool, stored: torch.dtype) -> None:
    codec = narrow_to(limit, signed=signed)
    x = torch.tensor([-limit if signed else 0, 0, limit - 1])
    packed = codec.encode(x)
    assert packed.tensors[0].dtype == stored and torch.equal(packed.decode(), x)
    assert packed.nbytes == codec.stored_nbytes(packed.layout)
    assert codec is narrow_to(limit, signed=signed)


def test_a_limit_does_not_widen() -> None:
    x = torch.tensor([1, 2], dtype=torch.int16)
    packed = narrow_to(2**20).encode(x)
    assert packed.tensors[0].dtype == torch.int16 and torch.equal(packed.decode(), x)


def indices(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1))


INDEXED: dict[str, tuple[Op, int, bool]] = {
    "index_select": (lambda x: x.index_select(0, indices(20)), 0, False),
    "gather": (lambda x: x.gather(0, indices(5, 7)), 0, False),
    "take_along_dim": (lambda x: x.take_along_dim(indices(5, 7), 0), 0, False),
    "scatter": (lambda x: x.scatter(0, indices(5, 7), 0.0), 0, False),
    "embedding": (lambda x: F.embedding(indices(4, 6), x), 0, False),
    "indexing": (lambda x: x[indices(20) - 9], 0, True),
    "nll_loss": (lambda x: F.nll_loss(x, indices(9) % 7), 1, False)}


@pytest.mark.parametrize("name", INDEXED)
def test_gradients_with_narrowed_indices_are_bit_equal(name: str) -> None:
    op, stored, signed = INDEXED[name]
    x = normals((9, 7))
    plain, narrow = run(op, x), run(op, x, {stored: narrow_to(9, signed=signed)})
    assert plain.saved[stored].dtype == torch.int64
    assert same_bits(narrow.grad, plain.grad)
    assert narrow.packed[0].nbytes == plain.saved[stored].numel()


@pytest.mark.parametrize("codec", [BitMask(), NarrowInt()])
def test_a_payload_does_not_change_with_its_source(codec: BitMask | NarrowInt) -> None:
    x = torch.tensor([2**40, 1]) if isinstance(codec, NarrowInt) else torch.tensor([True, False])
    expected = x.clone()
    packed = codec.encode(x)
    x.zero_()
    assert torch.equal(packed.decode(), expected)


def test_keep_keeps_the_tensor_itself_detached() -> None:
    x = torch.ones(3, requires_grad=True)
    packed = Keep().encode(x)
    assert packed.decode().data_ptr() == x.data_ptr()
    assert not packed.decode().requires_grad and packed.nbytes == 12


@pytest.mark.parametrize("modify", [
    lambda x: x.add_(1), lambda x: x.view(-1)[:1].zero_(), lambda x: x.detach().mul_(2)])
def test_a_kept_tensor_that_is_modified_raises(modify: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3)
    packed = Keep().encode(x, where="conv2d in features.0")
    modify(x)
    with pytest.raises(ModifiedInPlaceError, match=r"saved by conv2d in features\.0 is at version"):
        packed.decode()


def test_the_error_is_of_the_kind_that_autograd_raises() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    packed = Keep().encode(y)
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        packed.decode()


def test_a_tensor_modified_before_it_is_kept_is_fine() -> None:
    x = torch.ones(3).add_(1)
    assert torch.equal(Keep().encode(x).decode(), x)


def test_an_inference_tensor_has_no_version_to_check() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    assert Keep().encode(x).decode().sum() == 3


def test_quantizing_on_backward_gives_the_same_bits() -> None:
    codec = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    x = normals((1000,)).float()
    late = QuantizeOnBackward(codec).encode(x, seed=3)
    assert late.nbytes == 4000
    assert torch.equal(late.decode(), codec.encode(x, seed=3).decode())
    assert torch.equal(late.decode(), late.decode())


def test_quantizing_on_backward_notices_a_modification() -> None:
    x = normals((1000,)).float()
    late = QuantizeOnBackward(codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)).encode(
        x, seed=3)
    x.zero_()
    with pytest.raises(ModifiedInPlaceError):
        late.decode()


def test_nbytes_counts_every_stored_tensor() -> None:
    packed = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic).encode(
        normals((1000,)).float(), seed=0)
    # Four buckets of 256 elements, each with 2 bits per code, and a scale and an offset of 4 bytes.
    assert packed.nbytes == 4 * (64 + 4 + 4)


@pytest.mark.parametrize("codec", [BitMask(), NarrowInt(), Keep()])
def test_exact_codecs_copy(codec: BitMask | NarrowInt | Keep) -> None:
    x = torch.tensor([True, False]) if type(codec) is BitMask else torch.tensor([1, 2])
    assert torch.equal(copy.deepcopy(codec).encode(x).decode(), codec.encode(x).decode())
