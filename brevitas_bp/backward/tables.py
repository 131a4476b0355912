"""Few-bit tables of the functions that a pass calls."""

import functools
from typing import Any

from brevitas_bp.activations.few_bit import few_bit_table
from brevitas_bp.backward.registry import OpRule
from brevitas_bp.backward.rewrites import RunningPass, SaveDerivative, SaveInput
from brevitas_bp.backward.saved import Call
from brevitas_bp.codec import Codec, FewBitCodec


def with_table(rule: OpRule, bits: int, running: RunningPass, call: Call) -> Any:
    """Runs a function so that a few-bit table encodes its input. If none fits, saves the derivative."""
    rewrite = rule.rewrite
    assert isinstance(rewrite, SaveDerivative)
    if few_bit_codec(rule, call, bits) is not None:
        rewrite = SaveInput(**vars(rewrite))
    return rewrite(running, call)


def few_bit_codec(rule: OpRule, call: Call, bits: int) -> Codec | None:
    """Returns the codec of a call's table; None if no table fits."""
    settings = None if rule.few_bit is None else rule.few_bit(call)
    return None if settings is None else _table_codec(bits, **settings)


@functools.lru_cache(maxsize=256)
def _table_codec(bits: int, name: str, **settings: Any) -> Codec | None:
    """Returns the codec of a table; None for settings that no table fits, such as a large alpha."""
    try:
        return FewBitCodec(few_bit_table(name, bits, **settings))
    except ValueError:
        return None
