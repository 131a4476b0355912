"""Decoding refuses a corrupt payload: wrong structure always, single bits with ``verify=True``."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import Codec, CorruptPayloadError, Packed, QuantBackwardWrapper, codec_from
from brevitas_bp.backward.kept import unpack
from brevitas_bp.codec.checksum import checksum
from brevitas_bp.codec.regions import hardtanh_region
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat as Nearest2
from tests.robustness.counting import COUNTS
from tests.robustness.payloads import (
    OF_PAYLOAD,
    OF_TENSOR,
    PAYLOADS,
    activation,
    payload,
    with_tensor,
)
from tests.support import same_bits

each_payload = pytest.mark.parametrize("name", PAYLOADS)
# The thorough profile tests every amount, and most bits of each stored tensor.
THOROUGH = settings.default.max_examples >= 1000
AMOUNTS = range(1, 301) if THOROUGH else (1, 8, 300)
BITS = 8000 if THOROUGH else 100


def naive_decode(packed: Packed) -> Tensor:
    """Decodes without any check of the payload."""
    return packed.codec.decode(packed)


def is_refused(packed: Packed) -> bool:
    try:
        packed.decode()
    except CorruptPayloadError as error:
        assert "conv2d in stem" in str(error) and "expected" in str(error)
        return True
    return False


def forms_of(packed: Packed) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in packed.tensors]


def flipped(x: Tensor, bit: int) -> Tensor:
    """``x`` with one bit of its memory flipped."""
    x = x.clone()
    x.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return x


# Whole payloads pass.


@each_payload
@pytest.mark.parametrize("sealed", [False, True])
def test_an_intact_payload_decodes_to_the_same_bits_each_time(name: str, sealed: bool) -> None:
    packed = payload(name).sealed() if sealed else payload(name)
    first = packed.decode()
    if name != "shape only":
        assert same_bits(first, naive_decode(packed)) and same_bits(packed.decode(), first)
    assert (packed.seal is None) != sealed
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors) + 8 * sealed


# Structure.


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "shape only"])
def test_a_tensor_that_is_not_what_was_stored_is_refused(name: str) -> None:
    packed = payload(name)
    for (how, corruption), amount in product(OF_TENSOR.items(), AMOUNTS):
        for which, tensor in enumerate(packed.tensors):
            corrupt = with_tensor(packed, which, corruption(tensor, amount))
            assert is_refused(corrupt), (how, which, amount)
            COUNTS["structural corruptions of payloads refused"] += 1


@each_payload
def test_a_payload_of_other_tensors_or_layout_is_refused(name: str) -> None:
    packed = payload(name)
    refused = set()
    for (how, corruption), amount in product(OF_PAYLOAD.items(), AMOUNTS):
        if not packed.tensors and how in ("dropped", "swapped", "of another kind", "larger"):
            continue
        corrupt = corruption(packed, amount)
        # Only a checksum can tell two tensors of one form apart.
        if how == "swapped" and forms_of(corrupt) == forms_of(packed):
            continue
        assert is_refused(corrupt), (how, amount)
        refused.add(how)
        COUNTS["structural corruptions of payloads refused"] += 1
    assert len(refused) >= (len(OF_PAYLOAD) - 1 if packed.tensors else 3)


@each_payload
def test_a_write_to_a_stored_tensor_is_refused(name: str) -> None:
    for i, tensor in enumerate(payload(name).tensors):
        packed = with_tensor(payload(name), i, tensor.clone())
        packed.decode()
        packed.tensors[i].add_(0)
        assert is_refused(packed)
        COUNTS["structural corruptions of payloads refused"] += 1


def test_another_quantizers_facts_are_refused() -> None:
    packed = payload("ShiftedUint2DynamicActPerBucketFloat")
    other = payload("ShiftedUint4DynamicActPerBucketFloat")
    assert is_refused(replace(packed, facts=other.facts))
    assert is_refused(replace(packed, codec=other.codec))


def test_missing_nan_marks_would_be_numbers() -> None:
    # The control: without flags a NaN silently disappears.
    packed = hardtanh_region().encode(activation() * torch.nan, where="conv2d in stem")
    dropped = replace(packed, tensors=packed.tensors[:1])
    assert packed.decode().isnan().all() and not naive_decode(dropped).isnan().any()
    assert is_refused(dropped)


# Bits.


@each_payload
def test_every_flipped_bit_is_refused_if_sealed(name: str) -> None:
    packed = payload(name).sealed()
    for i, tensor in enumerate(packed.tensors):
        bits = tensor.numel() * tensor.element_size() * 8
        # The step is odd, so each position within a byte has its turn.
        for bit in range(0, bits, bits // BITS | 1):
            assert is_refused(with_tensor(packed, i, flipped(tensor, bit))), (i, bit)
            COUNTS["flipped bits refused"] += 1


@each_payload
def test_flipped_bits_would_be_wrong_numbers(name: str) -> None:
    # The control: without a seal, flipped bits silently decode to something else.
    packed = payload(name)
    if name == "shape only":
        assert not packed.tensors
        return
    right, wrong = packed.decode(), 0
    for bit in range(64):
        try:
            decoded = with_tensor(packed, 0, flipped(packed.tensors[0], bit)).decode()
        except CorruptPayloadError:  # an index out of range is refused even so
            continue
        wrong += not same_bits(decoded, right)
    # Flips in codes of constant buckets and of padding do not show.
    assert wrong >= 16
    COUNTS["flipped bits that silently decode to other numbers (control)"] += wrong


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=300), st.data())
def test_every_swap_of_two_words_changes_the_checksum(words: list[int], data: st.DataObject) -> None:
    x = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    assume(words[i] != words[j])
    swapped = x.clone()
    swapped[i], swapped[j] = x[j], x[i]
    assert int(x.sum()) == int(swapped.sum())  # the control: a plain sum sees nothing
    assert int(checksum([x])) != int(checksum([swapped]))
    COUNTS["swapped words refused"] += 1


def test_the_checksum_does_not_depend_on_how_it_is_chunked() -> None:
    # Words from 65536 on have their own weights, so swaps across a chunk are seen.
    x = torch.arange(3 << 16, dtype=torch.int32)
    swapped = torch.cat([x[1 << 16:2 << 16], x[:1 << 16], x[2 << 16:]])
    assert int(checksum([x])) != int(checksum([swapped]))
    whole = checksum([x.view(torch.uint8)[:-3]])
    parts = checksum([x.view(torch.uint8)[:7], x.view(torch.uint8)[7:-3]])
    assert int(whole) == int(parts)


@each_payload
def test_a_layout_that_fits_as_well_is_refused_if_sealed(name: str) -> None:
    packed = payload(name).sealed()
    other = torch.Size([1, *packed.layout.shape])
    strides = torch.empty(other, device="meta").stride()
    layout = replace(packed.layout, shape=other, base_shape=other, stride=strides)
    assert is_refused(replace(packed, layout=layout))


# In the wrapper.


class Flipping(Codec):
    """Flips a bit in the memory of its payloads, which no version counter notices."""

    name = "flipping"

    def __init__(self) -> None:
        self.inner = codec_from(Nearest2)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        packed = self.inner.encode(x, seed=seed, where=where)
        self.stored = packed.tensors[0]
        return packed

    def decode(self, packed: Packed) -> Tensor:
        raise AssertionError("the inner codec decodes")


def gradients(verify: bool, flip: bool) -> list[Tensor]:
    torch.manual_seed(0)
    codec = Flipping()
    model = QuantBackwardWrapper(
        nn.Sequential(nn.Linear(64, 64)), policy=lambda saved: codec, verify=verify)
    loss = model(torch.randn(64, 64)).square().sum()
    if flip:
        codec.stored.data.numpy()[5] ^= 8
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_flipped_bit_raises_in_backward_and_names_the_place() -> None:
    right = gradients(verify=True, flip=False)
    silent = gradients(verify=False, flip=True)
    assert not same_bits(right[0], silent[0])  # the control: a wrong gradient without an error
    with pytest.raises(CorruptPayloadError, match="saved by linear in 0, is corrupt: expected check"):
        gradients(verify=True, flip=True)


@pytest.mark.parametrize("policy", ["op_aware", "all", "exact"])
@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
def test_verify_changes_no_gradient(policy: str, storage: str) -> None:
    grads = []
    for verify in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 8))
        model = QuantBackwardWrapper(
            module, policy=policy, storage=storage, seed=3, verify=verify)  # pyright: ignore
        model(torch.randn(64, 64)).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*grads))  # pyright: ignore


def test_unpack_itself_refuses() -> None:
    # Autograd calls the decode that was tested above.
    packed = payload("relu")
    with pytest.raises(CorruptPayloadError):
        unpack(with_tensor(packed, 0, packed.tensors[0][1:]))
    with saved_tensors_hooks(lambda x: packed, unpack):
        y = torch.randn(packed.layout.shape, requires_grad=True).relu()
    y.sum().backward()
