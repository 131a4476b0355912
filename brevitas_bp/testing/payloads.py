"""Checks of what a codec stores: determinism, bytes, ownership, copies."""

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brevitas_bp.codec import Codec, Packed
from brevitas_bp.errors import CorruptPayloadError
from brevitas_bp.testing.checks import Check, found
from brevitas_bp.testing.subject import Subject, differing, named, same_bits, same_payload


def _deterministic(subject: Subject) -> None:
    for case, x in subject.bases():
        first, second = (subject.encode(x, seed=7) for _ in range(2))
        if not same_payload(first, second):
            found(f"{case}, encoded twice with seed 7", "the same bytes", "other bytes")
        if not same_bits(first.decode(), second.decode()):
            found(f"{case}, encoded twice with seed 7", "the same values",
                  differing(second.decode(), first.decode()))


def _seeds(subject: Subject) -> None:
    case, x = subject.first()
    first, *others = (subject.encode(x, seed=seed) for seed in (1, 2, 1 << 40))
    alike = all(
        same_payload(first, other) and same_bits(first.decode(), other.decode()) for other in others)
    if subject.stochastic and alike:
        found(f"{case} with three seeds", "other bytes, because stochastic=True", "the same bytes")
    if subject.stochastic is False and not alike:
        found(f"{case} with three seeds", "the same bytes, because stochastic=False", "other bytes")


def _global_states(x: Tensor) -> list[Any]:
    # Python's state is a tuple, numpy's a tuple with an array.
    states = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
    if x.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(x.device).tolist())
    return states


_GENERATORS = ("torch", "random", "numpy.random", "torch.cuda")


def _no_global_randomness(subject: Subject) -> None:
    case, x = subject.first()
    before = _global_states(x)
    packed = subject.encode(x)
    packed.decode()
    for name, old, new in zip(_GENERATORS, before, _global_states(x)):
        if old != new:
            found(case, f"the global generator of {name} as it was", "another state")
    payloads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        payloads.append(subject.encode(x))
    if not same_payload(*payloads) or not same_bits(*(payload.decode() for payload in payloads)):
        found(f"{case} after torch.manual_seed(1) and (2)", "the same bytes", "other bytes")


def _immutable(subject: Subject) -> None:
    codec = subject.fresh()
    for case, x in subject.bases():
        packed = subject.encode(x, codec=codec)
        kept = packed.decode().clone()
        for again in ("decoded twice", "decoded after another tensor was encoded"):
            if not same_bits(packed.decode(), kept):
                found(f"{case}, {again}", "the same bits", differing(packed.decode(), kept))
            subject.encode(x.roll(1) if x.dim() else x, seed=2, codec=codec).decode()
        if codec.decodes_anew:
            packed.decode().zero_()
            if not same_bits(packed.decode(), kept):
                found(f"{case}, with zeros written to a decoded tensor",
                      "new memory from each decode, because decodes_anew is True",
                      differing(packed.decode(), kept))


def _bytes(subject: Subject) -> None:
    for case, x in subject.bases():
        packed = subject.encode(x)
        own = sum(t.numel() * t.element_size() for t in packed.tensors)
        if packed.nbytes != own:
            found(case, f"nbytes {own}, the bytes of Packed.tensors", packed.nbytes)
        live = _live_bytes(packed)
        if packed.codec.owns and live != own:
            found(case, f"{own} bytes of memory, as nbytes says",
                  f"{live}: a stored tensor is a view of a larger one, or the facts hold a tensor")


