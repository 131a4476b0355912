"""``QuantBackwardWrapper``: the shell around mechanism and policy."""

import copy
import fnmatch
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from brevitas_bp.backward.checkpointing import inside_checkpoint
from brevitas_bp.backward.configure import ConfiguredCodec
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.hooks import ForwardPass, Listener
from brevitas_bp.backward.policy import POLICIES, Policy
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.stock import StatefulCodec
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.kernels.random import SeedStream, derive
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic

Storage = Literal["save_quantized", "quantize_on_backward"]
_WHERE = "brevitas_bp.QuantBackwardWrapper"
_CHECKPOINT_HINT = (
    f"{_WHERE}: this wrapper runs inside of torch.utils.checkpoint, which keeps only the inputs of the "
    "checkpointed part, exact, and runs it again in backward; the wrapper stores nothing here. Wrap "
    "around the checkpointed parts instead, with policy=OpAware(checkpoint_quant=...) to store their "
    "inputs in a few bits too")
_created = itertools.count()


class QuantBackwardWrapper(nn.Module):
    """Runs a module unchanged, and stores what autograd saves for its backward in a few bits.

    The forward pass, buffers, dropout masks and torch's random state are bit-identical to those of the
    unwrapped module; parameters and buffers are never quantized; ``state_dict`` is that of the module.
    Under ``torch.no_grad()`` nothing is packed. Attributes that the wrapper does not have are those of
    the module. A wrapper inside a wrapper applies to its own part.

    Args:
        module: the module to run.
        act_quant: any Brevitas activation quantizer: an injector class, a proxy, or None to keep
            every tensor exact.
        overrides: glob over qualified module names -> quantizer or None (exact); the first pattern
            that matches a module or one that contains it wins.
        policy: how each saved tensor is stored: "op_aware" (quantized where that leaves the gradient
            unbiased, exact elsewhere; :class:`~brevitas_bp.backward.OpAware` has settings), "all" (every
            float tensor but the statistics of norms), "all_but_relu" (of a ReLU's output the exact sign
            is stored, 1 bit), "exact" (all kept), or a callable ``SavedTensor -> Codec | None``.
        storage: "save_quantized" stores codes; "quantize_on_backward" keeps floats and quantizes when
            backward starts (for ablations; saves nothing).
        seed: of the private noise stream; None derives it from ``torch.initial_seed()`` and the number
            of wrappers created before.
        rank: processes with different ranks draw different noise; None takes the rank of
            ``torch.distributed``. Processes that hold copies of the same activations, as in tensor
            parallelism, need the same rank (that of the data-parallel dimension), or the gradients of
            their replicated parameters drift apart.
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
            **act_quant_overrides: Any) -> None:
        super().__init__()
        self._policy = _check_policy(policy)
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
        self._act_quant = ConfiguredCodec(
            _build_codec("act_quant", act_quant, act_quant_overrides))
        self._overrides = _check_overrides(module, {} if overrides is None else overrides)
        self._codec_by_module: dict[str, Codec | None] = {}
        self._noise: SeedStream | None = None if seed is None else SeedStream(seed)
        self._rank = rank
        self._index = next(_created)
        self._listeners: list[Listener] = []
        self._explanation: Explanation | None = None
        self.module = module
        self.register_load_state_dict_post_hook(_name_keys_as_given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module; what autograd saves meanwhile is stored as configured."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if inside_checkpoint():
            warnings.warn(_CHECKPOINT_HINT, stacklevel=2)
            return self.module(*args, **kwargs)
        with self._forward_pass():
            return self.module(*args, **kwargs)

    def explain(self) -> Explanation:
        """What was decided in the last forward pass for each call site, and why; ``print`` it.

        Raises:
            RuntimeError: no forward pass with gradients has run yet.
        """
        if self._explanation is None:
            raise RuntimeError(
                f"{_WHERE}.explain: decisions are made while the module runs, and it has not run with "
                "gradients enabled yet; run one forward pass first")
        return self._explanation

    def noise_state(self) -> dict[str, int]:
        """State of the private noise stream, for a checkpoint that resumes bit for bit.

        It is the same in every process of a job, so that one saves it for all, and a job of another size
        may load it.
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
        self._act_quant.configure(settings)
        self._codec_by_module.clear()

    def quantizer_modules(self) -> Iterator[nn.Module]:
        """The quantizers in use. They are not submodules: they add no parameters and no keys."""
        codecs = [self._codec, *(codec for _, codec in self._overrides)]
        for codec in codecs:
            slots = codec.slots.values() if isinstance(codec, StatefulCodec) else [codec]
            for slot in slots:
                quantizer = getattr(slot, "quantizer", None)
                if isinstance(quantizer, nn.Module):
                    yield quantizer

    @property
    def _codec(self) -> Codec | None:
        return self._act_quant.codec

    def _forward_pass(self) -> ForwardPass:
        self._explanation = Explanation()
        rank = _distributed_rank() if self._rank is None else self._rank
        return ForwardPass(
            self.module, self._configured, self._policy, partial(self._stream().next, rank),
            on_backward=self._storage == "quantize_on_backward", listeners=tuple(self._listeners),
            explanation=self._explanation)

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

    # The wrapper is transparent: keys and attributes are those of the module.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``state_dict``: same keys, wrapped or not."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a ``state_dict`` of the module, wrapped or not."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def apply(self, fn: Callable[[nn.Module], Any]) -> "QuantBackwardWrapper":
        """Applies ``fn`` to the modules that it would see without the wrapper."""
        self.module.apply(fn)
        return self

    def _load_from_state_dict(
            self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        # Reached when a parent module loads: its keys do not name the wrapper.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}module.{key[len(prefix):]}"] = state_dict.pop(key)
        messages = missing_keys, unexpected_keys, error_msgs
        self._loading = prefix, [(list_, len(list_)) for list_ in messages]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *messages)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantBackwardWrapper":
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        for key, value in self.__dict__.items():
            other.__dict__[key] = [] if key == "_listeners" else copy.deepcopy(value, memo)
        # A copy draws noise of its own.
        other._index = next(_created)
        if other._noise is not None:
            other._noise = SeedStream(derive(other._noise.state()["base"], other._index))
        return other

    def extra_repr(self) -> str:
        codec = "exact" if self._codec is None else self._codec.name
        return f"{codec}, storage={self._storage!r}"


def _name_keys_as_given(wrapper: QuantBackwardWrapper, incompatible: Any) -> None:
    """Takes the wrapper's own name out of what a parent's ``load_state_dict`` reports."""
    prefix, messages = wrapper.__dict__.pop("_loading")
    for list_, start in messages:
        list_[start:] = [text.replace(f"{prefix}module.", prefix, 1) for text in list_[start:]]


def _distributed_rank() -> int:
    """Asked at every forward pass: the wrapper may be older than the process group."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


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


def _check_policy(policy: str | Policy) -> Policy:
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise UnknownNameError(
            f"{_WHERE}: policy must be one of {sorted(POLICIES)} or a callable, got {policy!r}"
            f"{nearest(str(policy), POLICIES)}")
    return POLICIES[policy]


def _check_overrides(
        module: nn.Module, overrides: Mapping[str, Any]) -> list[tuple[str, Codec | None]]:
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
    return [(pattern, _build_codec(f"overrides[{pattern!r}]", quantizer, {}))
            for pattern, quantizer in overrides.items()]


def _selects(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module or one that contains it."""
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
