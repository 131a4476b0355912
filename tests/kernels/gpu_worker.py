"""Runs the Triton kernels without a device, in a separate process (see test_gpu.py).

Triton reads TRITON_INTERPRET when it is first imported, and Brevitas imports Triton. So a test session
cannot switch the interpreter on later.
"""

import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec


class Worker:
    """A process with its own environment that runs functions one after another."""

    def __init__(self, **environment: str) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with patch.dict(os.environ, environment):
            self._pool.submit(os.getpid).result()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of ``function``, which must be picklable by name."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


# Tensors are sent as numpy arrays: torch would put each into shared memory.
Array = tuple[Any, torch.dtype]
Statistics = tuple[Array, Array | None, int] | None


def to_array(x: Tensor) -> Array:
    # The stride of a single element may be anything.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8).numpy(), x.dtype


def from_array(array: Array) -> Tensor:
    return torch.from_numpy(array[0]).view(array[1])


def from_arrays(arrays: list[Array], spec: BucketQuantSpec) -> Encoded:
    payload, metadata = map(from_array, arrays)
    return Encoded(payload, metadata, spec.affine)


def to_statistics(affine: Affine | None) -> Statistics:
    if affine is None:
        return None
    shift = None if affine.shift is None else to_array(affine.shift)
    return to_array(affine.scale), shift, affine.inner


def from_statistics(statistics: Statistics) -> Affine | None:
    if statistics is None:
        return None
    scale, shift, inner = statistics
    return Affine(from_array(scale), None if shift is None else from_array(shift), inner)


class Interpreted:
    """The kernels in Triton's interpreter: CPU tensors and numpy arithmetic."""

    def __init__(self) -> None:
        self._worker = Worker(TRITON_INTERPRET="1")

    def encode(
            self, flat: Tensor, spec: BucketQuantSpec, seed: int,
            affine: Affine | None = None) -> Encoded:
        arrays = self._worker.run(
            _encode, to_array(flat.contiguous()), spec, seed, to_statistics(affine))
        return from_arrays(arrays, spec)

    def decode(
            self, encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
            dtype: torch.dtype, affine: Affine | None = None) -> Tensor:
        arrays = [to_array(t) for t in encoded.tensors]
        return from_array(self._worker.run(
            _decode, arrays, spec, seed, numel, dtype, to_statistics(affine)))

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        """Calls a function of a module of ``kernels.gpu``.

        Returns its result, and those flat tensors among the arguments that it has changed.
        """
        arrays = [to_array(a) if isinstance(a, Tensor) else a for a in arguments]
        result, changed = self._worker.run(_call, module, function, arrays)
        return _tensors_of(result), [from_array(a) for a in changed]

    @contextmanager
    def constant(self, name: str, value: int) -> Iterator[None]:
        """Sets one of the kernels' constants to another value within the block."""
        before = self._worker.run(_set_constant, name, value)
        try:
            yield
        finally:
            self._worker.run(_set_constant, name, before)

    def close(self) -> None:
        self._worker.close()


def _interpreted_kernels() -> Any:
    from triton.runtime import interpreter

    from brevitas_bp.kernels.gpu import launch as gpu

    # numpy warns of overflows that the kernels handle. The launch options switch off the check for
    # integer overflow, but the interpreter has its own options.
    warnings.simplefilter("ignore", RuntimeWarning)
    builder: Any = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    return gpu


