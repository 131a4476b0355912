"""``QuantBackwardWrapper``: the shell around mechanism and policy."""

import copy
import difflib
import fnmatch
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from brevitas_bp.allocators import hint
from brevitas_bp.backward.checkpointing import inside_checkpoint
from brevitas_bp.backward.compiled.dynamo import call_with, not_traced, set_callback
from brevitas_bp.backward.compiled.hooks import GraphHooks
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.hooks import ForwardPass, GraphListener, Listener, unpack
from brevitas_bp.backward.planned import HasChoices, PlannedPolicy, check_choices
from brevitas_bp.backward.policy import POLICIES, ExplainedPolicy, Policy, explained
from brevitas_bp.backward.ranks import noise_rank, replica_group
from brevitas_bp.backward.transparent import TABLES, Transparent
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.codec.configured import ConfiguredCodec
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format.random import SeedStream, derive
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic

Storage = Literal["save_quantized", "quantize_on_backward"]
#: A plan, or the choices that it holds.
Plan = Mapping[str, Any] | HasChoices

_WHERE = "brevitas_bp.QuantBackwardWrapper"
_UNUSED_HINT = (
    "brevitas_bp.QuantBackwardWrapper: the plan names {}, and no tensor that was quantized has such a "
    "name, so that it does nothing; print(plan) and explain() show the names that there are")
_GENERATOR_HINT = (
    "brevitas_bp.QuantBackwardWrapper: forward returned a generator or coroutine, which runs after the "
    "pass has ended, so that all it saves is exact; wrap the modules that it calls")
_CHECKPOINT_HINT = (
    f"{_WHERE}: this wrapper runs inside of torch.utils.checkpoint, which keeps only the inputs of the "
    "checkpointed part, exact, and runs it again in backward; the wrapper stores nothing here. Wrap "
    "around the checkpointed parts instead, with policy=OpAware(checkpoint_quant=...) to store their "
    "inputs in a few bits too")
_NOT_INLINED_HINT = (
    f"{_WHERE}: compiled graphs cannot store with these quantizers, and keep their tensors exact: {{}}. "
    "They can with the bucket quantizers of brevitas_bp.quant")
_created = itertools.count()


