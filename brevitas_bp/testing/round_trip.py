"""Checks of what a codec restores: dtype, shape, strides, values."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.testing.checks import Check, found
from brevitas_bp.testing.subject import EXACT_DTYPES, Subject, differing, largest, named, same_bits
from brevitas_bp.testing.tensors import LAYOUTS, dtype_name

# Fewer elements than this do not tell an order from chance.
_ENOUGH = 200


def _lazily_negated(x: Tensor) -> Tensor:
    """Returns a view that torch negates when it reads it, as the imaginary part of a conjugate is."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


#: name -> function that gives a tensor a memory layout.
MEMORY: dict[str, Callable[[Tensor], Tensor]] = {**LAYOUTS, "lazily negated": _lazily_negated}


def _refused_dtypes(subject: Subject) -> None:
    restores = subject.codec.restores or ()
    for dtype in (*EXACT_DTYPES, torch.complex64):
        if dtype in restores:
            continue
        x, case = torch.ones(64, device=subject.device).to(dtype), f"encoding {dtype}"
        refusal = f"a TypeError that names {dtype_name(dtype)}, because restores does not"
        try:
            subject.encode(x)
        except TypeError as error:
            if dtype_name(dtype) not in str(error):
                found(case, refusal, f"{type(error).__name__}: {error}")
        except Exception as error:
            found(case, refusal, f"{type(error).__name__}: {error}")
        else:
            found(case, f"{refusal} (Codec.layout_of raises it)", "a payload")


def _restored(subject: Subject, case: str, x: Tensor) -> Tensor:
    """Returns the decoded tensor; fails if shape, dtype, device or strides are not those of ``x``."""
    decoded = subject.decoded(x)
    if not isinstance(decoded, Tensor):
        found(case, "a tensor", type(decoded).__name__)
    if decoded.shape != x.shape:
        found(case, f"the shape {tuple(x.shape)}", tuple(decoded.shape))
    if decoded.dtype != x.dtype:
        found(case, x.dtype, decoded.dtype)
    if decoded.device != x.device:
        found(case, f"a tensor on {x.device}", decoded.device)
    wanted = {x.stride()} if subject.codec.keeps else {TensorLayout.of(x).stride}
    if decoded.stride() not in wanted:
        found(case, f"strides {' or '.join(map(str, wanted))}", decoded.stride())
    return decoded


def _restores(subject: Subject) -> None:
    for case, x in subject.bases():
        _restored(subject, case, x)


def _keeps_layouts(subject: Subject) -> None:
    for case, x in subject.bases():
        for layout, lay in MEMORY.items():
            _restored(subject, f"{case}, {layout}", lay(x))


def _small(subject: Subject) -> None:
    for case, x in subject.bases():
        flat = x.reshape(-1)
        for size, small in (
                ("empty", x.new_empty((0, 3))), ("one element", flat[:1].clone()),
                ("rank 0", flat[0].clone())):
            decoded = _restored(subject, f"{case}, {size}", small)
            if small.numel():
                _close(subject, f"{case}, {size}", small, decoded)


def _close(subject: Subject, case: str, x: Tensor, decoded: Tensor) -> None:
    """Fails unless the values are exact, or for a lossy codec within the largest error."""
    expected = subject.expected(x)
    if not subject.codec.lossy:
        if not same_bits(decoded, expected):
            found(case, "the very same bits, because lossy is False", differing(decoded, expected))
        return
    # The result is rounded to its dtype at last.
    reach = largest(expected)
    rounding = torch.finfo(x.dtype).eps * reach if x.is_floating_point() else 0.0
    error = largest(decoded.double() - expected.double())
    if not error <= subject.largest_error * reach + rounding:
        found(case, f"errors of at most {subject.largest_error:g} times the largest magnitude, "
              f"{reach:g}", f"{error:g}")


def _values(subject: Subject) -> None:
    for case, x in subject.kinds():
        _close(subject, case, x, subject.decoded(x))


def _order(subject: Subject) -> None:
    for case, x in subject.bases():
        for layout, lay in MEMORY.items():
            # Two values far apart, which no lossy codec takes for each other.
            signs = subject.codec.lossy and x.is_floating_point()
            laid = lay(torch.where(x > 0, 1.0, -1.0).to(x.dtype) if signs else x)
            expected, decoded = subject.expected(laid), subject.decoded(laid)
            if not subject.codec.lossy:
                if not same_bits(decoded, expected):
                    found(f"{case}, {layout}", "the same elements", differing(decoded, expected))
            elif (shared := _correlation(expected, decoded)) < 0.3:
                found(f"{case}, {layout}, of ones and minus ones",
                      "decoded elements that go with the given ones", f"a correlation of {shared:.2f}")


