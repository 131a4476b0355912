"""Counter-based noise: (seed, flat index) -> the same float32 on every backend.

The generator is a keyed 32-bit integer hash (three xor-shift-multiply rounds) of the element's flat
index. Its two 32-bit keys come from the 64-bit seed through SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014), so neighbouring seeds give unrelated noise.

A counter-based generator needs no state and no order. Every element can be drawn alone, in any thread,
and a decoder can repeat the draws of an encoder.

Within one tensor the noise repeats after 2**32 elements.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1

#: Increment and multipliers of SplitMix64.
SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_INCREMENT, _FIRST, _SECOND = SPLITMIX

# Rounds of the index hash: (right shift, odd multiplier); a last shift follows.
HASH_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
HASH_LAST_SHIFT = 14
NOISE_BITS = 24
NOISE_STEP = 2.0**-NOISE_BITS

# One encode draws from these streams. They must not share noise.
ROUNDING = 0
WIDTHS = 1
ROTATION = 2
METADATA = 3


def splitmix64(value: int) -> int:
    """Returns the SplitMix64 output for the 64-bit state ``value``.

    >>> hex(splitmix64(0))
    '0xe220a8397b1dcdaf'
    """
    z = (value + _INCREMENT) & _MASK64
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK64
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK64
    return z ^ (z >> 31)


def derive(seed: int, *path: int) -> int:
    """Derives a 64-bit seed from ``seed`` and a path of integers (stream, occurrence, rank, ...).

    >>> derive(1, 0) != derive(1, 1) != derive(2, 0)
    True
    """
    state = splitmix64(seed & _MASK64)
    for step in path:
        state = splitmix64(state ^ (step & _MASK64))
    return state


def noise_keys(seed: int, stream: int = ROUNDING) -> tuple[int, int]:
    """Returns the two 32-bit keys of the first draw of a stream in one encode."""
    return _split(derive(seed, stream, 0))


def _split(key: int) -> tuple[int, int]:
    return key & 0xFFFFFFFF, key >> 32


def _indices(numel: int, device: torch.device | str) -> Tensor:
    """Returns the flat indices modulo 2**32, as the bits of int32."""
    return torch.arange(numel, dtype=torch.int64, device=device).to(torch.int32)


def row_numbers(rows: Tensor | slice, device: torch.device | str) -> Tensor:
    """Returns the indices that ``rows`` selects along a first dimension, as int64 [r]."""
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device)


def row_indices(starts: Tensor, length: int) -> Tensor:
    """Returns flat indices modulo 2**32, as the bits of int32, of parts that begin at ``starts``.

    Args:
        starts: flat indices [r, 1].
        length: elements of a part.
    """
    inside = torch.arange(length, dtype=torch.int32, device=starts.device)
    return starts.to(torch.int32) + inside


def unit_float(seed: int) -> float:
    """Returns a float64 in [0, 1) made of the top 53 bits of ``seed``."""
    return (seed >> 11) * 2.0**-53


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    # torch shifts int32 arithmetically; the mask makes the shift logical.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def words_(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """Returns 32 random bits as int32 for each int32 index.

    Args:
        index: int32 tensor of any shape; overwritten (it is the scratch memory of the hash).
        keys: the two keys of :func:`noise_keys`.
    """
    x = index.add_(_int32(keys[0]))
    for step, (shift, multiplier) in enumerate(HASH_ROUNDS):
        x = _xor_shift_(x, shift).mul_(_int32(multiplier))
        if step == 0:
            # The second key enters between rounds, so two seeds do not give shifted copies of the same
            # noise.
            x = x.bitwise_xor_(_int32(keys[1]))
    return _xor_shift_(x, HASH_LAST_SHIFT)


def uniform_(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """Returns uniform float32 noise in [0, 1), a multiple of 2**-24; arguments as of :func:`words_`."""
    bits = (words_(index, keys) >> (32 - NOISE_BITS)).bitwise_and_((1 << NOISE_BITS) - 1)
    return bits.to(torch.float32).mul_(NOISE_STEP)


def uniform(seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Returns noise for flat indices ``0 .. prod(shape) - 1``, shaped ``shape``.

    >>> bool((uniform(7, (4,)) == uniform(7, (8,))[:4]).all())
    True
    """
    numel = 1
    for size in shape:
        numel *= size
    return uniform_(_indices(numel, device), noise_keys(seed)).view(shape)


class _Ambient(threading.local):
    """State of :func:`seeded` in a thread.

    Attributes:
        stack: the seeds of the open blocks, each with the number of draws of each stream so far.
        rows: the indices that :func:`seeded_rows` has set, or None.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[int, Counter[int]]] = []
        self.rows: Tensor | slice | None = None


_ambient = _Ambient()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes stochastic modules draw from ``seed`` within the block, in this thread only.

    The k-th draw of a stream is a pure function of ``(seed, stream, k)``. torch's generators are not
    touched. Outside any block, each draw takes its seed from torch's global generator.
    """
    rows, _ambient.rows = _ambient.rows, None
    _ambient.stack.append((seed, Counter()))
    try:
        yield
    finally:
        _ambient.stack.pop()
        _ambient.rows = rows