class QuantBackwardWrapper(Transparent):
    """Runs a module unchanged, and stores what autograd saves for its backward in a few bits.

    The forward pass, buffers, dropout masks and torch's random state are bit-identical to those of the
    unwrapped module; parameters and buffers are never quantized; ``state_dict`` is that of the module.
    Under ``torch.no_grad()`` nothing is packed, nor while a graph of the forward is traced
    (``torch.jit.trace``, ``torch.export``, ``make_fx``): the graph is that of the module. Attributes
    that the wrapper does not have are those of the module, read or set. A wrapper inside a wrapper
    applies to its own part.

    Args:
        module: the module to run.
        act_quant: any Brevitas activation quantizer: an injector class, a proxy, or None to keep
            every tensor exact.
        overrides: glob over qualified module names -> quantizer, None (exact), or the bits that
            ``act_quant`` has there; the first pattern that matches a module, or one around it, wins.
        policy: how each saved tensor is stored: "op_aware" (quantized where that leaves the gradient
            unbiased, exact elsewhere; :class:`~brevitas_bp.backward.OpAware` has settings), "all" (every
            float tensor but the statistics of norms), "all_but_relu" (of a ReLU's output the exact sign
            is stored, 1 bit), "exact" (all kept), or a callable ``SavedTensor -> Codec | None``.
        storage: "save_quantized" stores codes; "quantize_on_backward" keeps floats and quantizes when
            backward starts (for ablations; saves nothing).
        seed: of the private noise stream; None derives it from ``torch.initial_seed()`` and the number
            of wrappers created before. To be given where processes of one job seed torch differently.
        rank: processes with different ranks draw different noise; None takes the rank of
            ``torch.distributed``, and where parameters are DTensors of tensor parallelism that of the
            first process of the group. Processes that hold copies of the same activations need the same
            rank, or the gradients of their replicated parameters drift apart: with tensor parallelism of
            another kind pass the rank of the data-parallel dimension.
        plan: widths chosen tensor by tensor, from :func:`~brevitas_bp.allocate.plan_bit_widths`, or a
            mapping such as ``{"layer1.*:conv2d:*": 2, "fc:*": "exact"}``.
        verify: make a checksum of what is packed and compare it before it is decoded (a device is waited
            for then): every flipped bit of a payload raises
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
            act_quant: Any = ShiftedUint2DynamicActPerBucketFloatStochastic,
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
        _check_names(act_quant_overrides)
        self._base_policy = self._policy = _check_policy(policy)
        if not isinstance(module, nn.Module):
            kind = f"the class {module.__name__}" if inspect.isclass(module) else repr(module)
            raise TypeError(f"{_WHERE}: module must be a torch.nn.Module instance, got {kind}")
        if storage not in ("save_quantized", "quantize_on_backward"):
            raise UnknownNameError(
                f"{_WHERE}: storage must be 'save_quantized' or 'quantize_on_backward', got {storage!r}"
                f"{nearest(str(storage), ['save_quantized', 'quantize_on_backward'])}")
        for setting, number in (("seed", seed), ("rank", rank)):
            if not (number is None or isinstance(number, int)):
                raise TypeError(f"{_WHERE}: {setting} must be an integer or None, got {number!r}")
        self._storage = storage
        self._verify = verify
        self._act_quant = ConfiguredCodec(
            _build_codec("act_quant", act_quant, act_quant_overrides))
        self._overrides = _check_overrides(
            module, {} if overrides is None else overrides, self._codec)
        self._codec_by_module: dict[str, Codec | None] = {}
        self._noise: SeedStream | None = None if seed is None else SeedStream(seed)
        self._rank = rank
        self._replicas: tuple[int, ...] = ()
        self._index = next(_created)
        self._listeners: list[Listener] = []
        self._graph_listeners: list[GraphListener] = []
        self._explanation: Explanation | None = None
        self._graph_hooks: GraphHooks | None = None
        self._stand_for(module)
        self.use_plan(plan)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module; what autograd saves meanwhile is stored as configured."""
        if not torch.is_grad_enabled() or _is_traced():
            return self.module(*args, **kwargs)
        _refuse_symbols(args, kwargs)
        return _run(self, args, kwargs)

    def explain(self) -> Explanation:
        """What was decided in the last forward pass for each call site, and why; ``print`` it.

        Raises:
            RuntimeError: no forward pass with gradients has run yet.
        """
        if self._explanation is None:
            raise RuntimeError(
                f"{_WHERE}.explain: decisions are made while the module runs, and it has not run with "
                "gradients enabled yet; run one forward pass first")
        if self._graph_hooks is not None:
            self._graph_hooks.explain(self._explanation)
        return self._explanation

    def use_plan(self, plan: "Plan | None") -> None:
        """Stores tensors from now on as a plan says; None goes back to the policy alone.

        Raises:
            UnknownNameError: the plan names a module that the network does not have.
            ValueError: it names a width that there is not.
        """
        self._graph_hooks = None
        if plan is None:
            self._policy = self._base_policy
            return
        choices = getattr(plan, "choices", plan)
        if not isinstance(choices, Mapping):
            raise TypeError(
                f"{_WHERE}: plan must come from plan_bit_widths, or map names of saved tensors to bits, "
                f"got {plan!r}")
        check_choices(_WHERE, choices, [name for name, _ in self.module.named_modules()])
        codecs = (self._codec, *(codec for _, codec in self._overrides))
        if not any(codec is not None and codec.bit_widths for codec in codecs):
            raise TypeError(
                f"{_WHERE}: a plan chooses widths of bucket quantizers, but act_quant is "
                f"{'None' if self._codec is None else self._codec.name!r}; pass one of "
                "brevitas_bp.quant")
        self._policy = PlannedPolicy(explained(self._base_policy), choices)

    def noise_state(self) -> dict[str, int]:
        """State of the private noise stream, for a checkpoint that resumes bit for bit.

        It is the same in every process of a job whose processes have equal seeds and store equally many
        tensors, so that one saves it for all, and a job of another size may load it.
        """
        return self._stream().state()

    def set_noise_state(self, state: dict[str, int]) -> None:
        """Continues the noise stream from :meth:`noise_state`."""
        self._stream().set_state(state)

    def configure(self, **settings: Any) -> None:
        """Changes settings of ``act_quant`` from the next forward pass on; ``overrides`` stay.

        What is not named is as the constructor was told. What is stored already decodes as it was
        encoded. A quantizer that keeps statistics begins anew.

        Raises:
            TypeError: there is no quantizer, or it was built before it was handed over.
            UnknownNameError: a setting that the quantizer does not know.
        """
        if "bit_width" in settings and self._policy is not self._base_policy:
            raise TypeError(
                f"{_WHERE}.configure: a plan says the bit widths, so "
                f"bit_width={settings['bit_width']!r} would do nothing; leave it out, or call "
                "use_plan(None) first")
        self._act_quant.configure(settings)
        self._codec_by_module.clear()
        self._graph_hooks = None

    def quantizer_modules(self) -> Iterator[nn.Module]:
        """The quantizers in use. They are not submodules: they add no parameters and no keys."""
        for codec in (self._codec, *(codec for _, codec in self._overrides)):
            if codec is not None:
                yield from codec.quantizers()

    @property
    def _codec(self) -> Codec | None:
        return self._act_quant.codec

    def _forward_pass(self, compiled: bool) -> ForwardPass:
        self._explanation = Explanation()
        next_seed = partial(self._stream().next, self._noise_rank())
        return ForwardPass(
            self.module, self._configured, self._policy, next_seed,
            on_backward=self._storage == "quantize_on_backward", listeners=tuple(self._listeners),
            explanation=self._explanation, verify=self._verify, graph_hooks=self._graph_hooks_for,
            compiled=compiled)

    def _graph_hooks_for(self) -> GraphHooks | None:
        """The hooks for compiled modules; None where no graph can do what is asked for."""
        if self._verify or self._storage != "save_quantized":
            return None
        if self._graph_hooks is None:
            self._warn_of_codecs()
            self._graph_hooks = GraphHooks(unpack)
        return self._graph_hooks

    def _warn_of_codecs(self) -> None:
        """Names the quantizers whose tensors compiled graphs keep exact."""
        codecs = (self._codec, *(codec for _, codec in self._overrides))
        names = {c.name for c in codecs if c is not None and not c.in_graphs}
        if names:
            warnings.warn(_NOT_INLINED_HINT.format(", ".join(sorted(names))), stacklevel=2)

    def _warn_of_plan(self) -> None:
        """Names what a plan says of tensors that the network does not save."""
        if isinstance(self._policy, PlannedPolicy) and not self._graph_hooks and (
                unused := self._policy.unused()):
            warnings.warn(_UNUSED_HINT.format(", ".join(map(repr, unused[:3]))), stacklevel=5)

    def _noise_rank(self) -> int:
        if self._rank is not None:
            return self._rank
        # Remembered: what FSDP has gathered already does not show its group any more.
        self._replicas = replica_group(self.module) or self._replicas
        return noise_rank(self._replicas)

    def _configured(self, name: str) -> Codec | None:
        """The codec of a module: the first override that matches it or a module around it."""
        if name not in self._codec_by_module:
            matching = (c for pattern, c in self._overrides if _selects(pattern, name))
            self._codec_by_module[name] = next(matching, self._codec)
        return self._codec_by_module[name]

    def _stream(self) -> SeedStream:
        if self._noise is None:
            # Two wrappers must not share their noise.
            self._noise = SeedStream(derive(torch.initial_seed(), self._index))
        return self._noise

    def __getstate__(self) -> dict[str, Any]:
        # What listens to this wrapper does not listen to its copies and pickles.
        return {**self.__dict__, "_listeners": [], "_graph_listeners": [], "_graph_hooks": None}

    def _replicate_for_data_parallel(self) -> "QuantBackwardWrapper":
        other = super()._replicate_for_data_parallel()
        # Replicas run at the same time, each with noise of its own.
        other._noise = SeedStream(derive(self._stream().next(self._noise_rank()), 0))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantBackwardWrapper":
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        state = self.__getstate__()
        for key in self.__dict__.keys() - set(TABLES):
            other.__dict__[key] = copy.deepcopy(state[key], memo)
        other._stand_for(other.module)
        # A copy draws noise of its own.
        other._index = next(_created)
        if other._noise is not None:
            other._noise = SeedStream(derive(other._noise.state()["base"], other._index))
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
            for listener in wrapper._graph_listeners:
                for site, tensors in forward_pass.graphs(output, (args, kwargs)):
                    listener(site, tensors)
            if inspect.isgenerator(output) or inspect.isasyncgen(output) or inspect.iscoroutine(output):
                warnings.warn(_GENERATOR_HINT, stacklevel=4)
            return output
        finally:
            # Once more: an interrupt may have cut short the end of the block.
            forward_pass.close()
    finally:
        set_callback(callback)


