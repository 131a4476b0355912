"""The registry of rules: which rule says how the saved tensors of an operation are stored."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from brevitas_bp.backward.rewrites import Rewrite
from brevitas_bp.backward.saved import Call, Decision, SavedTensor

Decide = Callable[[SavedTensor], Decision]


@dataclass(frozen=True)
class OpRule:
    """How the saved tensors of one operation are stored.

    Attributes:
        decide: saved tensor -> :class:`Decision`. It is called only for tensors of numbers, and only in
            modules that have a configured codec.
        rewrite: runs the operation so that it saves something else; None runs the operation as it is.
        few_bit: call -> arguments of :func:`~brevitas_bp.activations.few_bit.few_bit_table` except the
            bits, or None if the call's arguments have no table. The attribute is None without any table.
    """

    decide: Decide
    rewrite: Rewrite | None = None
    few_bit: Callable[[Call], dict[str, Any] | None] | None = None


_by_name: dict[str, OpRule] = {}
# Entries of functions and classes vanish when nobody else holds the object, for instance when a notebook
# cell runs again. Methods of torch support no weak references, so their entries stay.
_by_object: WeakKeyDictionary[Any, OpRule] = WeakKeyDictionary()
_by_method: dict[Any, OpRule] = {}
# Cache: function of torch -> its rule, if any. It is read for every function that runs.
_found: dict[Any, OpRule | None] = {}


def register_op(operation: str | Callable[..., Any], rule: OpRule) -> None:
    """Tells the op-aware policy how to store the saved tensors of an operation.

    Args:
        operation: one of

            * a function that ``TorchFunctionMode`` sees: any function of torch, or one of your own that
              calls ``torch.overrides.handle_torch_function``;
            * the name of a function of torch, in all its forms ("mul" is ``torch.mul``, ``Tensor.mul``,
              ``Tensor.mul_``, ``*`` and ``*=``);
            * a module class, for tensors that custom autograd Functions save while the module runs.
        rule: made by :func:`linear`, :func:`weighted`, :func:`product`, :func:`normalization`,
            :func:`elementwise`, :func:`lossless`, :func:`composite` or :func:`exact`.

    Raises:
        TypeError: ``rule`` is not an :class:`OpRule`, or ``operation`` is neither name nor callable.

    Example:
        >>> from brevitas_bp.backward.operations import exact
        >>> register_op("dist", exact("a distance"))
    """
    where = "brevitas_bp.backward.register_op"
    if not isinstance(rule, OpRule):
        raise TypeError(
            f"{where}: rule must be an OpRule, got {rule!r}; call one of the functions in "
            "brevitas_bp.backward.operations, for instance linear()")
    if isinstance(operation, str):
        _by_name[operation.strip("_")] = rule
    elif callable(operation):
        try:
            table = _by_method if isinstance(operation, MethodType) else _by_object
            table[operation] = rule
        except TypeError:
            _by_method[operation] = rule
    else:
        raise TypeError(
            f"{where}: operation must be a function, a name or a module class, got {operation!r}")
    _found.clear()


def rule_of(operation: Any) -> OpRule | None:
    """Returns the rule of a function or module class, or None."""
    try:
        return _found[operation]
    except KeyError:
        rule = _find(operation)
        if not isinstance(operation, type) and _is_of_torch(operation):
            _found[operation] = rule
        return rule
    except TypeError:
        return None


def _find(operation: Any) -> OpRule | None:
    try:
        known = _by_object.get(operation)
    except TypeError:
        known = None
    known = _by_method.get(operation) if known is None else known
    if known is not None:
        return known
    if isinstance(operation, type):
        return next((_by_object[base] for base in operation.__mro__ if base in _by_object), None)
    name = getattr(operation, "__name__", None)
    return _by_name.get(name.strip("_")) if name and _is_of_torch(operation) else None


# In the ``__module__`` of an operator, the operator's namespace follows this prefix.
_REGISTERED = "torch._ops."


def _is_of_torch(function: Any) -> bool:
    """Whether a function is torch's own: another function of that name may save something else."""
    # Methods of Tensor have no module.
    module = getattr(function, "__module__", None) or getattr(
        getattr(function, "__objclass__", None), "__module__", None) or "torch"
    if module.startswith(_REGISTERED):
        # Anybody may register an operator, under any name, with its own backward.
        return module.removeprefix(_REGISTERED) == "aten"
    return module.partition(".")[0] == "torch"