def _is_array(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def _tensors_of(value: Any) -> Any:
    if _is_array(value):
        return from_array(value)
    return tuple(map(_tensors_of, value)) if isinstance(value, tuple) else value


def _arrays_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return to_array(value)
    return tuple(map(_arrays_of, value)) if isinstance(value, tuple) else value


def _call(module: str, function: str, arguments: list[Any]) -> tuple[Any, list[Array]]:
    _interpreted_kernels()
    given = [from_array(a).clone() if _is_array(a) else a for a in arguments]
    before = [a.clone() for a in given if isinstance(a, Tensor)]
    found = getattr(importlib.import_module(f"brevitas_bp.kernels.gpu.{module}"), function)(*given)
    after = [a for a in given if isinstance(a, Tensor)]
    changed = [to_array(b) for a, b in zip(before, after) if not torch.equal(
        a.view(torch.uint8), b.view(torch.uint8))]
    return _arrays_of(found), changed


def _encode(
        flat: Array, spec: BucketQuantSpec, seed: int, statistics: Statistics) -> list[Array]:
    x = from_array(flat)
    plan = _interpreted_kernels().launcher(spec, x.numel(), x.dtype)
    return [to_array(t) for t in plan.encode(x, seed, affine=from_statistics(statistics))]


def _decode(
        arrays: list[Array], spec: BucketQuantSpec, seed: int, numel: int, dtype: torch.dtype,
        statistics: Statistics) -> Array:
    plan = _interpreted_kernels().launcher(spec, numel, dtype)
    payload, metadata = map(from_array, arrays)
    return to_array(plan.decode(
        payload, metadata, seed, torch.Size((numel,)), (1,), from_statistics(statistics)))


def _set_constant(name: str, value: int) -> int:
    from triton.language import constexpr

    from brevitas_bp.kernels.gpu import places

    before: Any = getattr(places, name)
    setattr(places, name, constexpr(value))
    return before.value


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        name: name of the kernel.
        ptx: its assembly.
        key: identifies the kernel among those compiled from one function.
    """

    name: str
    ptx: str
    key: str

    def operations(self, pattern: str) -> set[str]:
        """Returns mnemonics of the assembly that match a regular expression."""
        return set(re.findall(rf"^\s*(?:@!?%p\d+ )?({pattern}\S*)\s", self.ptx, re.MULTILINE))

    @property
    def inexact(self) -> set[str]:
        """Operations that do not give the reference's bits."""
        return self.operations(r"fma\.") | self.operations(r"(?:div|rcp|sqrt)\.(?!rn|[us]\d)") | (
            self.operations(r"\w+\.(?:\w+\.)*ftz"))


class _NoDevice:
    """Replaces Triton's driver: compiles for a device that is not present."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return device


class _CompileOnly:
    """Replaces a kernel: a launch compiles it with the launch's arguments, and records the result."""

    def __init__(self, kernel: Any, found: list[Compiled], **options: Any) -> None:
        self._kernel, self._found, self._options = kernel, found, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            options.update(self._options)
            compiled = self._kernel.warmup(*arguments, grid=grid, **options)
            self._found.append(Compiled(self._kernel.__name__, compiled.asm["ptx"], compiled.hash))

        return launch


def compile_functions(capability: int, dtype: torch.dtype, **options: Any) -> list[Compiled]:
    """Compiles the kernels of masks and differences."""
    from triton.runtime import driver

    from brevitas_bp.activations.predictions import PREDICTIONS
    from brevitas_bp.format.masks import Interval
    from brevitas_bp.kernels.gpu import differences, masks

    driver.set_active(_NoDevice(capability))  # pyright: ignore[reportArgumentType]
    found: list[Compiled] = []
    x, row, prediction = torch.empty(5000, dtype=dtype), 1000, PREDICTIONS["gelu"]
    with ExitStack() as stack:
        for module in (masks, differences):
            stack.enter_context(patch.dict(module.KERNELS, {
                name: _CompileOnly(kernel, found, **options)
                for name, kernel in module.KERNELS.items()}))
        mask = masks.pack_interval(x, Interval(-1.0, 1.0, nan=True))[0]
        masks.pack_bits(x > 0)
        masks.unpack_select(mask, 5000, 0, 1, torch.bool)
        masks.unpack_select(mask, 5000, 0, 1, dtype)
        strays = masks.find_strays(x, mask)
        masks.mask_(x, mask, strays)
        masks.rectify_(x, mask)
        differences.fill_zeros(x, row, strays)
        wide, factors = x.float(), torch.empty(row)
        _, used = differences.subtract_prediction(wide, wide.clone(), prediction, row, factors)
        differences.add_prediction_(wide, wide.clone(), prediction, row, used)
    return found


def compile_kernels(
        capability: int, dtype: torch.dtype, spec: BucketQuantSpec,
        calls: list[tuple[int, int]], affine: Affine | None = None,
        **options: Any) -> list[Compiled]:
    """Compiles encode and decode for calls (number of elements, seed)."""
    from triton.runtime import driver

    from brevitas_bp.kernels.gpu import launch as gpu

    driver.set_active(_NoDevice(capability))  # pyright: ignore[reportArgumentType]
    found: list[Compiled] = []
    replaced = {
        name: _CompileOnly(getattr(gpu, name), found, **options)
        for name in ("_encode_kernel", "_decode_kernel", "_encode_in_units_kernel",
                     "_decode_in_units_kernel")}
    with patch.multiple(gpu, **replaced):
        for numel, seed in calls:
            plan = gpu.launcher(spec, numel, dtype)
            stored = plan.encode(torch.empty(numel, dtype=dtype), seed, affine=affine)
            plan.decode(*stored, seed, torch.Size((numel,)), (1,), affine)
    return found
