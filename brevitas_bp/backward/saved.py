"""A saved tensor with all that a pack hook knows about it, and the decision how to store it."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from brevitas_bp.codec import Codec
from brevitas_bp.codec.base import is_plain
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.rows import Rows
from brevitas_bp.codec.shard import shard_of
from brevitas_bp.private import DisableTorchFunctionSubclass, is_functorch_wrapped

#: How far a rounding travels, see :class:`Decision`; "nonlinear": backward is not linear in the tensor.
Reach = Literal["weight", "sum", "norm", "all", "nonlinear"]

#: Roles of tensors that a rewritten operation saves; see :mod:`brevitas_bp.backward.rewrites`.
DERIVATIVE = "derivative"
FEW_BIT_INPUT = "input of a few-bit table"
SIGN = "sign"
ATTENTION_INPUT = "attention input"
ATTENTION_VALUE = "attention value"
ATTENTION_MASK = "attention mask"
REPLAYED = "replayed"
RECOMPUTED = "recomputed"
#: Role of tensors that checkpointing keeps to run a part again.
CHECKPOINT_INPUT = "input of a checkpointed part"


_PRODUCTS = frozenset({"mul", "multiply", "rmul", "imul"})


class Call:
    """One call of a torch function: the function, its arguments, and a number unique to the call."""

    __slots__ = ("args", "function", "kwargs", "number", "scores")

    def __init__(
            self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
            number: int) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.number = number
        # Storage of the log-probabilities that a loss has saved, see ``backward/classes.py``.
        self.scores: int | None = None

    @property
    def name(self) -> str:
        """The function's own name."""
        return name_of(self.function)

    @property
    def is_product(self) -> bool:
        """Whether the function is an elementwise product."""
        return self.name.strip("_") in _PRODUCTS

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Values of positional arguments, then of keywords."""
        return (*self.args, *self.kwargs.values()) if self.kwargs else self.args

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Returns an argument that may be passed by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


def name_of(function: Any) -> str:
    """Returns a function's own name."""
    return getattr(function, "__name__", None) or str(function)


#: Stands for the call outside any torch function, for instance in a custom autograd Function.
NO_CALL = Call(None, (), {}, -1)


