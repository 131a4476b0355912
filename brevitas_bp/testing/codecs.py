"""Checks of everything that a codec must keep."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from brevitas_bp.codec import Codec
from brevitas_bp.testing.checks import Check, run_checks
from brevitas_bp.testing.networks import NETWORKS
from brevitas_bp.testing.payloads import PAYLOADS
from brevitas_bp.testing.round_trip import ROUND_TRIP
from brevitas_bp.testing.subject import Subject

#: name -> check of a codec, in the order in which they run.
CODEC_CHECKS: dict[str, Check[Subject]] = {**ROUND_TRIP, **PAYLOADS, **NETWORKS}


def check_codec(
        codec: Codec, *,
        values: Tensor | Sequence[Tensor] | None = None,
        decodes_to: Callable[[Tensor], Tensor] | None = None,
        largest_error: float = 2.0,
        stochastic: bool | None = None,
        device: str | torch.device = "cpu",
        without: Collection[str] = ()) -> tuple[str, ...]:
    """Checks that a codec keeps every invariant of :class:`~brevitas_bp.codec.base.Codec`.

    The checks are listed in ``docs/testing.md``. Each is tried with every dtype that the codec restores
    (``Codec.restores``), in every memory layout, with NaN, Inf, huge and tiny values. Tensors and seeds
    are the same in every run. A codec of its own for each call site (``per_site``) is made anew for each
    tensor. torch's generators are afterwards as they were.

    Args:
        codec: the codec.
        values: tensors to try in place of those of this module, for a codec that takes only some
            tensors, such as indices of a pooling. The network is then not tried.
        decodes_to: function of the encoded tensor that gives what decoding stands for, if that is not
            the tensor, for instance its sign. The network is then not tried.
        largest_error: largest ``|decoded - x| / max|x|`` of a lossy codec. The default, 2, allows
            an error of the whole range. Give a smaller one if you know it.
        stochastic: whether another seed must give other bytes; None does not compare seeds.
        device: device of the tensors that are tried.
        without: names of checks to leave out, because the codec promises less.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: a check failed; says what was expected, what came, and the invariant.
        UnknownNameError: there is no check of a name in ``without``.
        TypeError: ``codec`` is no codec.
        ValueError: ``values`` is empty, or ``largest_error`` is not positive.

    >>> from brevitas_bp import codec_from
    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic
    >>> codec = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    >>> "strides" in check_codec(codec, stochastic=True)
    True
    """
    where = "brevitas_bp.testing.check_codec"
    if not isinstance(codec, Codec):
        raise TypeError(
            f"{where}: expected a Codec, got {codec!r}; codec_from(config) makes the codec of a config")
    given = () if values is None else (values,) if isinstance(values, Tensor) else tuple(values)
    if values is not None and (not given or not all(x.numel() for x in given)):
        raise ValueError(
            f"{where}: values must be a tensor or a list of tensors with elements, got {len(given)} "
            "tensors; empty tensors are tried anyway")
    if not largest_error > 0:
        raise ValueError(
            f"{where}: largest_error must be > 0, got {largest_error}; a codec without errors says "
            "lossy = False")
    subject = Subject(codec, given, decodes_to, largest_error, stochastic, device)
    return run_checks(where, repr(codec.name), CODEC_CHECKS, subject, without)
