"""Places encoders and decoders in a compiled graph.

NOTE [ Encoders rise, decoders sink ]
1. AOTAutograd puts the hooks' operations at the end of the forward graph and at the beginning of the
   backward graph, and Inductor keeps calls in graph order. So all saved tensors would be alive at once,
   uncompressed, twice in a step. Nothing would be saved at the peak, where it counts.
2. So an encoder moves up to the operation that makes its tensor. A decoder moves down to the first
   operation that reads its values.
3. The hooks see the graphs while they are built, but not the nodes that their own call adds. So each
   call moves the operations of earlier calls. Operations of the last call stay where they are.
"""

from torch.fx import Graph, Node

from brevitas_bp.backward.compiled.rows import statistics_of
from brevitas_bp.backward.views import VIEWS

_MOVED = "brevitas_bp moved"
_OF_CHANNELS = frozenset({"encode_channels", "encode_channels_seeded"})
_ENCODERS = _OF_CHANNELS | {"encode", "encode_seeded", "pack_bits", "pack_positive"}
_DECODERS = frozenset({"decode", "decode_channels", "decode_rectified", "unpack_bits"})


def raise_encoders(forward: Graph) -> None:
    """Moves each encoder, and the views that it reads, up to the node that makes its tensor."""
    for encoder in _new(forward, _ENCODERS):
        chain = [encoder]
        # Two encoders of one tensor share one view of it.
        while isinstance(source := chain[0].args[0], Node) and _name(source) in VIEWS and all(
                user is chain[0] or _is_encoder(user) for user in source.users):
            chain.insert(0, source)
        made = chain[0].args[0]
        # The graph's inputs exist from the beginning; an encoder may stand behind the last of them.
        inputs = forward.find_nodes(op="placeholder")
        assert isinstance(made, Node)
        place = inputs[-1] if made in inputs else made
        if _name(encoder) in _OF_CHANNELS and (
                statistics := statistics_of(made)) is not None:
            # The norm has computed the statistics; it runs right after the node that makes its input.
            encoder.args = (*encoder.args[:5], *statistics)
            place = max(place, *statistics, key=list(forward.nodes).index)
        while _name(place.next) == "getitem":
            place = place.next
        for node in reversed(chain):
            place.append(node)


def sink_decoders(backward: Graph) -> None:
    """Moves each decoder, and the views of its values, down to the first node that reads them."""
    decoders = _new(backward, _DECODERS)
    order = {node: i for i, node in enumerate(backward.nodes)} if decoders else {}
    for decoder in decoders:
        chain = [decoder]
        while len(chain[-1].users) == 1 and _name(user := next(iter(chain[-1].users))) in VIEWS:
            chain.append(user)
        first = min(chain[-1].users, key=lambda node: order[node], default=None)
        if first is not None:
            for node in chain:
                first.prepend(node)


def _is_encoder(node: Node) -> bool:
    return _name(node) in _ENCODERS and "brevitas_bp" in str(node.target)


def _new(graph: Graph, names: frozenset[str]) -> list[Node]:
    """Returns our operations that have not been moved yet, and marks them as moved."""
    found = []
    for node in graph.nodes:
        if _name(node) in names and "brevitas_bp" in str(node.target) and _MOVED not in node.meta:
            node.meta[_MOVED] = True
            found.append(node)
    return found


def _name(node: Node) -> str:
    """``aten.view.default`` -> "view"; for a Python function, its name."""
    if node.op != "call_function":
        return ""
    return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