@contextmanager
def seeded_rows(seed: int, rows: Tensor | slice) -> Iterator[None]:
    """Works like :func:`seeded`, for tensors [r, ...] that are a part of a larger tensor.

    ``rows`` are the indices of the part along the first dimension. The part gets the noise that it would
    get within the larger tensor.

    >>> whole = torch.zeros(5, 3)
    >>> with seeded(1):
    ...     expected = noise_like(whole)[2:4]
    >>> with seeded_rows(1, slice(2, 4)):
    ...     bool((noise_like(whole[2:4]) == expected).all())
    True
    """
    with seeded(seed):
        _ambient.rows = rows
        yield


def next_seed(stream: int) -> int:
    """Returns the seed of the next draw of ``stream``; from torch's generator outside :func:`seeded`."""
    if _ambient.stack:
        seed, used = _ambient.stack[-1]
        occurrence = used[stream]
        used[stream] += 1
    else:
        # The CPU generator needs no device synchronization, and torch.manual_seed governs it.
        seed, occurrence = int(torch.empty((), dtype=torch.int64, device="cpu").random_()), 0
    return derive(seed, stream, occurrence)


def next_words(stream: int, index: Tensor) -> Tensor:
    """Returns 32 random bits for each int32 index, seeded by :func:`next_seed`; overwrites ``index``."""
    return words_(index, _split(next_seed(stream)))


def noise_like_reference(x: Tensor) -> Tensor:
    """Returns noise shaped like ``x`` (flat index in row-major order), seeded by :func:`next_seed`."""
    keys = _split(next_seed(ROUNDING))
    if _ambient.rows is None:
        return uniform_(_indices(x.numel(), x.device), keys).view(x.shape)
    return uniform_(_indices_of_rows(x, _ambient.rows), keys).view(x.shape)


def _indices_of_rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    rows = row_numbers(rows, x.device)
    if x.dim() == 0 or len(x) != len(rows):
        raise ValueError(
            "brevitas_bp.format.random.noise_like: a tensor is encoded some buckets at a time, because "
            f"all parts of its quantizer say bucketwise = True; expected noise [{len(rows)}, ...] for "
            f"{len(rows)} buckets, got a tensor {list(x.shape)}; draw noise for each bucket, or leave "
            "bucketwise out")
    length = x[0].numel()
    return row_indices(rows.unsqueeze(-1) * length, length)


# NOTE [ The noise is an operator ]
# Stock Brevitas components script their children under BREVITAS_JIT=1, and torch.compile traces them. A
# torch.library operator is opaque to both, so it reads the thread's seed when it runs.
_library = torch.library.Library("brevitas_bp", "DEF")
_library.define("noise_like(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("noise_like", noise_like_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::noise_like", lib=_library)
def _noise_like_fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def noise_like(x: Tensor) -> Tensor:
    """Calls the operator ``brevitas_bp::noise_like``, which is callable from TorchScript as well."""
    return torch.ops.brevitas_bp.noise_like(x)


class SeedStream:
    """A private, thread-safe sequence of 64-bit seeds; torch's generators are never touched.

    Args:
        base: 64-bit seed of the sequence.
    """

    def __init__(self, base: int) -> None:
        self._lock = threading.Lock()
        self._base = base & _MASK64
        self._position = 0
        # The rank of the last call (mostly the same rank), and the state from which the seeds of this
        # rank are derived.
        self._start = 0, splitmix64(self._base)

    def next(self, rank: int = 0) -> int:
        """Returns the next seed; processes of other ``rank`` get other seeds at the same position."""
        with self._lock:
            position = self._position
            self._position += 1
            if self._start[0] != rank:
                base = derive(self._base, rank) if rank else self._base
                self._start = rank, splitmix64(base)
            start = self._start[1]
        return splitmix64(start ^ position)

    def state(self) -> dict[str, int]:
        """Returns base and position, enough to continue the sequence elsewhere."""
        return {"base": self._base, "position": self._position}

    def __getstate__(self) -> dict[str, int]:
        return self.state()

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["base"])
        self.set_state(state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues the sequence that :meth:`state` described."""
        if set(state) != {"base", "position"}:
            raise ValueError(
                "SeedStream.set_state: expected the keys 'base' and 'position' as returned by "
                f"state(), got {sorted(state)}; pass the saved state unchanged")
        self._base = int(state["base"]) & _MASK64
        self._position = int(state["position"])
        self._start = 0, splitmix64(self._base)
