"""Checks the arguments of ``QuantBackwardWrapper``, and builds the codecs that they name."""

import difflib
import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import nn

from brevitas_bp.backward.planned import Candidate, HasChoices, check_choices
from brevitas_bp.backward.policy import POLICIES, ExplainedPolicy, Policy
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.errors import UnknownNameError, nearest

Storage = Literal["save_quantized", "quantize_on_backward"]
#: A plan, or the choices that it holds.
Plan = Mapping[str, Any] | HasChoices

WHERE = "brevitas_bp.QuantBackwardWrapper"


def check_module(module: Any) -> nn.Module:
    """Returns the module to wrap.

    Raises:
        TypeError: ``module`` is not an instance of ``torch.nn.Module``.
    """
    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if inspect.isclass(module) else repr(module)
        raise TypeError(f"{WHERE}: module must be a torch.nn.Module instance, got {kind}")
    return module


def check_storage(storage: str) -> Storage:
    """Returns how tensors are stored.

    Raises:
        UnknownNameError: ``storage`` is not a known way to store tensors.
    """
    known = ("save_quantized", "quantize_on_backward")
    if storage not in known:
        raise UnknownNameError(
            f"{WHERE}: storage must be 'save_quantized' or 'quantize_on_backward', got {storage!r}"
            f"{nearest(str(storage), known)}")
    return cast(Storage, storage)


def check_number(setting: str, number: Any) -> None:
    """Refuses a setting that is neither an integer nor None.

    Raises:
        TypeError: ``number`` is neither.
    """
    if not (number is None or isinstance(number, int)):
        raise TypeError(f"{WHERE}: {setting} must be an integer or None, got {number!r}")


def check_widths(choices: Mapping[str, Any], codecs: Sequence[Codec]) -> None:
    """Refuses a plan with a width that no quantizer of the wrapper can have.

    Raises:
        ValueError: for instance 1 bit for signed codes.
    """
    for given in choices.values():
        errors = []
        for codec in codecs:
            try:
                Candidate.parse(given).codec(codec)
            except ValueError as error:
                errors.append(error)
        if len(errors) == len(codecs):
            raise errors[0]


def choices_of(plan: Plan, module: nn.Module) -> Mapping[str, Any]:
    """Returns the choices of a plan: name of a saved tensor -> the plan's choice for it.

    Raises:
        TypeError: ``plan`` is not a plan.
        UnknownNameError: the plan names a module that ``module`` does not have.
        ValueError: the plan names an unsupported width.
    """
    choices = getattr(plan, "choices", plan)
    if not isinstance(choices, Mapping):
        raise TypeError(
            f"{WHERE}: plan must come from plan_bit_widths, or map names of saved tensors to bits, "
            f"got {plan!r}")
    check_choices(WHERE, choices, [name for name, _ in module.named_modules()])
    return choices


def build_codec(where: str, quantizer: Any, overrides: dict[str, Any]) -> Codec | None:
    """Builds the codec of a quantizer with some settings; None keeps tensors exact.

    Args:
        where: the argument that holds the quantizer.
        quantizer: an injector class, a proxy, a codec, or None.
        overrides: settings of the quantizer.

    Raises:
        TypeError: the settings would do nothing.
    """
    if quantizer is None:
        if overrides:
            raise TypeError(
                f"{WHERE}: {where}=None keeps tensors exact, so the settings {sorted(overrides)} would "
                "do nothing; remove them or pass a quantizer")
        return None
    if not isinstance(quantizer, Codec):
        return codec_from(quantizer, **overrides)
    if overrides:
        raise TypeError(
            f"{WHERE}: {where} is a codec, which is built already, so the settings "
            f"{sorted(overrides)} would do nothing; pass the quantizer's config class instead")
    return quantizer


def check_names(settings: Iterable[str], arguments: Iterable[str]) -> None:
    """Refuses a misspelt argument of the wrapper before it counts as a setting of the quantizer.

    Args:
        settings: names that are to become settings of the quantizer.
        arguments: names of the wrapper's arguments.

    Raises:
        UnknownNameError: the name of a setting is close to that of an argument.
    """
    own = [name for name in arguments if "quant_" not in name]
    for name in settings:
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if close:
            raise UnknownNameError(
                f"{WHERE}: there is no argument {name!r}; did you mean {close[0]!r}?")


def check_policy(policy: str | Policy) -> Policy:
    """Returns the policy with this name; a policy object is returned as it is.

    Raises:
        TypeError: ``policy`` is a class instead of an instance.
        UnknownNameError: no policy has that name.
    """
    if inspect.isclass(policy):
        name = getattr(policy, "__name__", "")
        raise TypeError(f"{WHERE}: policy got the class {name}; make one of it, policy={name}()")
    if callable(policy) or isinstance(policy, ExplainedPolicy):
        return policy
    if policy not in POLICIES:
        raise UnknownNameError(
            f"{WHERE}: policy must be one of {sorted(POLICIES)} or a callable, got {policy!r}"
            f"{nearest(str(policy), POLICIES)}")
    return POLICIES[policy]


def check_overrides(
        module: nn.Module, overrides: Mapping[str, Any],
        configured: Codec | None) -> list[tuple[str, Codec | None]]:
    """Returns each pattern with its codec.

    Args:
        module: the wrapped module; each pattern must match a name in it.
        overrides: pattern -> quantizer, None, or a width of ``configured``.
        configured: the codec of ``act_quant``.

    Raises:
        TypeError: ``overrides`` is no mapping from patterns, or has a width but ``configured`` is None.
        UnknownNameError: a pattern matches no module.
        ValueError: a pattern would do nothing.
    """
    if not isinstance(overrides, Mapping) or not all(isinstance(p, str) for p in overrides):
        raise TypeError(
            f"{WHERE}: overrides must map globs over module names to quantizers or None, for "
            f"instance {{'features.0.*': None}}, got {overrides!r}")
    names = [name for name, _ in module.named_modules() if name]
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError(
                f"{WHERE}: the pattern {pattern!r} in overrides matches no module of "
                f"{type(module).__name__}{nearest(pattern, names)}")
    # Tensors that the root itself saves have the root's name, which is empty.
    _refuse_shadowed(list(overrides), ["", *names])
    return [
        (pattern, _override(f"overrides[{pattern!r}]", quantizer, configured))
        for pattern, quantizer in overrides.items()]


def _refuse_shadowed(patterns: list[str], names: list[str]) -> None:
    """Refuses a pattern that would do nothing because earlier patterns match all that it matches."""
    for i, pattern in enumerate(patterns):
        selected = [name for name in names if selects(pattern, name)]
        if all(any(selects(before, name) for before in patterns[:i]) for name in selected):
            before = next(b for b in patterns[:i] if selects(b, selected[0]))
            raise ValueError(
                f"{WHERE}: the pattern {pattern!r} in overrides would do nothing, because the first "
                f"match wins and {before!r} stands before it; move {pattern!r} before {before!r}")


def _override(where: str, given: Any, configured: Codec | None) -> Codec | None:
    """Builds the codec of an override: a quantizer, None, or a width of ``configured``."""
    if not isinstance(given, (int, float, str)):
        return build_codec(where, given, {})
    if configured is None:
        raise TypeError(
            f"{WHERE}: {where}={given!r} is a width of act_quant, which is None; pass a quantizer")
    return Candidate.parse(given).codec(configured)


def selects(pattern: str, name: str) -> bool:
    """Whether a pattern matches the module of this name, or a module that contains it."""
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