def _correlation(first: Tensor, second: Tensor) -> float:
    """Returns the correlation; 1 if there are too few elements to tell, or all are alike."""
    a, b = (x.double().reshape(-1) for x in (first, second))
    if TensorLayout.of(second).numel < _ENOUGH or a.std() == 0:
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def _non_finite(subject: Subject) -> None:
    for case, x in subject.floats():
        for bad in (torch.nan, torch.inf, -torch.inf):
            laid = x.clone(memory_format=torch.contiguous_format)
            laid.view(-1)[laid.numel() // 2] = bad
            expected = subject.expected(laid)
            hidden = subject.decoded(laid).isfinite() & ~expected.isfinite()
            if hidden.any():
                found(f"{case} with one {bad}", "NaN or Inf in its place",
                      f"{float(subject.decoded(laid)[hidden][0])!r}")


def _huge(subject: Subject) -> None:
    for case, x in subject.floats():
        limit = torch.finfo(x.dtype).max
        huge = (x.double() / max(largest(x), 1e-300) * limit).clamp(-limit, limit).to(x.dtype)
        decoded = subject.decoded(huge)
        if not decoded.isfinite().all():
            found(f"{case}, up to the largest float {limit:g}", "finite numbers",
                  f"{int((~decoded.isfinite()).sum())} of {decoded.numel()} that are not")
        # A codec may limit the range of such values, so their errors may be larger than those of others.
        wide = replace(subject, largest_error=max(2.0, subject.largest_error))
        _close(wide, f"{case}, up to the largest float {limit:g}", huge, decoded)


def _tiny(subject: Subject) -> None:
    for case, x in subject.floats():
        # About 1e-30; the numbers of float16 end before.
        factor = 2.0**-8 if x.dtype == torch.float16 else 2.0**-100
        small = x * factor
        given, tiny = (_relative_error(subject, values) for values in (x, small))
        if not tiny <= 1.5 * given + 4 * torch.finfo(x.dtype).eps:
            found(f"{case}, times {factor:.3g}", f"the relative error of the tensor itself, {given:.3g}",
                  f"{tiny:.3g}")


def _relative_error(subject: Subject, x: Tensor) -> float:
    expected = subject.expected(x).double()
    error = subject.decoded(x).double() - expected
    return float(error.norm() / expected.norm().clamp(min=1e-300))


def _keeps_sign(subject: Subject) -> None:
    for case, x in subject.floats():
        decoded = subject.decoded(x.abs())
        if (decoded < 0).any():
            found(f"the magnitudes of {case}", "no negative number, because keeps_sign is True",
                  float(decoded.min()))


def _relatives(subject: Subject) -> None:
    codec = subject.fresh()
    for case, x in subject.bases():
        length = x.shape[-1] if x.dim() else 1
        for name, other in (
                ("at_least(8)", codec.at_least(8)), ("per_element", codec.per_element),
                (f"in_rows({length}, {length})", codec.in_rows(length, length))):
            decoded = subject.encode(x, codec=other).decode()
            if decoded.shape != x.shape or decoded.dtype != x.dtype:
                found(f"{case} with the codec of {name}", named(x), named(decoded))
    same = codec.at_least(min(codec.bit_widths, default=1))
    if codec.bit_widths and same is not codec and same is not codec.per_element:
        found(f"at_least({min(codec.bit_widths)})",
              "the codec itself, because its codes have as many bits", repr(same.name))


def _has_floats(subject: Subject) -> bool:
    return any(True for _ in subject.floats())


#: name -> check of what a codec restores.
ROUND_TRIP: dict[str, Check[Subject]] = {
    "round trip": Check("decoding restores shape, dtype and device", _restores),
    "refused dtypes": Check(
        "a codec refuses a dtype that it does not restore, with an error that names it", _refused_dtypes,
        lambda subject: subject.codec.restores is not None),
    "strides": Check("decoding restores the strides of a tensor in any memory layout", _keeps_layouts),
    "small tensors": Check("tensors with no element and with one element come back", _small),
    "values": Check(
        "a codec with lossy = False restores every bit, and another one errs by at most the largest "
        "error", _values),
    "order": Check("every element comes back in its own place", _order),
    "non-finite": Check("backward sees every NaN and every Inf", _non_finite, _has_floats),
    "huge values": Check("values near the largest float stay finite", _huge, _has_floats),
    "tiny values": Check("the relative error does not depend on the unit", _tiny, _has_floats),
    "signs": Check(
        "a codec with keeps_sign decodes no negative number if none was encoded", _keeps_sign,
        lambda subject: subject.codec.keeps_sign and _has_floats(subject)),
    "relatives": Check(
        "the codec for more bits, for elements and for rows restores the same tensors", _relatives)}