@dataclass(eq=False, slots=True)
class SavedTensor:
    """A tensor that autograd is about to save, and the place that saves it.

    Attributes:
        tensor: the tensor; do not keep or modify it. With ``derivative``, it is the function's input or
            output, from which the derivative follows.
        op: name of the torch function that saves it, or None (for instance in a custom Function).
        module: qualified name of the innermost running module.
        codec: the codec configured for that module; None if its tensors are to be kept.
        call: the running call of the function.
        module_type: class of that module.
        path: name of that module in the wrapped module; ``module`` is its name in a larger network.
        compiled: whether a compiled graph saves it; the operations of such a graph are not visible.
        reach: for compiled graphs, how far a rounding travels, as in :class:`Decision`, or "nonlinear";
            None if the backward graph cannot be read.
        role: what the tensor is to a rewritten operation, or to checkpointing. None for a tensor that an
            operation saves as it is; its arguments then tell what the tensor is.
        derivative: name of the function whose derivative is stored, in the tensor's shape and dtype.
            None stores the tensor itself.
        sharing: elements that share one statistic of a norm in a compiled graph, if known.
        small_input: whether it is a small input of a compiled graph, see
            :func:`~brevitas_bp.backward.rows.is_small_input`.
        original: the tensor with its Python class, if ``tensor`` is without it.
        following: the call after the one that saves it, if the policy waited for it
            (:attr:`Decision.waits`). It is :data:`NO_CALL` if the pass has ended.
        copied: the argument of which the tensor is a copy, in another dtype or order of memory; None: it
            is no copy.
    """

    tensor: Tensor
    op: str | None
    module: str
    codec: Codec | None
    call: Call = NO_CALL
    module_type: type | None = None
    role: str | None = None
    path: str = ""
    compiled: bool = False
    reach: Reach | None = None
    derivative: str | None = None
    sharing: int | None = None
    small_input: bool = False
    original: Tensor | None = None
    following: Call | None = None
    copied: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Values passed to the function."""
        return self.call.arguments

    def aliases(self, argument: Any) -> bool:
        """Whether the tensor is this argument, perhaps in another shape."""
        x = self.tensor
        return isinstance(argument, Tensor) and storage_id(argument) == storage_id(x) and (
            argument.storage_offset() == x.storage_offset() and argument.numel() == x.numel())

    @property
    def position(self) -> int | None:
        """Index of the argument that the tensor is, or else of the only argument that shares its memory.

        It is None if the tensor was computed, or if several arguments are views of one memory. Arguments
        may be tuples of tensors, as Brevitas' quant tensors are.
        """
        arguments = self.call.arguments
        for position, argument in enumerate(arguments):
            if argument is self.tensor:
                return position
        storage = storage_id(self.tensor)
        sharing = []
        for position, argument in enumerate(arguments):
            for tensor in tensors_in((argument,)):
                if storage_id(tensor) != storage:
                    continue
                if self.aliases(tensor):
                    return position
                sharing.append(position)
        return sharing[0] if len(sharing) == 1 else None

    @property
    def made_of(self) -> int | None:
        """Like ``position``, or else the index of the only argument that has the tensor's shape.

        A tensor that autocast casts, or that an operation makes contiguous, is saved in other memory.
        """
        position = self.position
        if position is not None or self.role is not None:
            return position
        alike = [
            i for i, argument in enumerate(self.call.arguments)
            if isinstance(argument, Tensor) and own_shape(argument) == own_shape(self.tensor)]
        return alike[0] if len(alike) == 1 else None

    @property
    def is_norm_statistic(self) -> bool:
        """Whether the tensor is a norm's mean or inverse deviation: one value for each channel or row.

        Such a tensor is smaller than the input. If the input is not known, the shape decides.
        """
        if self.compiled or self.call is NO_CALL:
            return len(_own_sizes(self.tensor)) <= 1 or self.tensor.shape[-1] == 1
        if self.op is None or "norm" not in self.op or not self.arguments:
            return False
        normalized = self.arguments[0]
        return isinstance(normalized, Tensor) and not self.aliases(normalized) and (
            self.tensor.numel() < normalized.numel() or normalized.shape[-1:] == (1,))


class Decision(NamedTuple):
    """How a saved tensor is stored, and why.

    Attributes:
        codec: stores the tensor; None keeps it as it is.
        reason: the reason that ``QuantBackwardWrapper.explain`` shows.
        shared: whether all operations that save the tensor may share one encoding. They may not if
            backward multiplies the tensor by a gradient that comes through the same tensor elsewhere.
            A product of two roundings is unbiased only if they are independent.
        known: whether the policy knows the operation.
        reach: how far a rounding of the tensor travels, which decides the width. Only tensors that reach
            no further than a weight may be averaged. The rounding goes

            * "weight": into one weight's gradient only;
            * "sum": into gradients further up, but summed with so many others that no more bits are
              needed;
            * "norm": weakly into all gradients further up;
            * "all": as a factor into all gradients further up.
        rows: finds the rows with which buckets end, see :mod:`~brevitas_bp.backward.rows`. None: buckets
            may hold elements of several rows.
        least_bits: least width of the codes, even if a smaller width is configured.
        units: the units in which backward uses the tensor and in which the tensor is stored, see
            :mod:`~brevitas_bp.backward.units`; None: the tensor's own units.
        probabilities: most elements are far below the largest, and zeros must stay zeros.
        waits: the policy decides again when it knows the next call, :attr:`SavedTensor.following`.
        uses_hints: only what other stored tensors do not tell is stored, see
            :mod:`brevitas_bp.codec.given`.
        zeros_outside: the codec stores a mask, outside of which the tensor is zero.
        uses_outputs: the input of a norm may be stored as the norm's output, see
            :mod:`~brevitas_bp.backward.outputs`.
        may_compute: if the tensor follows from stored ones, backward may compute it, see
            :mod:`brevitas_bp.codec.computed`.
    """

    codec: Codec | None
    reason: str
    shared: bool = True
    known: bool = True
    reach: Literal["weight", "sum", "norm", "all"] = "weight"
    rows: "Callable[[Tensor, Call], Rows | None] | None" = None
    units: Literal[
        "statistic", "channel", "quotient", "sum of one", "logarithm", "class error",
        "derivative"] | None = None
    least_bits: int = 1
    waits: bool = False
    probabilities: bool = False
    uses_hints: bool = False
    zeros_outside: bool = False
    uses_outputs: bool = False
    may_compute: bool = False

    def with_codec(self, codec: Codec) -> "Decision":
        """Returns this decision with another codec, or this decision itself if it has that codec."""
        return self if codec is self.codec else self._replace(codec=codec)

    def with_hints(self) -> "Decision":
        """Returns this decision, which uses hints if the tensor is a layer's input or a factor.

        The input of a norm may be stored as its output.
        """
        if self.reach == "norm" and self.codec is not None and self.codec.stores_differences:
            return self._replace(uses_outputs=True)
        useful = self.reach == "weight" or (
            self.reach in ("sum", "all") and self.units is None and not self.probabilities)
        useful = useful and self.codec is not None and self.codec.stores_differences
        return self._replace(uses_hints=True, may_compute=self.reach == "weight") if useful else self


def storage_id(x: Tensor) -> int:
    """Returns the identity of the storage of ``x``, valid while something holds the storage.

    For a DTensor, this is the storage of its shard. The DTensor itself has no storage that its views
    would share.
    """
    try:
        return (x if type(x) is Tensor else shard_of(x)).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(x)


def memory_key(x: Tensor) -> tuple[Hashable, ...]:
    """Returns a key that is equal for views of the same memory."""
    return storage_id(x), x.storage_offset(), x.numel(), x.dtype


def place_of(x: Tensor) -> Hashable:
    """Returns a key that is equal for views of the same elements, unless these change.

    The views may have different shapes and strides. So equal keys mean equal values in equal order only
    for contiguous tensors.
    """
    return *memory_key(x), version_of(x), x.is_conj(), x.is_neg()


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among arguments, including tensors in lists and tuples."""
    for argument in arguments:
        if type(argument) is Tensor or isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def is_ordinary(x: Tensor) -> bool:
    """Whether a tensor is no DTensor, and not one that stands for several."""
    return not is_functorch_wrapped(x) and is_plain(without_class(x))


def without_class(x: Tensor) -> Tensor:
    """Returns a tensor without its Python class, if the class does not change what operators do.

    Classes such as MONAI's MetaTensor add methods and attributes.
    """
    kind: Any = type(x)
    ordinary: Any = Tensor
    if isinstance(x, nn.Parameter) or kind.__torch_dispatch__ is not ordinary.__torch_dispatch__:
        return x
    with DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def is_parameter(x: Tensor) -> bool:
    """Whether ``x`` is a ``nn.Parameter``; ordinary tensors skip the slow check of that class."""
    return type(x) is not Tensor and isinstance(x, nn.Parameter)


def own_shape(x: Tensor) -> list[int]:
    """Returns the sizes that hold values, sorted: transposing or expanding does not change them."""
    return sorted(_own_sizes(x))


def _own_sizes(x: Tensor) -> list[int]:
    # Do not compare sizes with one another: they may be symbols, and a graph would hold for their order
    # only.
    return [size for size in TensorLayout.base(x).shape if size != 1]
