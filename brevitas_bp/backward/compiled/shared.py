"""One pair of hooks for all wrappers with equal settings.

NOTE [ Equal settings share graphs ]
1. Dynamo guards a graph by the identity of its hooks. It makes eight graphs of one function
   (``torch._dynamo.config.recompile_limit``). After that it runs the function without compilation. So
   wrappers around blocks of one class must not each have their own pair.
2. The key of a pair holds everything that decides what a graph stores: codecs, overrides, plan, policy,
   and the modules' names and classes. Things that belong to one wrapper are looked up when a graph or
   hook runs: noise, parameters and listeners come from the thread's current forward pass.
3. The library's codecs and policies are compared by value, the user's by identity. A user's policy may
   read qualified names, so it shares a pair only if these names are equal too.
4. If eager code of a pass can hand its parameters to a compiled part, the pair serves this module only.
5. The table holds pairs weakly. Keys hold classes and the user's objects weakly: such objects could hold
   the pair, and then nothing would be freed. Dynamo keeps a pair as long as it keeps a graph of it.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakSet, WeakValueDictionary, ref

from torch import Tensor

from brevitas_bp.backward.compiled.dynamo import frames_of
from brevitas_bp.backward.compiled.hooks import GraphHooks
from brevitas_bp.backward.location import Location
from brevitas_bp.backward.planned import PlannedPolicy
from brevitas_bp.backward.policy import POLICIES, OpAware, PlainPolicy
from brevitas_bp.codec import Codec
from brevitas_bp.private import graphs_of, recompile_limit

_pairs: WeakValueDictionary[Hashable, GraphHooks] = WeakValueDictionary()
# Classes that crowded_out has already reported.
_crowded: WeakSet[type] = WeakSet()


class _Same:
    """A key that is equal only for the same object, while that object lives."""

    __slots__ = ("_hash", "_ref")

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._ref: Callable[[], Any] = ref(thing)
        except TypeError:  # Without weak references, the key equals nothing.
            self._ref = _nothing

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        thing = self._ref()
        return thing is not None and isinstance(other, _Same) and other._ref() is thing


def _nothing() -> None:
    return None


def hooks_of(
        codec: Codec | None, overrides: Iterable[tuple[str, Codec | None]], policy: Any,
        location: Location, unpack: Callable[[Any], Tensor]) -> GraphHooks:
    """Returns the hooks of all wrappers with these settings around modules of this structure."""
    key = (
        _Same(location.tree[0]) if _may_pass_parameters(location) else None,
        _of_codec(codec), tuple((pattern, _of_codec(other)) for pattern, other in overrides),
        _of_policy(policy, location.prefix), location.root_compiled, tuple(location.compiled_parts),
        tuple((location.names[id(module)], _Same(type(module))) for module in location.tree))
    return _pairs.setdefault(key, GraphHooks(unpack))


def _may_pass_parameters(location: Location) -> bool:
    """Whether eager code of the pass can hand a parameter or buffer to a compiled part as an input.

    A graph decides when it is made which of its inputs are parameters. Another wrapper may pass an
    activation in the same place, so such graphs are not shared.
    """
    if location.root_compiled:
        return False
    parts = tuple(name + "." for name in location.compiled_parts)
    return any(
        (module._parameters or module._buffers)
        and not (location.names[id(module)] + ".").startswith(parts)
        for module in location.tree)


def _of_codec(codec: Codec | None) -> Hashable:
    if codec is None:
        return None
    key = codec.graph_key()
    return _Same(codec) if key is None else key


def _of_policy(policy: Any, prefix: str) -> Hashable:
    if type(policy) is PlannedPolicy:
        return _of_policy(policy.policy, prefix), tuple(policy.choices.items())
    if type(policy) is PlainPolicy:
        return _of_policy(policy.policy, prefix)
    if type(policy) is OpAware:
        return policy
    own = any(policy is known for known in POLICIES.values())
    return _Same(policy), None if own else prefix


def crowded_out(kinds: Iterable[type]) -> str | None:
    """Names a class of compiled modules for which Dynamo makes no more graphs; each class only once."""
    limit = recompile_limit()
    for kind in dict.fromkeys(kinds):
        if kind not in _crowded and any(graphs_of(code) >= limit for code in frames_of(kind)):
            _crowded.add(kind)
            return kind.__name__
    return None
