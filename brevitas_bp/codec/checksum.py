"""A checksum of stored bytes: ``sum(word_i * weight_i) mod 2**64`` over 32-bit words.

Weights are distinct and never 0. Two words differ by less than ``2**32``, and so do two weights. So:

* a change within one word (any flipped bit) changes the sum by ``difference * weight``,
* a swap of two different words changes it by ``difference * (weight - weight)``.

Each is a product of two nonzero numbers below ``2**32``, and so no multiple of ``2**64``. The checksum
therefore always detects both changes, in payloads up to 16 GiB. It misses about one in ``2**64`` of all
other random changes. It is not a cryptographic signature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Words summed at once, so that temporaries stay in the cache.
_CHUNK = 1 << 16


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the checksum of contiguous tensors, int64 [] on their device, without synchronising.

    >>> a, b = torch.tensor([1, 2]), torch.tensor([2, 1])
    >>> int(checksum([a])) == int(checksum([b])), int(checksum([a])) == int(checksum([a.clone()]))
    (False, True)
    """
    words = _words(tensors)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start:start + _CHUNK]
        weights = _weights(start, part.numel(), words.device)
        total += (part.to(torch.int64) * weights).sum()
    return total


def _words(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the bytes as int32, padded with zeros at the end."""
    parts = [t.detach().reshape(-1).view(torch.uint8) for t in tensors]
    numel = sum(part.numel() for part in parts)
    device = parts[0].device if parts else torch.device("cpu")
    out = torch.zeros(-(-numel // 4) * 4, dtype=torch.uint8, device=device)
    position = 0
    for part in parts:
        out[position:position + part.numel()] = part
        position += part.numel()
    return out.view(torch.int32)


def _weights(start: int, count: int, device: torch.device) -> Tensor:
    """Returns hashes of ``start + 1 ..``; each step maps 32-bit numbers one to one, and 0 to 0."""
    x = torch.arange(start + 1, start + 1 + count, dtype=torch.int64, device=device).to(torch.int32)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return (x ^ ((x >> 16) & 0xFFFF)).to(torch.int64)
