"""Runs a script under a memory allocator that gives memory back to the system.

    python -m brevitas_bp.run script.py [arguments]
    python -m brevitas_bp.run -m package.module [arguments]
    python -m brevitas_bp.run --allocator jemalloc script.py [arguments]

Use it for CPU training on Linux. There a process on the allocator of glibc may take several times the
memory that is stored: see NOTE [ Freed memory stays with the process ] in
:mod:`brevitas_bp.allocators`. The launcher starts Python again with an allocator's library in
LD_PRELOAD. Worker processes inherit that variable. The library comes from a package
(``pip install brevitas-bp[allocator]``) or from the system.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from brevitas_bp.allocators import NAMES, SETTINGS, find

_NONE = (
    "brevitas_bp.run: no allocator was found, so the script uses the system's allocator; "
    "pip install brevitas-bp[allocator], or install libtcmalloc-minimal4 or libjemalloc2")


def command(
        arguments: Sequence[str], found: tuple[str, str] | None,
        environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Returns the command that replaces this process, and its environment.

    Args:
        arguments: the arguments after the launcher's own options.
        found: allocator and library; None: no allocator was found.
        environ: environment of this process.
    """
    options = _interpreter_options(sys.orig_argv[1:])
    environ = dict(environ)
    if found is not None:
        name, path = found
        before = environ.get("LD_PRELOAD")
        environ["LD_PRELOAD"] = f"{path}:{before}" if before else path
        for setting, value in SETTINGS.get(name, {}).items():
            environ.setdefault(setting, value)
    return [sys.executable, *options, *arguments], environ


def _interpreter_options(arguments: Sequence[str]) -> list[str]:
    """Returns the options before ``-m``.

    ``-m`` may end a group of options (``-Om``) or begin the module's name.
    """
    options: list[str] = []
    for argument in arguments:
        if argument.startswith("-m"):
            return options
        if re.fullmatch("-[A-VYZa-z]+m", argument):
            return [*options, argument[:-1]]
        options.append(argument)
    return []


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Replaces this process with the script's process.

    Raises:
        SystemExit: no script is given, or the allocator is unknown or not installed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = None
    if given[:1] == ["--allocator"]:
        wanted, given = (given[1] if len(given) > 1 else ""), given[2:]
        if wanted not in NAMES:
            raise SystemExit(
                f"brevitas_bp.run: --allocator must be one of {', '.join(NAMES)}, got "
                f"{wanted!r}")
    if given[:1] in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0)
    if not given or (given[0].startswith("-") and given[0] not in ("-m", "-c")):
        raise SystemExit(
            "brevitas_bp.run: expected script.py, -m module or -c command, got "
            f"{given[0] if given else 'nothing'!r}; see python -m brevitas_bp.run --help")
    found = find(wanted)
    if found is None:
        if wanted is not None:
            raise SystemExit(
                f"brevitas_bp.run: the library of {wanted} was not found; leave out --allocator to take "
                "any that is installed")
        print(_NONE, file=sys.stderr)
    argv, environ = command(given, found, dict(os.environ))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, environ)


if __name__ == "__main__":
    main()
