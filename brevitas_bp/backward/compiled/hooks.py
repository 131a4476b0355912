"""Hooks that ``torch.compile`` inlines into the graphs of compiled modules.

NOTE [ Hooks as graph modules ]
1. Dynamo inlines a pair of hooks if both are graph modules. Each graph module holds a call of one
   Python function. That function runs for every saved tensor while the graphs are made. For tensors
   saved outside compiled graphs it runs unchanged. So one pair serves both cases.
2. Dynamo guards the graphs by the identity of the pair. Wrappers with equal settings therefore share
   a pair, see :mod:`brevitas_bp.backward.compiled.shared`. A wrapper takes another pair when its
   settings change.
3. The hooks also get the inputs of a graph. Otherwise a tensor that one compiled block passes to the
   next would be kept exact. Parameters and buffers do not reach the hooks.
4. How a tensor is stored is decided when the graph is made. The graphs show which part of the
   network saves a tensor, and what the backward graph does with it
   (:mod:`~brevitas_bp.backward.compiled.linearity`).
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from brevitas_bp.backward.compiled import operators  # noqa: F401  (registers the operators)
from brevitas_bp.backward.compiled.dynamo import in_python, inductor_compiles, no_graph_of_its_own
from brevitas_bp.backward.compiled.linearity import reach_of
from brevitas_bp.backward.compiled.nodes import inputs_of, is_rectified, is_tangent
from brevitas_bp.backward.compiled.placement import raise_encoders, sink_decoders
from brevitas_bp.backward.compiled.rows import Grouping, grouping_of, is_small_input
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.location import Location, current_location
from brevitas_bp.backward.parameters import ParameterSet
from brevitas_bp.backward.policy import PlainPolicy
from brevitas_bp.backward.saved import Decision, SavedTensor, storage_id
from brevitas_bp.codec.base import Codec, is_smaller
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor, Rectified
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
# A graph merges two calls with equal arguments, so each call gets a number.
_calls = itertools.count()


@dataclass(frozen=True)
class CompiledSite:
    """A tensor that a compiled graph saves.

    Attributes:
        saved: the tensor, as a fake tensor, and its site.
        decision: how the tensor is stored.
        form: the graph form that stores the tensor; None: the tensor is kept.
        given_bytes: bytes of the tensor.
        stored_bytes: bytes that are kept, for the sizes that the graph was made with.
    """

    saved: SavedTensor
    decision: Decision
    form: GraphForm | None
    given_bytes: int
    stored_bytes: int

    def under(self, prefix: str) -> "CompiledSite":
        """Returns the site below the qualified name ``prefix`` of the wrapped module.

        A wrapper with another name may have made the graph.
        """
        module = _joined(prefix, self.saved.path)
        if module == self.saved.module:
            return self
        return replace(self, saved=replace(self.saved, module=module))


def _joined(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


class GraphHooks:
    """The pair of hooks of wrappers with equal settings. See NOTE [ Hooks as graph modules ].

    Args:
        unpack: the unpack hook of the running pass, for tensors saved outside graphs.
    """

    def __init__(self, unpack: Callable[[Any], Tensor]) -> None:
        self._unpack_eager = in_python(unpack)
        self.pack, self.unpack = _as_graph(self._pack), _as_graph(self._unpack)
        # Number of a graph -> the tensors that it saves, in order; None if a tensor reached no hook.
        self.graphs: dict[int, dict[str, CompiledSite | None]] = {}
        # Number of a graph -> whether it draws noise.
        self._draws: dict[int, bool] = {}

    def explain(self, explanation: Explanation) -> None:
        """Adds the decisions of the graphs that ran to an explanation, once per explanation.

        The decisions were made when the graphs were made.
        """
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
        """Adds to ``ran`` the graphs between ``inputs`` and ``output`` that do not add themselves.

        These graphs have no quantizer and so draw no noise. Another wrapper may have made them.
        """
        if len(self._draws) != len(self.graphs):
            self._draws = {
                number: any(s and s.form and s.form.draws for s in list(saved.values()))
                for number, saved in list(self.graphs.items())}
        if not all(self._draws.values()):
            ran.update(node._forward_cls._aot_id for node in compiled_nodes(output, inputs))

    def live(self, output: Any, inputs: Any) -> Iterator[tuple[CompiledSite | None, list[Tensor]]]:
        """Yields sites and live tensors that compiled graphs keep between ``inputs`` and ``output``."""
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
    """Context in which new graphs call their hooks for all tensors but parameters and buffers."""
    return functorch_config.patch(saved_tensors_hooks_filtering_mode="no_static")


def _as_graph(function: Callable[[Any], Any]) -> GraphModule:
    graph = Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    module = GraphModule({}, graph)
    no_graph_of_its_own(module.forward, function)
    return module


def _packed(form: GraphForm, x: Tensor) -> tuple[tuple[Tensor, ...], list[Any]]:
    def quantize(
            x: Tensor, spec: BucketQuantSpec, channels: int | None = None,
            filled_row: int | None = None) -> tuple[Tensor, ...]:
        where = spec.to_text(), _graph_number(), next(_calls)
        ours = torch.ops.brevitas_bp
        if channels is None:
            encode = ours.encode_seeded if spec.decoding_draws else ours.encode
            return encode(x, *where, filled_row)
        encode = ours.encode_channels_seeded if spec.decoding_draws else ours.encode_channels
        return encode(x, *where, channels)

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
        saved.reach = reach_of(backward, node.name, parameters) or "weight"
        rectified: Rectified = None
        # Policies that ignore the reach treat all tensors alike.
        if saved.reach == "nonlinear" and is_rectified(node) and not isinstance(
                running.policy, PlainPolicy):
            reach = reach_of(backward, node.name, parameters, rectified=True)
            if reach != "nonlinear":
                saved.reach = reach or "weight"
                rectified = "values" if reach else "signs"
        grouping = Grouping() if isinstance(running.policy, PlainPolicy) else grouping_of(
            node, backward, x)
        if grouping.channels and saved.reach == "norm" and isinstance(x.numel(), int):
            saved.sharing = x.numel() // x.shape[1]
        saved.small_input = saved.reach == "weight" and is_small_input(node, inputs, backward)
        decision = running.policy.decide(saved)
        if rectified == "signs" and decision.codec is not None:
            decision = decision._replace(reason=_SIGNS)
        inductor = inductor_compiles()
        graph_tensor = GraphTensor.of(
            x, channels_last=inductor and _runs_channels_last(context["_fw_graph"], x),
            strict=not inductor,
            rectified=rectified, filled=decision.uses_hints and decision.reach != "all",
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
    """Whether Inductor will use channels_last for images: on a CPU, if the graph has a convolution.

    If tensors were encoded in the order in which they were traced, each would be transposed twice.
    """
    return x.device.type == "cpu" and torch.backends.mkldnn.enabled and any(
        node.target is torch.ops.aten.convolution.default for node in forward.nodes)


_SIGNS = "backward reads its sign alone: gradient exact"
_KEPT = Decision(None, "not an ordinary tensor")
_INTEGERS = Decision(None, "integers")
_NO_FORM = Decision(None, "its codec has no form for compiled graphs, or its elements share memory")
_PARAMETER = Decision(None, "computed from parameters and buffers alone")


def _codec_of(path: str, running: Any) -> Codec | None:
    """Returns the codec of a module, or one that suits all compiled modules that may share its graph.

    Dynamo makes one graph for modules of one class with equal sizes, whatever their names. If one of
    these modules is to be exact, all are.
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
    """Names the innermost module whose backward reads a node, relative to the root.

    If there are several, it takes one that is to be kept exact, if any.
    """
    readers = [n for n in backward.nodes if any(s.name == node.name for s in n.all_input_nodes)]
    found = [_innermost(reader, running.location) for reader in (*readers, node)]
    names = [name for name in found if name is not None]
    exact = (name for name in names if running.codec_of(name) is None)
    return next(exact, names[0] if names else running.location.module)


