"""``QuantBackwardWrapper``: the shell around the forward pass and the policy."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from brevitas_bp.allocators import hint
from brevitas_bp.backward.arguments import (
    WHERE,
    Plan,
    Storage,
    build_codec,
    check_module,
    check_names,
    check_number,
    check_overrides,
    check_policy,
    check_storage,
    check_widths,
    choices_of,
    selects,
)
from brevitas_bp.backward.checkpointing import inside_checkpoint
from brevitas_bp.backward.compiled.dynamo import call_with, not_traced, set_callback
from brevitas_bp.backward.compiled.hooks import GraphHooks
from brevitas_bp.backward.compiled.shared import crowded_out, hooks_of
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.hooks import ForwardPass, GraphListener, Listener, unpack
from brevitas_bp.backward.location import Location
from brevitas_bp.backward.noise import Noise
from brevitas_bp.backward.planned import PlannedPolicy
from brevitas_bp.backward.policy import Policy, explained
from brevitas_bp.backward.transparent import TABLES, Transparent
from brevitas_bp.codec import ActQuant, Codec
from brevitas_bp.codec.configured import ConfiguredCodec
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat

_UNUSED_HINT = (
    "brevitas_bp.QuantBackwardWrapper: the plan names {}, and no tensor that was quantized has such a "
    "name, so this entry does nothing; print(plan) and explain() show the names that exist")
_GENERATOR_HINT = (
    "brevitas_bp.QuantBackwardWrapper: forward returned a generator or coroutine, which runs after the "
    "pass has ended, so all tensors that it saves are exact; wrap the modules that it calls")
_CHECKPOINT_HINT = (
    f"{WHERE}: this wrapper runs inside of torch.utils.checkpoint, which keeps only the inputs of the "
    "checkpointed part, exact, and runs it again in backward; the wrapper stores nothing here. Wrap "
    "around the checkpointed parts instead, with policy=OpAware(checkpoint_quant=...) to store their "
    "inputs in a few bits too")
_NOT_INLINED_HINT = (
    f"{WHERE}: compiled graphs cannot store with these quantizers, and keep their tensors exact: {{}}. "
    "They can with the bucket quantizers of brevitas_bp.quant")
_CROWDED_HINT = (
    f"{WHERE}: {{}} runs without compilation. Wrappers with equal settings share compiled graphs; other "
    "wrappers have their own graphs, and Dynamo makes at most torch._dynamo.config.recompile_limit of "
    "them for one function. Raise that limit before the first step, or compile and wrap the whole "
    "network, QuantBackwardWrapper(torch.compile(network), overrides=...)")


class QuantBackwardWrapper(Transparent):
    """Runs a module unchanged, and stores the tensors that autograd saves for backward in a few bits.

    The forward pass, buffers, dropout masks and torch's random state are bit-identical to those of the
    unwrapped module. Parameters and buffers are never quantized. ``state_dict`` is that of the module.
    Nothing is packed under ``torch.no_grad()``, or while a graph of the forward is traced
    (``torch.jit.trace``, ``torch.export``, ``make_fx``): the graph is that of the module. Attributes
    that the wrapper does not have are read from the module, and set on it. A wrapper inside a wrapper
    applies to its own part.

    Args:
        module: the module to run.
        act_quant: any Brevitas activation quantizer: an injector class, a proxy, or None to keep
            every tensor exact. The default stores 2 bits in rotated codes, see docs/rotated.md.
        overrides: glob over qualified module names -> quantizer, None (exact), or the bits that
            ``act_quant`` has there; the first pattern that matches a module, or one around it, wins.
        policy: how each saved tensor is stored. A callable ``SavedTensor -> Codec | None``, or one of

            * "op_aware": quantized where that leaves the gradient unbiased, exact elsewhere;
              :class:`~brevitas_bp.backward.OpAware` has settings;
            * "all": every float tensor is quantized, except the statistics of norms;
            * "all_but_relu": like "all", but of a ReLU's output the exact sign is stored, in 1 bit;
            * "exact": all tensors are kept.
        storage: "save_quantized" stores codes; "quantize_on_backward" keeps floats and quantizes when
            backward starts (for ablations; saves nothing).
        seed: seed of the private noise stream; None derives it from ``torch.initial_seed()`` and the
            number of wrappers created before. Pass it if processes of one job seed torch differently.
        rank: processes with different ranks draw different noise. None takes the rank of
            ``torch.distributed``; if parameters are DTensors of tensor parallelism, it takes the rank of
            the group's first process. Processes that hold copies of the same activations need the same
            rank, or the gradients of their replicated parameters drift apart. So with tensor parallelism
            of another kind, pass the rank of the data-parallel dimension.
        plan: widths chosen tensor by tensor, from :func:`~brevitas_bp.allocate.plan_bit_widths`, or a
            mapping such as ``{"layer1.*:conv2d:*": 2, "fc:*": "exact"}``.
        verify: make a checksum of each packed tensor, and compare it before decoding, which waits for
            the device. Every flipped bit of a payload raises
            :class:`~brevitas_bp.CorruptPayloadError`. Tensors kept as they are, and shards of
            DTensors, have no checksum.
        **act_quant_overrides: settings of ``act_quant``, as keywords of a Brevitas layer.

    Raises:
        TypeError: ``module`` is not a module, or an argument has the wrong kind.
        UnknownNameError: a keyword that the quantizer does not know, a pattern that matches no module,
            or an unknown policy.
        UnsupportedQuantizerError: the quantizer has no codes to store.

    Example:
        >>> from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloatStochastic
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> model = QuantBackwardWrapper(
        ...     net, ShiftedUint4DynamicActPerBucketFloatStochastic, bucket_size=64)
        >>> x = torch.randn(128, 64)
        >>> bool((model(x) == net(x)).all())
        True
        >>> model(x).sum().backward()
    """

    def __init__(
            self,
            module: nn.Module,
            act_quant: ActQuant | None = RotatedNormal2DynamicActPerBucketFloat,
            *,
            overrides: Mapping[str, Any] | None = None,
            policy: str | Policy = "op_aware",
            storage: Storage = "save_quantized",
            seed: int | None = None,
            rank: int | None = None,
            plan: Plan | None = None,
            verify: bool = False,
            **act_quant_overrides: Any) -> None:
        super().__init__()
        check_names(act_quant_overrides, inspect.signature(QuantBackwardWrapper).parameters)
        self._base_policy = self._policy = check_policy(policy)
        check_module(module)
        self._storage: Storage = check_storage(storage)
        check_number("seed", seed)
        check_number("rank", rank)
        self._verify = verify
        self._act_quant = ConfiguredCodec(
            build_codec("act_quant", act_quant, act_quant_overrides))
        self._overrides = check_overrides(
            module, {} if overrides is None else overrides, self._codec)
        self._codec_by_module: dict[str, Codec | None] = {}
        self._noise = Noise(seed, rank)
        self._listeners: list[Listener] = []
        self._graph_listeners: list[GraphListener] = []
        self._explanation: Explanation | None = None
        self._graph_hooks: GraphHooks | None = None
        self._stand_for(module)
        self.use_plan(plan)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module; tensors that autograd saves meanwhile are stored as configured."""
        if not torch.is_grad_enabled() or _is_traced():
            return self.module(*args, **kwargs)
        _refuse_symbols(args, kwargs)
        return _run(self, args, kwargs)

    def explain(self) -> Explanation:
        """Reports what the last forward pass decided for each site, and why; ``print`` the report.

        Raises:
            RuntimeError: no forward pass with gradients has run yet.
        """
        if self._explanation is None:
            raise RuntimeError(
                f"{WHERE}.explain: decisions are made while the module runs, and it has not run with "
                "gradients enabled yet; run one forward pass first")
        if self._graph_hooks is not None:
            self._graph_hooks.explain(self._explanation)
        return self._explanation

    def use_plan(self, plan: Plan | None) -> None:
        """Stores tensors from now on as a plan says; None goes back to the policy alone.

        Raises:
            UnknownNameError: the plan names a module that the network does not have.
            ValueError: the plan names an unsupported width.
        """
        self._graph_hooks = None
        if plan is None:
            self._policy = self._base_policy
            return
        choices = choices_of(plan, self.module)
        codecs = (self._codec, *(codec for _, codec in self._overrides))
        if not any(codec is not None and codec.bit_widths for codec in codecs):
            raise TypeError(
                f"{WHERE}: a plan chooses widths of bucket quantizers, but act_quant is "
                f"{'None' if self._codec is None else self._codec.name!r}; pass one of "
                "brevitas_bp.quant")
        check_widths(choices, [codec for codec in codecs if codec is not None and codec.bit_widths])
        self._policy = PlannedPolicy(explained(self._base_policy), choices)

    def noise_state(self) -> dict[str, int]:
        """Returns the state of the private noise stream, for a checkpoint that resumes bit for bit.

        The state is the same in every process of a job if the processes have equal seeds and store
        equally many tensors. So one process saves it for all, and a job of another size may load it.
        """
        return self._noise.stream.state()

    def set_noise_state(self, state: dict[str, int]) -> None:
        """Continues the noise stream from :meth:`noise_state`."""
        self._noise.stream.set_state(state)

    def configure(self, **settings: Any) -> None:
        """Changes settings of ``act_quant`` from the next forward pass on; ``overrides`` stay.

        Settings you do not pass revert to the constructor's values. Tensors that are stored already
        decode as they were encoded. A quantizer that keeps statistics begins anew.

        Raises:
            TypeError: there is no quantizer, or it was already built when it was passed.
            UnknownNameError: the quantizer does not know a setting.
        """
        if "bit_width" in settings and self._policy is not self._base_policy:
            raise TypeError(
                f"{WHERE}.configure: a plan says the bit widths, so "
                f"bit_width={settings['bit_width']!r} would do nothing; leave it out, or call "
                "use_plan(None) first")
        self._act_quant.configure(settings)
        self._codec_by_module.clear()
        self._graph_hooks = None

    def quantizer_modules(self) -> Iterator[nn.Module]:
        """Yields the quantizers in use. They are not submodules: they add no parameters and no keys."""
        for codec in (self._codec, *(codec for _, codec in self._overrides)):
            if codec is not None:
                yield from codec.quantizers()

    @property
    def _codec(self) -> Codec | None:
        return self._act_quant.codec

    def _forward_pass(self, compiled: bool) -> ForwardPass:
        self._explanation = Explanation()
        return ForwardPass(
            self.module, self._configured, self._policy, self._noise.seeds(self.module),
            on_backward=self._storage == "quantize_on_backward", listeners=tuple(self._listeners),
            explanation=self._explanation, verify=self._verify, graph_hooks=self._graph_hooks_for,
            compiled=compiled)

    def _graph_hooks_for(self, location: Location) -> GraphHooks | None:
        """Returns the hooks for compiled modules; None if graphs cannot store as configured."""
        if self._verify or self._storage != "save_quantized":
            return None
        if self._graph_hooks is None:
            self._warn_of_codecs()
            self._graph_hooks = hooks_of(self._codec, self._overrides, self._policy, location, unpack)
        return self._graph_hooks

    def _warn_of_codecs(self) -> None:
        """Warns of quantizers whose tensors compiled graphs keep exact."""
        codecs = (self._codec, *(codec for _, codec in self._overrides))
        names = {c.name for c in codecs if c is not None and not c.in_graphs}
        if names:
            warnings.warn(_NOT_INLINED_HINT.format(", ".join(sorted(names))), stacklevel=2)

    def _warn_of_plan(self) -> None:
        """Warns of names in a plan that no saved tensor of the network has."""
        if isinstance(self._policy, PlannedPolicy) and not self._graph_hooks and (
                unused := self._policy.unused()):
            warnings.warn(_UNUSED_HINT.format(", ".join(map(repr, unused[:3]))), stacklevel=5)

    def _configured(self, name: str) -> Codec | None:
        """Returns the codec of a module: the first override that matches it or a module around it."""
        if name not in self._codec_by_module:
            matching = (c for pattern, c in self._overrides if selects(pattern, name))
            self._codec_by_module[name] = next(matching, self._codec)
        return self._codec_by_module[name]

    def __getstate__(self) -> dict[str, Any]:
        # Listeners of this wrapper do not listen to its copies and pickles.
        return {
            **self.__dict__, "_listeners": [], "_graph_listeners": [], "_graph_hooks": None,
            "_noise": copy.copy(self._noise)}

    def _replicate_for_data_parallel(self) -> "QuantBackwardWrapper":
        other = super()._replicate_for_data_parallel()
        other._noise = self._noise.of_replica(self.module)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantBackwardWrapper":
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        state = self.__getstate__()
        for key in self.__dict__.keys() - {*TABLES, "_noise"}:
            other.__dict__[key] = copy.deepcopy(state[key], memo)
        # Copy the noise after the wrappers inside the module: the loop above runs over a set, whose
        # order differs from process to process.
        other.__dict__["_noise"] = copy.deepcopy(self._noise, memo)
        other._stand_for(other.module)
        return other

    def extra_repr(self) -> str:
        codec = "exact" if self._codec is None else self._codec.name
        return f"{type(self.module).__name__}, {codec}, storage={self._storage!r}"


