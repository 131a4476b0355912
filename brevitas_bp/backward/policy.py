"""The policies: they decide from the facts about a saved tensor how it is stored."""

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from brevitas_bp.backward import logits, torch_rules  # noqa: F401  (fills the registry)
from brevitas_bp.backward.attention import FLOAT_MASK, QUERY, VALUE, ReplayAttention
from brevitas_bp.backward.fixed_policies import keep_all, quantize_all, quantize_all_but_relu
from brevitas_bp.backward.operations import FEW_IN_STATISTIC, norm_bits
from brevitas_bp.backward.registry import rule_of
from brevitas_bp.backward.rewrites import Rewrite, SaveDerivative
from brevitas_bp.backward.rows import INPUT_BITS, RowsOf, of_elements
from brevitas_bp.backward.saved import (
    ATTENTION_INPUT,
    ATTENTION_MASK,
    ATTENTION_VALUE,
    CHECKPOINT_INPUT,
    DERIVATIVE,
    FEW_BIT_INPUT,
    NO_CALL,
    RECOMPUTED,
    SIGN,
    Call,
    Decision,
    SavedTensor,
)
from brevitas_bp.backward.tables import few_bit_codec, with_table
from brevitas_bp.codec import BitMask, Codec, Copy, codec_from
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.regions import sign
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.backward.OpAware"

_BIT_MASK = BitMask()
_COPY = Copy()

@runtime_checkable
class ExplainedPolicy(Protocol):
    """A policy that gives reasons and may rewrite operations."""

    def decide(self, saved: SavedTensor) -> Decision:
        """Returns codec and reason for a saved tensor."""
        ...

    def rewrite(self, function: Any) -> Rewrite | None:
        """Returns how to run a function so that it saves something else, or None."""
        ...


@runtime_checkable
class ObservingPolicy(ExplainedPolicy, Protocol):
    """A policy that sees the output of each operation."""

    def observe(self, call: Call, output: Any) -> None:
        """Called after each operation, rewritten or not."""
        ...


Policy = Callable[[SavedTensor], Codec | None] | ExplainedPolicy


class _Asking(threading.local):
    """Whether a user's policy that is no :class:`ExplainedPolicy` is being asked in this thread."""

    plain = False


_asking = _Asking()
_ASKED_HINT = (
    "brevitas_bp: a policy that calls OpAware()(saved) gets the codecs of OpAware, but not its "
    "rewritten operations (derivatives of activations, attention), so it stores several times more; "
    "derive a class from OpAware and override decide(saved)")


class PlainPolicy:
    """Turns any policy into one that gives reasons: the reason is the policy's name."""

    def __init__(self, policy: Callable[[SavedTensor], Codec | None]) -> None:
        self.policy = policy
        self.reason = f"policy {getattr(policy, '__name__', type(policy).__name__)}"

    def decide(self, saved: SavedTensor) -> Decision:
        _asking.plain = True
        try:
            codec = self.policy(saved)
        finally:
            _asking.plain = False
        if not (codec is None or isinstance(codec, Codec)):
            raise TypeError(
                "brevitas_bp.QuantBackwardWrapper: policy must return a Codec or None, got "
                f"{codec!r}; codec_from makes a codec of a quantizer")
        # A plain policy does not say how far a rounding goes, so we assume the farthest reach.
        return Decision(codec, self.reason, reach="all")

    def rewrite(self, function: Any) -> Rewrite | None:
        return None


def explained(policy: Policy) -> ExplainedPolicy:
    """Returns ``policy`` as a policy that gives reasons."""
    # This runs in every forward pass. isinstance of a protocol takes longer than all else here.
    return cast(ExplainedPolicy, policy) if hasattr(policy, "decide") else PlainPolicy(
        cast(Callable[[SavedTensor], Codec | None], policy))