def wrappers_in(model: nn.Module) -> Iterator[tuple[str, QuantBackwardWrapper]]:
    """Qualified name and wrapper, of all in a model; one around another has its name and ``.module``."""
    for name, module in model.named_modules():
        while isinstance(module, QuantBackwardWrapper):
            yield name, module
            name, module = f"{name}.module".lstrip("."), module.module


def _is_traced() -> bool:
    """Whether calls are being recorded into a graph of the forward, which has no place for hooks.

    Recorded they would be dead code, or noise that is the same at every call.
    """
    tracing: bool = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or (not is_compiling() and get_proxy_mode() is not None)


def _refuse_symbols(args: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(args, Proxy) or any(isinstance(a, Proxy) for a in (*args, *kwargs.values())):
        raise TypeError(
            f"{_WHERE}.forward: torch.fx traces through the wrapper, and its graph would store floats; "
            "trace wrapper.module and wrap the result, QuantBackwardWrapper(symbolic_trace(module)), or "
            "give your Tracer an is_leaf_module that is true for QuantBackwardWrapper")


def _build_codec(where: str, quantizer: Any, overrides: dict[str, Any]) -> Codec | None:
    if quantizer is None:
        if overrides:
            raise TypeError(
                f"{_WHERE}: {where}=None keeps tensors exact, so the settings {sorted(overrides)} would "
                "do nothing; remove them or pass a quantizer")
        return None
    if not isinstance(quantizer, Codec):
        return codec_from(quantizer, **overrides)
    if overrides:
        raise TypeError(
            f"{_WHERE}: {where} is a codec, which is built already, so the settings "
            f"{sorted(overrides)} would do nothing; pass the quantizer's config class instead")
    return quantizer


def _check_names(settings: Iterable[str]) -> None:
    """Names a misspelt argument of the wrapper, before it is taken for a setting of the quantizer."""
    own = [name for name in inspect.signature(QuantBackwardWrapper).parameters if "quant_" not in name]
    for name in settings:
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if close:
            raise UnknownNameError(
                f"{_WHERE}: there is no argument {name!r}; did you mean {close[0]!r}?")


def _check_policy(policy: str | Policy) -> Policy:
    if inspect.isclass(policy):
        name = getattr(policy, "__name__", "")
        raise TypeError(f"{_WHERE}: policy got the class {name}; make one of it, policy={name}()")
    if callable(policy) or isinstance(policy, ExplainedPolicy):
        return policy
    if policy not in POLICIES:
        raise UnknownNameError(
            f"{_WHERE}: policy must be one of {sorted(POLICIES)} or a callable, got {policy!r}"
            f"{nearest(str(policy), POLICIES)}")
    return POLICIES[policy]


def _check_overrides(
        module: nn.Module, overrides: Mapping[str, Any],
        configured: Codec | None) -> list[tuple[str, Codec | None]]:
    if not isinstance(overrides, Mapping) or not all(isinstance(p, str) for p in overrides):
        raise TypeError(
            f"{_WHERE}: overrides must map globs over module names to quantizers or None, for "
            f"instance {{'features.0.*': None}}, got {overrides!r}")
    names = [name for name, _ in module.named_modules() if name]
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError(
                f"{_WHERE}: the pattern {pattern!r} in overrides matches no module of "
                f"{type(module).__name__}{nearest(pattern, names)}")
    # What the root saves itself has its empty name.
    _refuse_shadowed(list(overrides), ["", *names])
    return [
        (pattern, _override(f"overrides[{pattern!r}]", quantizer, configured))
        for pattern, quantizer in overrides.items()]


def _refuse_shadowed(patterns: list[str], names: list[str]) -> None:
    """Refuses a pattern that would do nothing, because those before it match all that it does."""
    for i, pattern in enumerate(patterns):
        selected = [name for name in names if _selects(pattern, name)]
        if all(any(_selects(before, name) for before in patterns[:i]) for name in selected):
            before = next(b for b in patterns[:i] if _selects(b, selected[0]))
            raise ValueError(
                f"{_WHERE}: the pattern {pattern!r} in overrides would do nothing, because the first "
                f"that matches counts, and {before!r} stands before it; put it before {before!r}")


def _override(where: str, given: Any, configured: Codec | None) -> Codec | None:
    """The codec of an override: a quantizer, None, or a width of the configured one."""
    if not isinstance(given, (int, float, str)):
        return _build_codec(where, given, {})
    if configured is None:
        raise TypeError(
            f"{_WHERE}: {where}={given!r} is a width of act_quant, which is None; pass a quantizer")
    return Candidate.parse(given).codec(configured)


def _selects(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module or one that contains it."""
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