@not_traced
def _run(wrapper: QuantBackwardWrapper, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs the module of a wrapper with hooks. See NOTE [ A compiled wrapper ]."""
    callback = set_callback(None)
    try:
        if inside_checkpoint():
            warnings.warn(_CHECKPOINT_HINT, stacklevel=4)
            return call_with(callback, wrapper.module, args, kwargs)
        forward_pass = wrapper._forward_pass(callable(callback))
        try:
            with forward_pass:
                output = call_with(callback, wrapper.module, args, kwargs)
            hint(forward_pass.given_bytes)
            wrapper._warn_of_plan()
            if (inlined := forward_pass.graph_hooks) is not None:
                location = forward_pass.location
                inlined.note_silent(output, (args, kwargs), location.graphs)
                kinds = type(wrapper.module), *location.compiled_parts.values()
                if not inlined.graphs and (kind := crowded_out(kinds)):
                    warnings.warn(_CROWDED_HINT.format(kind), stacklevel=4)
            for listener in wrapper._graph_listeners:
                for site, tensors in forward_pass.graphs(output, (args, kwargs)):
                    listener(site, tensors)
            if inspect.isgenerator(output) or inspect.isasyncgen(output) or inspect.iscoroutine(output):
                warnings.warn(_GENERATOR_HINT, stacklevel=4)
            return output
        finally:
            # Close once more: an interrupt may have cut short the end of the block.
            forward_pass.close()
    finally:
        set_callback(callback)


def _is_traced() -> bool:
    """Whether calls are being recorded into a graph of the forward, which has no place for hooks.

    If the hooks were recorded, they would be dead code, or noise that is the same at every call.
    """
    tracing: bool = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or (not is_compiling() and get_proxy_mode() is not None)


def _refuse_symbols(args: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(args, Proxy) or any(isinstance(a, Proxy) for a in (*args, *kwargs.values())):
        raise TypeError(
            f"{WHERE}.forward: torch.fx traces through the wrapper, and its graph would store floats; "
            "trace wrapper.module and wrap the result, QuantBackwardWrapper(symbolic_trace(module)), or "
            "give your Tracer an is_leaf_module that is true for QuantBackwardWrapper")
