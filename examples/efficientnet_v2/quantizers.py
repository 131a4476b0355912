"""Quantizer configs by class name, and overrides typed on the command line."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from faults import InputError

from brevitas_bp.errors import nearest

_BARE_NAMES_IN = ("brevitas_bp.quant", "brevitas.quant")


def find_quantizer(name: str) -> type | None:
    """Return the injector class called `name`, or `None` for `"none"`.

    Args:
        name: A bare name, looked up in `brevitas_bp.quant`, then in `brevitas.quant`; or a dotted
            path such as `my_project.quantizers.Mine`.

    Raises:
        InputError: The name does not exist, or it is not a class.
    """
    if name == "none":
        return None
    module, _, attribute = name.rpartition(".")
    found = [getattr(_import(m), attribute, None) for m in ([module] if module else _BARE_NAMES_IN)]
    quantizer = next((f for f in found if f is not None), None)
    if not isinstance(quantizer, type):
        names = {n for m in ([module] if module else _BARE_NAMES_IN) for n in dir(_import(m))}
        raise InputError(
            f"--quant {name}: expected 'none' or a quantizer class of brevitas_bp.quant, "
            f"brevitas.quant or a dotted path{nearest(attribute, sorted(names))}"
        )
    return quantizer


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--quant: cannot import {module!r}: {error}") from error


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """Return `["bit_width=2", "metadata_dtype=torch.bfloat16"]` as keyword arguments.

    Example:
        >>> parse_overrides(["bucket_size=256", "quantize_zero_point=True", "mix_per=tensor"])
        {'bucket_size': 256, 'quantize_zero_point': True, 'mix_per': 'tensor'}
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--quant-override {item}: expected KEY=VALUE, as in bucket_size=256")
        if key in overrides:
            raise InputError(f"--quant-override {item}: {key} was given before; pass it once")
        overrides[key] = _parse_value(text)
    return overrides


def _parse_value(text: str) -> Any:
    """Parse a literal, `true`/`false`/`none` in any case, or a torch dtype; else return the text."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
