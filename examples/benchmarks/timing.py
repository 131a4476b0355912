"""Timing shared by the benchmarks. It takes smallest times: other processes can only add time."""

import time
from collections.abc import Callable
from typing import Any

import torch


def best_of(function: Callable[[], Any], seconds: float = 0.5, least: int = 3, calls: int = 1) -> float:
    """Returns the smallest time of a call, in seconds.

    Args:
        function: the call to time. One uncounted call comes first.
        seconds: least time to spend.
        least: least number of measurements.
        calls: calls in each measurement; use several if one takes microseconds.
    """
    function()
    best, spent, measured = float("inf"), 0.0, 0
    while spent < seconds or measured < least:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        best, spent, measured = min(best, elapsed / calls), spent + elapsed, measured + 1
    return best


def best_on_device(function: Callable[[], Any], rounds: int = 20, calls: int = 5) -> float:
    """Returns the smallest time of a call, in seconds between two events on the current CUDA stream.

    Several calls run between the events, so that the device does not wait for Python.
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
    """Returns the smallest time of each function; they take turns, so a slow phase hits all of them."""
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
