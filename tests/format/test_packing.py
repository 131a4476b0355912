"""The byte layout: every width, every length, every code."""

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.packing import pack, packed_nbytes, unpack

WIDTHS = range(1, 9)
LENGTHS = range(71)


def all_codes(length: int, bit_width: int) -> Tensor:
    """Returns buckets [2**b, length padded to 8] in which every code occurs at every position."""
    size = -(-length // 8) * 8
    codes = torch.arange(2**bit_width).unsqueeze(-1) + torch.arange(size)
    codes = codes.remainder(2**bit_width).to(torch.uint8)
    codes[:, length:] = 0
    return codes


def planar_bytes(codes: list[int], bit_width: int) -> list[int]:
    """Computes the layout as the design defines it, one bit field at a time."""
    out, first = [], 0
    for bits in (8, 4, 2, 1):
        if not bit_width & bits:
            continue
        per_byte = 8 // bits
        step = len(codes) // per_byte
        for j in range(step):
            fields = [(codes[j + i * step] >> first) % 2**bits for i in range(per_byte)]
            out.append(sum(field << (bits * i) for i, field in enumerate(fields)))
        first += bits
    return out


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_unpack_inverts_pack(bit_width: int) -> None:
    for length in LENGTHS:
        codes = all_codes(length, bit_width)
        assert torch.equal(unpack(pack(codes, bit_width), bit_width, codes.shape[1]), codes)


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_a_bucket_takes_exactly_its_bits(bit_width: int) -> None:
    for length in LENGTHS:
        codes = all_codes(length, bit_width)
        nbytes = codes.shape[1] * bit_width / 8
        assert pack(codes, bit_width).shape == (2**bit_width, nbytes)
        assert packed_nbytes(codes.shape[1], bit_width) == nbytes


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_bytes_are_those_of_the_planar_layout(bit_width: int) -> None:
    for length in (8, 40, 72):
        codes = all_codes(length, bit_width)[:16]
        expected = [planar_bytes(bucket, bit_width) for bucket in codes.tolist()]
        assert pack(codes, bit_width).tolist() == expected


def test_golden_bytes() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    # 3 bits: a plane of 2 bits (elements j, j + 2, j + 4, j + 6), then one of 1 bit (all elements).
    assert pack(codes, 3).tolist() == [[0b10_00_10_00, 0b11_01_11_01, 0b11110000]]


def test_an_interleaved_layout_would_be_noticed() -> None:
    # Positive control: the usual layout, neighbours in one byte, unpacks to a permutation.
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    low, high = codes[:, 0::2], codes[:, 1::2]
    interleaved = low | (high << 4)
    assert not torch.equal(interleaved, pack(codes, 4))
    assert not torch.equal(unpack(interleaved, 4, 8), codes)


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_bits_above_the_width_are_dropped(bit_width: int) -> None:
    codes = torch.full((1, 8), 255, dtype=torch.uint8)
    assert unpack(pack(codes, bit_width), bit_width, 8).tolist() == [[2**bit_width - 1] * 8]


def test_codes_may_lie_anywhere_in_memory() -> None:
    codes = all_codes(64, 3)
    for strided in (codes.t().contiguous().t(), torch.stack([codes, codes], -1)[..., 0]):
        assert not strided.is_contiguous()
        packed = pack(strided, 3)
        assert torch.equal(packed, pack(codes, 3))
        assert torch.equal(unpack(packed.t().contiguous().t(), 3, 64), codes)


@pytest.mark.parametrize("bit_width", [0, 9, -1, 2.5, True, "2", None])
def test_a_width_that_is_no_integer_from_1_to_8_is_refused(bit_width: int) -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"format\.pack: bit_width must be an integer in 1\.\.8"):
        pack(codes, bit_width)
    with pytest.raises(ValueError, match=r"format\.unpack: bit_width must be an integer in 1\.\.8"):
        unpack(codes, bit_width, 8)


@pytest.mark.parametrize("codes", [
    torch.zeros(1, 8), torch.zeros(8, dtype=torch.uint8), torch.zeros(1, 12, dtype=torch.uint8)])
def test_codes_that_are_no_whole_buckets_of_bytes_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8 codes"):
        pack(codes, 2)


@pytest.mark.parametrize("packed", [
    torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.uint8)])
def test_bytes_of_another_size_are_refused(packed: Tensor) -> None:
    with pytest.raises(ValueError, match="2-bit buckets of 8 take 2 bytes"):
        unpack(packed, 2, 8)
