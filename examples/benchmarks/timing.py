"""Timing and output that the benchmarks share."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def best_of(function: Callable[[], Any], seconds: float = 0.5, least: int = 3) -> float:
    """Smallest time of a call in seconds: the machine is shared, noise only ever adds."""
    function()
    best, spent, calls = float("inf"), 0.0, 0
    while spent < seconds or calls < least:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        best, spent, calls = min(best, elapsed), spent + elapsed, calls + 1
    return best


def best_on_device(function: Callable[[], Any], rounds: int = 20, calls: int = 5) -> float:
    """Smallest time of a call in seconds between two events on the current CUDA stream.

    Several calls lie between the events, so that the device does not wait for Python.
    """
    for _ in range(calls):
        function()
    best = float("inf")
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / calls / 1e3)
    return best


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Smallest time of each function, taken in turns, so that a slow phase hits all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": date.today().isoformat(), "commit": commit.stdout.strip(), "device": device,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__}


def show(title: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints rows as a table and writes them as JSON with the machine."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=2))
