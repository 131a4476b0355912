"""How a script stops: by the user's mistakes or by Ctrl-C, and with which exit status."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


class InputError(Exception):
    """A mistake in the user's input, shown without a traceback; exit status 2."""


class Interrupted(Exception):  # noqa: N818
    """Training stopped on request, after saving a checkpoint; exit status 130."""


class StopRequest:
    """True after Ctrl-C or SIGTERM. The loop checks it between steps, so every step completes."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one makes a request, the second one stops at once."""
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
    """Run a command line's `body`, print what stopped it, and return the exit status.

    Args:
        body: Does the work.
        program: Name to print before an error.
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
