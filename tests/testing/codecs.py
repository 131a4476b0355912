"""A sound codec of one's own, and one broken codec for each check of ``check_codec``."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from brevitas_bp import Codec, Packed
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.random import uniform


class Sound(Codec):
    """Stochastic 8-bit codes with one scale."""

    name = "sound"
    restores = FLOATS
    decodes_anew = True

    def noise(self, flat: Tensor, seed: int) -> Tensor:
        return uniform(seed, (flat.numel(),))

    def scale(self, flat: Tensor) -> Tensor:
        top = flat.abs().amax() if flat.numel() else flat.new_zeros(())
        return torch.where(top.isfinite(), top / 127, torch.nan)

    def values(self, x: Tensor) -> Tensor:
        return x.detach()

    def facts(self, flat: Tensor) -> Any:
        return None

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = self.layout_of(x, where)
        flat = layout.flatten(self.values(x))
        flat = flat.to(compute_dtype(flat.dtype))
        scale = self.scale(flat)
        codes = torch.where(scale > 0, flat / scale, 0) + self.noise(flat, seed)
        codes = codes.floor().nan_to_num(0).clamp(-127, 127).to(torch.int8)
        return Packed(self, self.stored(codes, scale), layout, self.facts(flat), where)

    def stored(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return codes, scale.reshape(1)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(self.flat(packed))

    def flat(self, packed: Packed) -> Tensor:
        codes, scale = packed.tensors
        limit = torch.finfo(packed.layout.dtype).max
        return (codes * scale).clamp(-limit, limit).to(packed.layout.dtype)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        inner = compute_dtype(packed.layout.dtype)
        return [TensorType.flat(packed.layout.numel, torch.int8), TensorType.flat(1, inner)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return layout.numel + compute_dtype(layout.dtype).itemsize


class DecodesToFloat32(Sound):
    def decode(self, packed: Packed) -> Tensor:
        return super().decode(packed).float()


class DecodesFlat(Sound):
    def decode(self, packed: Packed) -> Tensor:
        return self.flat(packed)


class TakesIntegers(Sound):
    def layout_of(self, x: Tensor, where: str = "") -> TensorLayout:
        return TensorLayout.of(x)

    def values(self, x: Tensor) -> Tensor:
        return x.detach().float() if not x.is_floating_point() else x.detach()


class RefusesWithoutReason(Sound):
    def layout_of(self, x: Tensor, where: str = "") -> TensorLayout:
        if x.dtype not in FLOATS:
            raise TypeError("no")
        return TensorLayout.of(x)


class Contiguous(Sound):
    def decode(self, packed: Packed) -> Tensor:
        return super().decode(packed).contiguous()


class NeedsElements(Sound):
    def scale(self, flat: Tensor) -> Tensor:
        return flat.abs().amax() / 127


class NotLossless(Sound):
    lossy = False


class TwiceAsLarge(Sound):
    def flat(self, packed: Packed) -> Tensor:
        return super().flat(packed) * -2


class Rolled(Sound):
    def flat(self, packed: Packed) -> Tensor:
        return super().flat(packed).roll(1)


class RowMajor(Sound):
    """Reads memory in the order of indices, and writes it in the order of strides."""

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        packed = super().encode(TensorLayout.base(x).contiguous(), seed=seed, where=where)
        return Packed(self, packed.tensors, TensorLayout.of(x), None, where)


class HidesNaN(Sound):
    def scale(self, flat: Tensor) -> Tensor:
        return super().scale(flat.nan_to_num(0, 0, 0))


class Overflows(Sound):
    def flat(self, packed: Packed) -> Tensor:
        codes, scale = packed.tensors
        return (codes * (127 * scale) / 127).to(packed.layout.dtype)


class HasAnEpsilon(Sound):
    def scale(self, flat: Tensor) -> Tensor:
        return super().scale(flat).clamp(min=1e-10)


class ClaimsSigns(Sound):
    keeps_sign = True

    def noise(self, flat: Tensor, seed: int) -> Tensor:
        return super().noise(flat, seed) - 0.5


class FlatElements(Sound):
    @property
    def per_element(self) -> Codec:
        return DecodesFlat()


class ForgetsWidth(Sound):
    bit_widths = (8,)

    def at_least(self, bits: int) -> Codec:
        return Sound()


class ForgetsWhere(Sound):
    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        return super().encode(x, seed=seed)


class Counts(Sound):
    calls = 0

    def noise(self, flat: Tensor, seed: int) -> Tensor:
        self.calls += 1
        return super().noise(flat, seed + self.calls)


class IgnoresSeed(Sound):
    def noise(self, flat: Tensor, seed: int) -> Tensor:
        return super().noise(flat, 0)


class DrawsGlobally(Sound):
    def noise(self, flat: Tensor, seed: int) -> Tensor:
        return torch.rand(flat.shape)


class DrawsGloballyInSecret(Sound):
    def noise(self, flat: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng():
            return torch.rand(flat.shape)


class RemembersTheLast(Sound):
    """Decodes with the scale of the last tensor."""

    def scale(self, flat: Tensor) -> Tensor:
        self.last = super().scale(flat)
        self.encoded = getattr(self, "encoded", 0) + 1
        return self.last

    def flat(self, packed: Packed) -> Tensor:
        return super().flat(packed) * self.encoded


class DecodesOnce(Sound):
    """Returns the same memory from each decode."""

    def decode(self, packed: Packed) -> Tensor:
        if packed.facts[0] is None:
            packed.facts[0] = super().decode(packed)
        return packed.facts[0]

    def facts(self, flat: Tensor) -> Any:
        return [None]


class HidesATensor(Sound):
    def facts(self, flat: Tensor) -> Any:
        return {"more": (flat.clone(),)}


class StoresViews(Sound):
    def stored(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([codes, codes])[:codes.numel()], scale.reshape(1)


class PromisesTooMuch(Sound):
    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return 2 * layout.numel + 9


class StatesOtherTypes(Sound):
    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        return [TensorType.flat(packed.layout.numel), TensorType.flat(1, torch.float32)]

    def decode(self, packed: Packed) -> Tensor:
        return super().decode(packed)


class WritesToTheTensor(Sound):
    def values(self, x: Tensor) -> Tensor:
        return x.detach().clamp_(-0.5, 0.5)


class Aliases(Sound):
    """Keeps the tensor, and says that the memory is its own."""

    lossy = False

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = self.layout_of(x, where)
        return Packed(self, (layout.flatten(x.detach()),), layout, None, where)

    def flat(self, packed: Packed) -> Tensor:
        return packed.tensors[0].clone()

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        return None

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return None


class HoldsTheTensor(Sound):
    def values(self, x: Tensor) -> Tensor:
        self.held = x
        return x.detach()


class KeepsTheGraph(Sound):
    def values(self, x: Tensor) -> Tensor:
        return x


class Table(Sound):
    """Finds what it needs by the identity of an object."""

    def __init__(self) -> None:
        self.table: dict[Hashable, Tensor] = {}

    def facts(self, flat: Tensor) -> Any:
        key = _Key()
        self.table[key] = flat.new_ones(())
        return key

    def flat(self, packed: Packed) -> Tensor:
        return super().flat(packed) * self.table[packed.facts].to(packed.layout.dtype)

    def __deepcopy__(self, memo: Any) -> "Table":
        return self


class _Key:
    pass


class CannotPickle(Sound):
    def facts(self, flat: Tensor) -> Any:
        return lambda: flat.numel()


class ChangesForward(Sound):
    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        packed = super().encode(x, seed=seed, where=where)
        if not x.is_inference() and x.dim() == 2 and x.shape[-1] == 64:
            x.detach().mul_(0.5)
        return packed


class FailsInBackward(Sound):
    def decode(self, packed: Packed) -> Tensor:
        if packed.where != "check_codec":
            raise IndexError("lost")
        return super().decode(packed)


#: check -> (broken codec, settings of the check, what the message says).
BROKEN: list[tuple[str, type[Codec], dict[str, Any], str]] = [
    ("round trip", DecodesToFloat32, {}, r"expected torch.float16, got torch.float32"),
    ("round trip", DecodesFlat, {}, r"expected the shape \(4, 6, 9, 11\), got \(2376,\)"),
    ("refused dtypes", TakesIntegers, {}, r"expected a TypeError that names bool.*got a payload"),
    ("refused dtypes", RefusesWithoutReason, {}, r"names bool.*got TypeError: no"),
    ("strides", Contiguous, {},
     r"transposed: expected strides \(1, 36, 4, 216\), got \(594, 99, 11, 1\)"),
    ("small tensors", NeedsElements, {}, r"Expected no error, got RuntimeError: amax"),
    ("values", NotLossless, {},
     r"expected the very same bits, because lossy is False, got .* in place of"),
    ("values", TwiceAsLarge, {}, r"expected errors of at most 2 times the largest magnitude"),
    ("values", Sound, {"largest_error": 1e-3}, r"expected errors of at most 0.001 times"),
    ("order", Rolled, {},
     r"expected decoded elements that go with the given ones, got a correlation of"),
    ("order", RowMajor, {}, r"transposed, of ones and minus ones.* a correlation of"),
    ("non-finite", HidesNaN, {}, r"with one nan: expected NaN or Inf in its place, got"),
    ("huge values", Overflows, {}, r"up to the largest float .*expected finite numbers, got"),
    ("tiny values", HasAnEpsilon, {},
     r"times 7.89e-31: expected the relative error of the tensor itself"),
    ("signs", ClaimsSigns, {}, r"expected no negative number, because keeps_sign is True, got -"),
    ("relatives", FlatElements, {}, r"with the codec of per_element: expected float16 \[4, 6, 9, 11\]"),
    ("relatives", ForgetsWidth, {}, r"at_least\(8\): expected the codec itself"),
    ("names", ForgetsWhere, {}, r"expected a Packed with the same where, for messages, got ''"),
    ("determinism", Counts, {}, r"encoded twice with seed 7: expected the same bytes, got other bytes"),
    ("seeds", IgnoresSeed, {"stochastic": True}, r"expected other bytes, because stochastic=True"),
    ("seeds", Sound, {"stochastic": False}, r"expected the same bytes, because stochastic=False"),
    ("global randomness", DrawsGlobally, {}, r"expected the global generator of torch as it was"),
    ("global randomness", DrawsGloballyInSecret, {},
     r"torch.manual_seed\(1\) and \(2\): expected the same"),
    ("immutability", RemembersTheLast, {},
     r"decoded after another tensor was encoded: expected the same"),
    ("immutability", DecodesOnce, {}, r"expected new memory from each decode, because decodes_anew"),
    ("bytes", HidesATensor, {}, r"expected 2380 bytes of memory, as nbytes says, got 11884"),
    ("bytes", StoresViews, {}, r"expected 2380 bytes of memory, as nbytes says, got 4756"),
    ("least bytes", PromisesTooMuch, {}, r"expected 2380 or less from stored_nbytes, .* got 4761"),
    ("tensor types", StatesOtherTypes, {}, r"expected tensor_types of .*int8.* got .*uint8"),
    ("input", WritesToTheTensor, {}, r"expected the tensor as it was, got"),
    ("ownership", Aliases, {}, r"overwritten after it was encoded: expected the values before"),
    ("memory", HoldsTheTensor, {}, r"expected its memory to be free, got a reference to it"),
    ("memory", Aliases, {}, r"expected its memory to be free, got a reference to it"),
    ("graph", KeepsTheGraph, {}, r"expected stored tensor 1 without a graph"),
    ("copies", Table, {}, r"Expected no error, got KeyError"),
    ("pickles", CannotPickle, {}, r"Expected no error, got (AttributeError|PicklingError)"),
    ("wrapper", ChangesForward, {},
     r"Expected no error, got RuntimeError: .* modifying its input in place"),
    ("wrapper", DrawsGlobally, {}, r"expected the output of the network without the wrapper, got"),
    ("wrapper", FailsInBackward, {}, r"Expected no error, got IndexError: lost")]
