"""Named checks of one subject, and the sentence with which they fail."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch

from brevitas_bp.errors import UnknownNameError, nearest

S = TypeVar("S")


class PowerError(ValueError):
    """So few draws cannot see a bias of the wanted size."""


class Found(Exception):  # noqa: N818 - it never leaves this package
    """What a check found. The runner adds the invariant, and raises an ``AssertionError``."""

    def __init__(self, case: str, expected: object, got: object) -> None:
        super().__init__(f"{case}: expected {expected}, got {got}")


def found(case: str, expected: object, got: object) -> NoReturn:
    """Fails the running check.

    Args:
        case: what was tried.
        expected: what the invariant demands.
        got: what came.
    """
    raise Found(case, expected, got)


@dataclass(frozen=True)
class Check(Generic[S]):
    """One check.

    Attributes:
        invariant: the rule, a sentence.
        run: fails with :func:`found`.
        applies: whether the subject promises anything that the check could test.
    """

    invariant: str
    run: Callable[[S], None]
    applies: Callable[[S], bool] = lambda subject: True


def run_checks(
        where: str, name: str, checks: Mapping[str, Check[Any]], subject: Any,
        without: Iterable[str]) -> tuple[str, ...]:
    """Runs all checks but those in ``without``; returns the names of those that ran.

    torch's generators are afterwards as they were.

    Raises:
        UnknownNameError: there is no check of a name in ``without``.
        AssertionError: a check failed, or its subject raised an error.
    """
    skipped = {without} if isinstance(without, str) else set(without)
    for skip in sorted(skipped):
        if skip not in checks:
            raise UnknownNameError(
                f"{where}: there is no check {skip!r} to leave out{nearest(skip, checks)}; the checks "
                f"are {', '.join(map(repr, checks))}")
    ran: list[str] = []
    with torch.random.fork_rng():
        for title, check in checks.items():
            if title in skipped or not check.applies(subject):
                continue
            with _explained(f"{where}: {name} fails the check {title!r}", check.invariant):
                check.run(subject)
            ran.append(title)
    return tuple(ran)


@contextmanager
def _explained(what: str, invariant: str) -> Iterator[None]:
    try:
        yield
    except Found as finding:
        raise AssertionError(f"{what}. {finding}. The invariant: {invariant}.") from None
    except PowerError:  # The question was wrong, not the subject.
        raise
    except Exception as error:
        raise AssertionError(
            f"{what}. Expected no error, got {type(error).__name__}: {str(error).rstrip('.')}. "
            f"The invariant: {invariant}.") from error