@dataclass(frozen=True)
class OpAware:
    """The default policy: it knows the operation, and what backward does with each saved tensor.

    * It quantizes the tensors in which backward is linear. These are inputs of convolutions and linear
      layers, factors of products, inputs of norms, and the value of attention. They are also derivatives
      of smooth activations, which are saved instead of the inputs of these activations.
    * It stores exactly: masks of piecewise linear activations and dropout masks, in 1 or 2 bits, and
      indices, in the narrowest integer.
    * It does not keep tensors from which backward reads only the shape.
    * It keeps all other tensors as they are.

    If the configured quantizer uses rotated codes, derivatives and factors are dithered instead
    (:attr:`~brevitas_bp.codec.Codec.for_factors`): they are bounded, so a rotation would not help. So
    are query and key: with eight bits, a rotation would gain nothing.

    A quantizer of averages (:class:`~brevitas_bp.quant.GroupAverage`) averages only tensors that reach
    the gradient of one weight, such as inputs of convolutions and linear layers. In other tensors, each
    element has its own code of the same width. ``multiplier_quant`` and ``attention_quant`` are used as
    given.

    Args:
        multiplier_bits: least width of tensors that multiply the passing gradient: derivatives, and
            factors of products of activations. A rounding of these reaches the gradients of all layers
            further up. A rounding of a layer's input reaches only the gradient of that layer's weight.
        norm_bits: least width of the inputs of norms; None: the configured width. A rounding of these
            reaches all layers further up, with a weight of order 1 / sqrt(M) for M elements to a
            statistic. Small batches can give batch and instance norms few elements to a statistic. With
            M < 256 their inputs get at least 3 bits, with M < 64 at least 4. With M < 16 they are exact.
        multiplier_quant: quantizer that replaces the configured quantizer with ``multiplier_bits``.
        few_bit: bits of the piecewise-constant derivative (Novikov et al., "Few-bit backward", 2023),
            stored instead of a rounded derivative: smaller, without noise, biased. None: off.
        attention: "replay" stores query, key and value, and runs attention again in backward; "exact"
            keeps what autograd keeps.
        attention_bits: least width of query and key; None keeps them exact. Attention runs again from
            the rounded query and key, so its weights are slightly off and the gradient is slightly
            biased. Quantizers without a choice of widths keep query and key exact.
        attention_quant: quantizer of query and key that replaces the configured quantizer with
            ``attention_bits``.
        checkpoint_quant: quantizer of the inputs of parts that ``torch.utils.checkpoint`` runs again;
            None keeps them exact. A part runs again from its rounded inputs, so its gradients are those
            at a slightly different point: biased, but consistent. Only tensors that a gradient goes
            through are rounded, not masks or position embeddings.
        recomputed_bits: least width of tensors from which a compiled graph computes nonlinear functions
            in backward, such as the input of an activation. The gradient is then biased by the variance
            of the rounding, which is small at 8 bits. None keeps such tensors exact.
        recompute_logits: whether ``cross_entropy`` and ``log_softmax`` compute logits of a linear layer
            again in backward, if the layer's input takes fewer bytes than probabilities would. The input
            is kept, and the gradient of the logits is exact. It costs one more run of the layer.
        hints: store outputs of ReLU, SiLU and GELU given the mask or derivative that is stored anyway,
            and nothing of what follows from others: docs/given.md, docs/computed.md. Not in graphs.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedQuantizerError: a quantizer has no codes to store.
    """

    multiplier_bits: int = 4
    norm_bits: int | None = None
    multiplier_quant: Any = None
    few_bit: int | None = None
    attention: Literal["replay", "exact"] = "replay"
    attention_bits: int | None = 8
    attention_quant: Any = None
    checkpoint_quant: Any = None
    recomputed_bits: int | None = 8
    recompute_logits: bool = False
    hints: bool = True
    _multiplier: Codec | None = field(init=False, repr=False, compare=False, default=None)
    _attention: Codec | None = field(init=False, repr=False, compare=False, default=None)
    _checkpoint: Codec | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        for bits in (
                self.multiplier_bits, self.norm_bits, self.few_bit, self.attention_bits,
                self.recomputed_bits):
            if bits is not None:
                check_bit_width(_WHERE, bits)
        if self.attention not in ("replay", "exact"):
            raise UnknownNameError(
                f"{_WHERE}: attention must be 'replay' or 'exact', got {self.attention!r}"
                f"{nearest(str(self.attention), ['replay', 'exact'])}")
        if self.attention == "exact" and self.attention_quant is not None:
            raise ValueError(
                f"{_WHERE}: attention='exact' keeps query and key, so attention_quant would do nothing; "
                "use it with attention='replay'")
        # Each codec is built once, because hooks share an encoding by the identity of its codec.
        object.__setattr__(self, "_multiplier", _codec_of(self.multiplier_quant))
        object.__setattr__(self, "_attention", _codec_of(self.attention_quant))
        object.__setattr__(self, "_checkpoint", _codec_of(self.checkpoint_quant))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in cls.__dict__:
            raise TypeError(
                f"{_WHERE}: {cls.__name__} overrides __call__, which is never called; override "
                "decide(saved), which returns a Decision: super().decide(saved)._replace(codec=...)")

    def __call__(self, saved: SavedTensor) -> Codec | None:
        """Returns the codec alone; a policy that calls this loses the rewritten operations."""
        if _asking.plain:
            warnings.warn(_ASKED_HINT, stacklevel=2)
        return self.decide(saved).codec

    def decide(self, saved: SavedTensor) -> Decision:
        """Returns the decision for a saved tensor; override it to store some tensors differently.

        Example::

            class Mine(OpAware):
                def decide(self, saved):
                    decision = super().decide(saved)
                    return decision._replace(codec=None) if saved.op == "conv2d" else decision
        """
        codec, x = saved.codec, saved.tensor
        if codec is None:
            return _CONFIGURED_EXACT
        if saved.role is not None:
            return self._decide_role(saved, saved.role, codec)
        if x.dtype == torch.bool:
            return _MASK
        if x.dtype not in FLOATS and x.dtype != torch.int64:
            return _OTHER_DTYPE
        if saved.compiled:
            decision = self._decide_compiled(saved, codec)
        else:
            rule = rule_of(saved.module_type if saved.call is NO_CALL else saved.call.function)
            if rule is None:
                return _UNKNOWN if x.is_floating_point() else _INTEGERS
            decision = self._widened(rule.decide(saved), codec)
        return decision.with_hints() if self.hints else decision

    def rewrite(self, function: Any) -> Rewrite | None:
        """Returns how to run a function so that it saves something else, or None."""
        if self.recompute_logits:
            # One bit fewer, as for errors of classes.
            rewrite = logits.rewrite_of(function, max(self.multiplier_bits - 1, 1))
            if rewrite is not None:
                return rewrite
        rule = rule_of(function)
        if rule is None or rule.rewrite is None:
            return None
        if isinstance(rule.rewrite, ReplayAttention) and self.attention != "replay":
            return None
        if self.few_bit is None or rule.few_bit is None:
            return rule.rewrite
        return functools.partial(with_table, rule, self.few_bit)

    def _widened(self, decision: Decision, codec: Codec) -> Decision:
        """Returns a decision for the configured codec, with the width that the tensor's reach asks for.

        Averages of groups are biased, and more bits do not reduce that. So they are used only where they
        reach one weight. Measured on EfficientNetV2-tiny: with inputs of norms averaged in pairs, the
        median bias of all gradients is 0.43 of their norm. It is 0.06 if each element of these inputs
        gets the code that an average would get.
        """
        if decision.codec is not codec:
            return decision
        if decision.reach == "weight":
            # An average of groups has a width that more bits would not improve.
            narrow = decision.least_bits > 1 and codec.per_element is codec
            return decision.with_codec(codec.at_least(decision.least_bits)) if narrow else decision
        if decision.probabilities:
            return self._for_probabilities(decision, codec)
        if decision.reach == "all":
            return decision.with_codec(
                self._multiplier or codec.for_factors.at_least(self.multiplier_bits))
        bits = max(decision.least_bits, (self.norm_bits or 1) if decision.reach == "norm" else 1)
        return decision.with_codec(codec.at_least(bits))

    def _for_probabilities(self, decision: Decision, codec: Codec) -> Decision:
        """Returns a decision for probabilities; exact if the quantizer has no code for them."""
        # One bit fewer for errors of classes: few of them are near the largest of their row.
        bits = max(self.multiplier_bits - (decision.units == "class error"), 1)
        suited = (self._multiplier or codec).per_element.for_probabilities
        if suited is None:
            return Decision(None, "probabilities: the quantizer has no code for them")
        suited = suited.at_least(bits)
        return decision.with_codec(suited.precise if decision.units == "class error" else suited)

    def _decide_compiled(self, saved: SavedTensor, codec: Codec) -> Decision:
        if saved.reach is None:
            warnings.warn(_COMPILED_HINT, stacklevel=2)
            return _COMPILED
        of_norm = saved.is_norm_statistic and ("norm" in str(saved.op) or saved.reach != "weight")
        if of_norm or _is_log_sum(saved):
            return _STATISTIC
        if saved.reach != "nonlinear":
            least = INPUT_BITS if saved.small_input else (
                1 if saved.sharing is None else norm_bits(saved.sharing))
            if least is None:
                return FEW_IN_STATISTIC
            return self._widened(Decision(
                codec, _LINEAR[saved.reach], reach=saved.reach, least_bits=least), codec)
        bits = self.recomputed_bits
        return _RECOMPUTED_EXACT if bits is None else Decision(
            codec.for_values.at_least(bits), "backward recomputes functions of it: slightly biased",
            reach="all")

    def _decide_role(self, saved: SavedTensor, role: str, codec: Codec) -> Decision:
        if role == CHECKPOINT_INPUT:
            return self._decide_checkpoint(saved.tensor)
        if role == DERIVATIVE:
            return self._widened(
                _DERIVATIVE._replace(codec=codec, rows=_rows_of_derivative(saved.call)), codec)
        if role == SIGN:
            return _SIGN
        if role == FEW_BIT_INPUT:
            rule = rule_of(saved.call.function)
            assert rule is not None and self.few_bit is not None
            return Decision(
                few_bit_codec(rule, saved.call, self.few_bit),
                "interval of the input: the derivative, piecewise constant and biased")
        if role == ATTENTION_VALUE:
            return self._widened(VALUE.with_codec(codec), codec)
        if role == ATTENTION_INPUT:
            quantizer = self._attention or self._wide(codec, self.attention_bits)
            if quantizer is not None:
                return QUERY.with_codec(quantizer)
            whole = saved.tensor.untyped_storage().nbytes()
            apart = whole > saved.tensor.numel() * saved.tensor.element_size()
            # Copy a view. A kept view would keep the value alive, which is in the same memory.
            return Decision(_COPY if apart else None, "query and key: weights must be exact")
        if role == ATTENTION_MASK:
            return _MASK if saved.tensor.dtype == torch.bool else FLOAT_MASK
        return logits.KEPT if role == RECOMPUTED else _REPLAYED

    def _wide(self, codec: Codec, bits: int | None) -> Codec | None:
        """Returns a codec with at least so many bits for each element; None if there is none."""
        if bits is None or not codec.per_element.bit_widths:
            return None
        wide = codec.for_factors.at_least(bits)
        return wide if min(wide.bit_widths, default=0) >= bits else None

    def _decide_checkpoint(self, x: Tensor) -> Decision:
        if x.dtype == torch.bool:
            return _MASK
        if self._checkpoint is None or not x.requires_grad or x.dtype not in FLOATS:
            return _RUN_AGAIN
        return Decision(
            self._checkpoint, "run again from it: biased, as asked for", reach="all",
            rows=of_elements)


