"""How a script stops: the user's mistakes, Ctrl-C, and the exit status of both."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


class InputError(Exception):
    """A mistake in what the user passed: shown without a traceback, exit status 2."""


class Interrupted(Exception):  # noqa: N818
    """Training stopped on request after it saved a checkpoint: exit status 130."""


class StopRequest:
    """True once Ctrl-C or SIGTERM arrived; the loop asks between steps, so no step is torn."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal asks, a second one stops at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step (press again to stop at once)", file=sys.stderr)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` while the block runs."""
    stop = StopRequest()
    previous = {n: signal.signal(n, stop.handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_status(body: Callable[[], object], program: str, words: Sequence[str]) -> int:
    """Run a command line's `body` and say plainly what stopped it.

    Args:
        body: Does the work.
        program: Name shown before an error.
        words: The whole command that continues an interrupted run.
    """
    try:
        body()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{error or 'stopped in the middle of a step'}\nresume with: {shlex.join(words)}")
        return 130
    return 0
