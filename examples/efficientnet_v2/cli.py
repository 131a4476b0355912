"""Builds a command line from a frozen dataclass: each field is one option, documented in one place."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def knob(default: Any, help: str, *, identity: bool = True) -> Any:
    """A dataclass field with a help text.

    Args:
        default: Value if the option is not given.
        help: One line for `--help`.
        identity: Whether the value changes the trained numbers. A checkpoint can only be resumed
            with equal identity knobs; folders, threads and progress bars may change freely.
    """
    return dataclasses.field(default=default, metadata={"help": help, "identity": identity})


def identity(knobs: Any) -> dict[str, Any]:
    """Return the knobs that change the trained numbers, as plain JSON values."""
    fields = [f for f in dataclasses.fields(knobs) if f.metadata["identity"]]
    values = {field.name: getattr(knobs, field.name) for field in fields}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def add_knobs(
    parser: argparse.ArgumentParser,
    knobs_class: type,
    *,
    skip: Collection[str] = (),
) -> None:
    """Add one `--option` for each field of `knobs_class` that is not in `skip`."""
    hints = get_type_hints(knobs_class)
    for field in dataclasses.fields(knobs_class):
        if field.name not in skip:
            default = field.default
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                default=list(default) if isinstance(default, tuple) else default,
                **_argument(hints[field.name], field.metadata["help"], default),
            )


def from_arguments(knobs_class: type[T], arguments: argparse.Namespace, **fixed: Any) -> T:
    """Build `knobs_class` from parsed options; `fixed` values override parsed ones."""
    names = [field.name for field in dataclasses.fields(knobs_class)]  # type: ignore[arg-type]
    values = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return knobs_class(**{**values, **fixed})


def _argument(kind: Any, text: str, default: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for a field of type `kind`."""
    shown = text if default in ("", (), False, None) else f"{text} [default: {default}]"
    if kind is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        return {"action": action, "help": shown}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "help": shown}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": "KEY=VALUE", "help": shown}
    plain = next((part for part in get_args(kind) if part is not type(None)), kind)  # `int | None`
    return {"type": plain, "metavar": plain.__name__.upper(), "help": shown}
