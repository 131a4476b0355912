"""Hooks that ``torch.compile`` inlines into the graphs of compiled modules.

NOTE [ Hooks as graph modules ]
1. Dynamo inlines a pair of hooks if both are graph modules: each holds a call of one Python function,
   which runs again for every saved tensor while the graphs are made, and again, as it is, for tensors
   that are saved outside of compiled graphs. So one pair serves both.
2. The graphs are guarded by the identity of the pair: wrappers with equal settings have one pair, see
   :mod:`brevitas_bp.backward.shared`, and a wrapper takes another when its settings change.
3. Inputs of a graph come here too: what one compiled block gives to the next would be kept otherwise.
   Parameters and buffers do not.
4. What a graph stores is decided when it is made: which part of the network saves a tensor, and what the
   backward graph does with it (:mod:`~brevitas_bp.backward.compiled.linearity`), the graphs show.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from brevitas_bp.backward.compiled import operators  # noqa: F401  (registers them)
from brevitas_bp.backward.compiled.dynamo import in_python, no_graph_of_its_own
from brevitas_bp.backward.compiled.linearity import reach_of
from brevitas_bp.backward.compiled.nodes import inputs_of, is_rectified, is_tangent
from brevitas_bp.backward.compiled.placement import raise_encoders, sink_decoders
from brevitas_bp.backward.compiled.rows import Grouping, grouping_of
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.location import Location, current_location
from brevitas_bp.backward.parameters import ParameterSet
from brevitas_bp.backward.policy import PlainPolicy
from brevitas_bp.backward.saved import Decision, SavedTensor, storage_id
from brevitas_bp.codec.base import Codec, is_smaller
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.private import (
    TracingContext,
    aot_compilation_context,
    functorch_config,
    inlining_code,
    saved_tensor_hook_context,
    tree_leaves,
)

_META = "brevitas_bp"
# Two calls with equal arguments would be merged, so each has a number.
_calls = itertools.count()


@dataclass(frozen=True)
class CompiledSite:
    """A tensor that a compiled graph saves.

    Attributes:
        saved: the tensor, a fake one, and where.
        decision: how it is stored.
        form: stores it; None where it is kept.
        given_bytes: its bytes.
        stored_bytes: bytes of what is kept, for the sizes that the graph was made with.
    """

    saved: SavedTensor
    decision: Decision
    form: GraphForm | None
    given_bytes: int
    stored_bytes: int

    def under(self, prefix: str) -> "CompiledSite":
        """The site of a wrapped module that has this qualified name; another may have made the graph."""
        module = _joined(prefix, self.saved.path)
        if module == self.saved.module:
            return self
        return replace(self, saved=replace(self.saved, module=module))


def _joined(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


class GraphHooks:
    """The pair of hooks of wrappers with equal settings. See NOTE [ Hooks as graph modules ].

    Args:
        unpack: what undoes the hook of the running pass, for tensors saved outside of graphs.
    """

    def __init__(self, unpack: Callable[[Any], Tensor]) -> None:
        self._unpack_eager = in_python(unpack)
        self.pack, self.unpack = _as_graph(self._pack), _as_graph(self._unpack)
        # Number of a graph -> what it saves, in order; None for what comes to no hook.
        self.graphs: dict[int, dict[str, CompiledSite | None]] = {}
        # Number of a graph -> whether it draws noise.
        self._draws: dict[int, bool] = {}

    def explain(self, explanation: Explanation) -> None:
        """Notes what was decided for the graphs that ran, when they were made; once per explanation."""
        if explanation.compiled:
            return
        explanation.compiled = True
        for number, saved in self.graphs.items():
            sites = [site for site in saved.values() if site is not None]
            if number in explanation.graphs:
                for site in sites:
                    explanation.add_stored(
                        site.under(explanation.prefix).saved, site.decision,
                        "exact" if site.form is None else site.form.name,
                        site.given_bytes, site.stored_bytes)

    def note_silent(self, output: Any, inputs: Any, ran: set[int]) -> None:
        """Adds graphs between ``inputs`` and ``output`` to those that ``ran``, if some do not do so.

        Those without a quantizer: they draw no noise, and another wrapper may have made them.
        """
        if len(self._draws) != len(self.graphs):
            self._draws = {
                number: any(s and s.form and s.form.draws for s in list(saved.values()))
                for number, saved in list(self.graphs.items())}
        if not all(self._draws.values()):
            ran.update(node._forward_cls._aot_id for node in compiled_nodes(output, inputs))

    def live(self, output: Any, inputs: Any) -> Iterator[tuple[CompiledSite | None, list[Tensor]]]:
        """What compiled graphs between ``inputs`` and ``output`` keep: site and live tensors."""
        for node in compiled_nodes(output, inputs):
            tensors = iter(node.saved_tensors)
            for site in self.graphs.get(node._forward_cls._aot_id, {}).values():
                count = 1 if site is None or site.form is None else site.form.parts
                yield site, list(itertools.islice(tensors, count))

    def _pack(self, x: Tensor) -> Any:
        context, location = saved_tensor_hook_context(), current_location()
        assert location is not None and location.forward_pass is not None
        if context is None:
            return location.forward_pass.pack_in_python(x)
        node: Node = context["_node"]
        raise_encoders(context["_fw_graph"])
        sink_decoders(context["_bw_graph"])
        if _META not in node.meta:
            site = _decide(x, node, context, location)
            node.meta[_META] = site.form
            graph = self.graphs.setdefault(_graph_number(), _saved_by(context["_bw_graph"]))
            graph[node.name] = site
        form: GraphForm | None = node.meta[_META]
        return x if form is None else _packed(form, x)

    def _unpack(self, packed: Any) -> Tensor:
        context = saved_tensor_hook_context()
        if context is None:
            return self._unpack_eager(packed)
        form: GraphForm | None = context["_node"].meta[_META]
        return packed if form is None else form.unpack(*packed)


def hooks_for_inputs() -> Any:
    """While it is active, graphs that are made call their hooks for all but parameters and buffers."""
    return functorch_config.patch(saved_tensors_hooks_filtering_mode="no_static")


def _as_graph(function: Callable[[Any], Any]) -> GraphModule:
    graph = Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    module = GraphModule({}, graph)
    no_graph_of_its_own(module.forward, function)
    return module


def _packed(form: GraphForm, x: Tensor) -> tuple[tuple[Tensor, ...], list[Any]]:
    def quantize(
            x: Tensor, spec: BucketQuantSpec, channels: int | None = None) -> tuple[Tensor, ...]:
        where = spec.to_text(), _graph_number(), next(_calls)
        if channels is None:
            return torch.ops.brevitas_bp.encode(x, *where)
        return torch.ops.brevitas_bp.encode_channels(x, *where, channels)

    return form.pack(x, quantize)


def _decide(
        x: Tensor, node: Node, context: dict[str, Any], location: Location) -> CompiledSite:
    running = location.forward_pass
    assert running is not None
    path = _module_of(node, context["_bw_graph"], running)
    origin = str(node.meta.get("original_aten", node.name)).removeprefix("aten.").partition(".")[0]
    saved = SavedTensor(
        x, origin, _joined(location.prefix, path), _codec_of(path, running), path=path, compiled=True)
    inputs: list[Node] = context["_fw_graph"].find_nodes(op="placeholder")
    parameters = _parameters_among(inputs, running.parameters)
    decision, form = _KEPT, None
    if x.dtype != torch.bool and not x.is_floating_point():
        decision = _INTEGERS
    elif (sources := set(inputs_of(node))) and sources <= {inputs[i] for i in parameters}:
        decision = _PARAMETER
    elif x.numel() > 0:
        backward: Graph = context["_bw_graph"]
        saved.reach = reach_of(backward, node.name, parameters)
        rectified = False
        if saved.reach == "nonlinear" and is_rectified(node):
            reach = reach_of(backward, node.name, parameters, rectified=True)
            # Policies that do not ask for the reach treat all tensors alike.
            rectified = reach != "nonlinear" and not isinstance(running.policy, PlainPolicy)
            saved.reach = reach if rectified else saved.reach
        grouping = Grouping() if isinstance(running.policy, PlainPolicy) else grouping_of(
            node, backward, x)
        if grouping.channels and saved.reach == "norm" and isinstance(x.numel(), int):
            saved.sharing = x.numel() // x.shape[1]
        decision = running.policy.decide(saved)
        graph_tensor = GraphTensor.of(
            x, channels_last=_runs_channels_last(context["_fw_graph"], x), rectified=rectified,
            row=grouping.row, in_memory=grouping.in_memory, channels=grouping.channels)
        if decision.codec is not None and graph_tensor is not None:
            form = decision.codec.in_graph(graph_tensor)
        if form is None and decision.codec is not None:
            decision = _NO_FORM
    given = stored = x.numel() * x.element_size()
    if form is not None:
        stored = sum(t.numel() * t.element_size() for t in _packed(form, x)[0])
        if not is_smaller(stored, given):
            form, stored = None, given
    return CompiledSite(saved, decision, form, _hint(given), _hint(stored))


def _runs_channels_last(forward: Graph, x: Tensor) -> bool:
    """Whether Inductor will lay images out as channels_last: on a CPU, wherever there is a convolution.

    Encoded in the order in which they were traced, each would be transposed there and back.
    """
    return x.device.type == "cpu" and torch.backends.mkldnn.enabled and any(
        node.target is torch.ops.aten.convolution.default for node in forward.nodes)


_KEPT = Decision(None, "not an ordinary tensor")
_INTEGERS = Decision(None, "integers")
_NO_FORM = Decision(None, "its codec has no form for compiled graphs, or its elements share memory")
_PARAMETER = Decision(None, "computed from parameters and buffers alone")


def _codec_of(path: str, running: Any) -> Codec | None:
    """The codec of a module; where compiled modules may share the graph, one that suits them all.

    Dynamo has one graph for modules of one class with equal sizes, whatever their names. If one is to be
    exact, all are.
    """
    parts: dict[str, type] = running.location.compiled_parts
    codec = running.codec_of(path)
    for part, kind in parts.items():
        if part and (path + ".").startswith(part + "."):
            others = (other + path[len(part):] for other in parts if parts[other] is kind)
            if any(running.codec_of(other) is None for other in others):
                return None
    return codec


def _module_of(node: Node, backward: Graph, running: Any) -> str:
    """Name of the innermost module whose backward reads a node, relative to the root.

    Of several it is one that is to be kept exact, if there is one.
    """
    readers = [n for n in backward.nodes if any(s.name == node.name for s in n.all_input_nodes)]
    found = [_innermost(reader, running.location) for reader in (*readers, node)]
    names = [name for name in found if name is not None]
    exact = (name for name in names if running.codec_of(name) is None)
    return next(exact, names[0] if names else running.location.module)


def _innermost(node: Node, location: Location) -> str | None:
    """Name of the innermost module that a node, or the one that it is the backward of, belongs to."""
    for stack in ("fwd_nn_module_stack", "nn_module_stack"):
        for key in reversed(node.meta.get(stack) or {}):
            # Dynamo's keys are identities, perhaps with the number of a call behind.
            identity = str(key).partition("@")[0]
            if identity.isdecimal() and int(identity) in location.names:
                return location.names[int(identity)]
    return None


def _parameters_among(inputs: list[Node], parameters: ParameterSet) -> list[int]:
    """Positions of parameters and buffers, and of what shows them, among the inputs of a graph."""
    key = f"{_META} parameters"
    if key not in inputs[0].meta:
        storages = _storages_of(parameters)
        inputs[0].meta[key] = sorted({
            *_static_inputs(),
            *(i for i, node in enumerate(inputs) if _storage(node.meta.get("val")) in storages)})
    return inputs[0].meta[key]


def _static_inputs() -> list[int]:
    """Positions of what Dynamo knows to be parameters and buffers."""
    # Nothing that a hook is given says so, nor does a context: it is a variable of what calls the hook.
    frame, inlining = inspect.currentframe(), inlining_code()
    while frame is not None and frame.f_code is not inlining:
        frame = frame.f_back
    return [] if frame is None else frame.f_locals["static_input_indices"]


def _storages_of(parameters: ParameterSet) -> set[int]:
    """Storages of fake tensors that stand for parameters, or for views and casts made outside."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return set()
    fakes = (
        context.fake_mode.fake_tensor_converter._get_memo(real)
        for real in context.tensor_to_context if parameters.contains(real, ()))
    return {storage_id(fake) for fake in fakes if fake is not None}


def _storage(value: Any) -> int:
    return storage_id(value) if isinstance(value, Tensor) else 0


def _graph_number() -> int:
    """The number that AOTAutograd gave the graph being made; its node in autograd's graph has it too."""
    names, _, _ = aot_compilation_context()
    return int(names[0].partition("_")[0]) if names else -1


def _saved_by(backward: Graph) -> dict[str, CompiledSite | None]:
    """Names of the tensors that a backward graph takes from the forward graph, in order."""
    return {
        node.name: None for node in backward.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor) and not is_tangent(node)}


def _hint(number: Any) -> int:
    """A size; a symbolic one as it is now."""
    return number if isinstance(number, int) else int(number.node.hint)


def compiled_nodes(output: Any, inputs: Any) -> Iterator[Any]:
    """Nodes of autograd's graph that compiled graphs put between ``inputs`` and ``output``."""
    seen: set[Any] = {None, *(t.grad_fn for t in tensors_of(inputs))}
    waiting: list[Any] = [t.grad_fn for t in tensors_of(output)]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(getattr(node, "_forward_cls", None), "_aot_id"):
            yield node
        waiting += [source for source, _ in node.next_functions]


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in a structure of containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