#: Reach -> why a tensor of a compiled graph is quantized.
_LINEAR = {
    "weight": "backward is linear in it", "sum": "backward is linear in it",
    "norm": "input of a norm", "all": "factor of the passing gradient"}
_STATISTIC = Decision(None, "statistic: every gradient is multiplied by it")
_RECOMPUTED_EXACT = Decision(None, "backward recomputes functions of it")
_RUN_AGAIN = Decision(None, "a checkpointed part is run again from it")
_REPLAYED = Decision(None, "needed to run again")
_SIGN = Decision(sign(), "sign: gradient exact")
_DERIVATIVE = Decision(None, "derivative: backward is linear in it", reach="all")
_CONFIGURED_EXACT = Decision(None, "configured exact")
_MASK = Decision(_BIT_MASK, "mask, 1 bit")
_UNKNOWN = Decision(None, "unknown operation", known=False)
_COMPILED = Decision(None, "compiled graph: its operations are not visible", known=False)
_COMPILED_HINT = (
    "brevitas_bp: a compiled graph saves tensors that no longer belong to an operation, and this graph "
    "cannot be read (TorchScript, a backend of torch.compile without AOTAutograd, verify=True or "
    "storage='quantize_on_backward'): the op-aware policy keeps them exact, policy='all' rounds them")
_OTHER_DTYPE = Decision(None, "neither real numbers of 16 to 64 bits nor indices")
_INTEGERS = Decision(None, "integers")


def _is_log_sum(saved: SavedTensor) -> bool:
    """Whether the tensor is the log-sum-exp that an attention kernel saves, one number per query."""
    return saved.op is not None and "attention" in saved.op and saved.tensor.dim() < 4


def _rows_of_derivative(call: Call) -> RowsOf | None:
    """Returns the rows with which buckets of a derivative end, according to the function's rule."""
    rule = rule_of(call.function)
    rewrite = None if rule is None else rule.rewrite
    return rewrite.rows if isinstance(rewrite, SaveDerivative) else of_elements


def _codec_of(quantizer: Any) -> Codec | None:
    return quantizer if quantizer is None or isinstance(quantizer, Codec) else codec_from(quantizer)


POLICIES: dict[str, Policy] = {
    "op_aware": OpAware(), "all": quantize_all, "all_but_relu": quantize_all_but_relu,
    "exact": keep_all}