def _innermost(node: Node, location: Location) -> str | None:
    """Names the innermost module of a node, or of the forward node whose backward the node is."""
    for stack in ("fwd_nn_module_stack", "nn_module_stack"):
        for key in reversed(node.meta.get(stack) or {}):
            # Dynamo's keys are identities; the number of a call may follow.
            identity = str(key).partition("@")[0]
            if identity.isdecimal() and int(identity) in location.names:
                return location.names[int(identity)]
    return None


def _parameters_among(inputs: list[Node], parameters: ParameterSet) -> list[int]:
    """Returns the positions, among a graph's inputs, of parameters, buffers and their views."""
    key = f"{_META} parameters"
    if key not in inputs[0].meta:
        storages = _storages_of(parameters)
        inputs[0].meta[key] = sorted({
            *_static_inputs(),
            *(i for i, node in enumerate(inputs) if _storage(node.meta.get("val")) in storages)})
    return inputs[0].meta[key]


def _static_inputs() -> list[int]:
    """Returns the positions of the inputs that Dynamo knows to be parameters and buffers."""
    # Neither the hook's arguments nor a context has these positions: they are a variable of its caller.
    frame, inlining = inspect.currentframe(), inlining_code()
    while frame is not None and frame.f_code is not inlining:
        frame = frame.f_back
    return [] if frame is None else frame.f_locals["static_input_indices"]


def _storages_of(parameters: ParameterSet) -> set[int]:
    """Returns storages of fake tensors for parameters, or for views and casts made outside the graph."""
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
    """Returns AOTAutograd's number of the graph being made; the graph's autograd node has it too."""
    names, _, _ = aot_compilation_context()
    return int(names[0].partition("_")[0]) if names else -1


def _saved_by(backward: Graph) -> dict[str, CompiledSite | None]:
    """Returns the names of the tensors that a backward graph takes from the forward graph, in order."""
    return {
        node.name: None for node in backward.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor) and not is_tangent(node)}


def _hint(number: Any) -> int:
    """Returns a size; for a symbolic size, its current value."""
    return number if isinstance(number, int) else int(number.node.hint)


def compiled_nodes(output: Any, inputs: Any) -> Iterator[Any]:
    """Yields the autograd nodes of compiled graphs between ``inputs`` and ``output``."""
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
    """Returns the tensors in a structure of containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