def _live_bytes(packed: Packed) -> int:
    """Returns the bytes of all memory that a payload holds, without that of codecs and modules."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [packed.tensors, packed.facts, packed.layout, packed.seal]
    seen: set[int] = set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, Codec, nn.Module)) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            storages[id(thing)] = thing.nbytes
        elif isinstance(thing, Packed):
            waiting += [thing.tensors, thing.facts]
        elif not isinstance(thing, (torch.dtype, torch.device, str, bytes, int, float)):
            waiting += gc.get_referents(thing)
    return sum(storages.values())


def _least_bytes(subject: Subject) -> None:
    for case, x in _sizes(subject):
        codec = subject.fresh()
        packed = subject.encode(x, codec=codec)
        least = codec.stored_nbytes(packed.layout)
        if least is not None and least > packed.nbytes:
            found(case, f"{packed.nbytes} or less from stored_nbytes, what encoding took", least)


def _sizes(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    for case, x in subject.bases():
        yield case, x
        if not subject.given:
            for size in (1, 7, 64, 255, 256, 257):
                yield f"{size} elements of {case}", x.reshape(-1)[:size].clone()


def _types(subject: Subject) -> None:
    for case, x in _sizes(subject):
        packed = subject.encode(x)
        types = packed.codec.tensor_types(packed)
        stored = [(tuple(t.shape), t.dtype) for t in packed.tensors]
        if types is not None and [(tuple(t.shape), t.dtype) for t in types] != stored:
            found(case, f"tensor_types of {stored}, which are stored", [tuple(t) for t in types])


def _reads_only(subject: Subject) -> None:
    for case, x in subject.bases():
        given = x.clone(memory_format=torch.preserve_format)
        version = given._version
        subject.encode(given).decode()
        if not same_bits(given, x) or given._version != version:
            found(f"{case}, after encoding", "the tensor as it was", differing(given, x))


def _owns(subject: Subject) -> None:
    for case, x in subject.bases():
        x = x.clone()
        packed = subject.encode(x)
        kept = packed.decode().clone()
        x.logical_not_()
        overwritten, wanted = f"{case}, overwritten after it was encoded", (
            "the values before, because the codec does not say that it keeps the tensor")
        try:
            decoded = packed.decode()
        except CorruptPayloadError as error:
            found(overwritten, wanted, f"CorruptPayloadError: {error}")
        if not same_bits(decoded, kept):
            found(overwritten, wanted, differing(decoded, kept))


def _frees(subject: Subject) -> None:
    for case, x in subject.bases():
        if x.dtype == torch.bfloat16 or x.device.type != "cpu":
            continue  # Arrays of numpy tell when memory is freed, and have no such dtype.
        memory = x.contiguous().numpy().copy()
        alive, codec = weakref.ref(memory), subject.fresh()
        packed = subject.encode(torch.from_numpy(memory), codec=codec)
        del memory
        if alive() is not None:  # Something holds it, or a cycle does, which is no leak.
            gc.collect()
        if alive() is not None:
            found(f"{case}, encoded and deleted", "its memory to be free",
                  "a reference to it, in the payload or in the codec")
        del packed


def _no_graph(subject: Subject) -> None:
    for case, x in subject.floats():
        with torch.enable_grad():
            packed = subject.encode(x.clone().requires_grad_())
            decoded = packed.decode()
        for name, t in (*((f"stored tensor {i}", t) for i, t in enumerate(packed.tensors)),
                        ("the decoded tensor", decoded)):
            if t.requires_grad:
                found(f"{case} that requires a gradient", f"{name} without a graph (use x.detach())",
                      "one that requires a gradient")


def _copies(subject: Subject) -> None:
    case, x = subject.first()
    packed = subject.encode(x)
    kept = packed.decode().clone()
    for how, other in (("copy.deepcopy", copy.deepcopy(packed)), ("sealed()", packed.sealed())):
        if not same_bits(other.decode(), kept):
            found(f"{case}, the payload after {how}", "the same bits", differing(other.decode(), kept))


def _pickles(subject: Subject) -> None:
    case, x = subject.first()
    packed = subject.encode(x)
    other: Packed = pickle.loads(pickle.dumps(packed))
    if not same_bits(other.decode(), packed.decode()):
        found(f"{case}, the payload after pickling", "the same bits",
              differing(other.decode(), packed.decode()))


def _names(subject: Subject) -> None:
    codec = subject.codec
    if not isinstance(codec.name, str) or not codec.name:
        found("name", "text for reports", repr(codec.name))
    case, x = subject.first()
    packed = subject.encode(x)
    if not isinstance(packed, Packed):
        found(case, "a Packed from encode", type(packed).__name__)
    if packed.where != "check_codec":
        found(f"{case}, encoded with where='check_codec'", "a Packed with the same where, for messages",
              repr(packed.where))
    if (packed.layout.shape, packed.layout.dtype) != (x.shape, x.dtype):
        found(case, f"a layout of {named(x)}", f"{packed.layout.dtype} {list(packed.layout.shape)}")


def _owned(subject: Subject) -> bool:
    return subject.codec.owns and not subject.codec.keeps


#: name -> check of what a codec stores.
PAYLOADS: dict[str, Check[Subject]] = {
    "names": Check("reports and messages name the codec and the place that saves a tensor", _names),
    "determinism": Check("the same seed gives the same bytes", _deterministic),
    "seeds": Check(
        "all randomness comes from the seed", _seeds, lambda subject: subject.stochastic is not None),
    "global randomness": Check(
        "a codec neither changes nor uses a global generator, so that dropout of the forward pass stays "
        "as it is (take noise from torch.ops.brevitas_bp.noise_like, or a generator of your own)",
        _no_global_randomness),
    "immutability": Check("a Packed is immutable: decoding it again gives the same bits", _immutable),
    "bytes": Check("reported bytes are bytes of live tensors", _bytes),
    "least bytes": Check(
        "stored_nbytes promises no more than encoding takes; otherwise a tensor is kept that would "
        "shrink", _least_bytes),
    "tensor types": Check("tensor_types states what is stored", _types),
    "input": Check("encoding does not change the tensor, which forward goes on using", _reads_only),
    "ownership": Check("a payload does not change with the tensor that was encoded", _owns, _owned),
    "memory": Check("the memory of the encoded tensor can be freed", _frees, _owned),
    "graph": Check("a payload holds no graph of autograd", _no_graph),
    "copies": Check("copies and sealed copies of a payload decode to the same bits", _copies),
    "pickles": Check("a pickled payload decodes to the same bits", _pickles)}
