"""PyTorch's own samples of its operators and modules, as cases to run twice.

The sample databases are imported inside functions. Importing them forbids changes of backend flags and
loads a hypothesis profile, for the whole process.
"""

import copy
import functools
import itertools
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

#: Returns a module to run and its arguments: a fresh copy at every call.
Build = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One sample of one operator or module, called in one way.

    Attributes:
        op: full name of the operator or module.
        variant: how it is called, a key of :data:`VARIANTS` or "module".
        index: number of the sample.
        build: makes new module and arguments.
        differentiable: the part of the output that a loss may use, as in PyTorch's own tests.
    """

    op: str
    variant: str
    index: int
    build: Build
    differentiable: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.op} [{self.variant}] sample {self.index}"


class Called(nn.Module):
    """An operator as a module.

    Args:
        function: the operator, or its method.
        prepare: ``(first, args, kwargs) -> (first, args, kwargs, extra output)``.
    """

    def __init__(self, function: Callable[..., Any], prepare: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.prepare = prepare

    def forward(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        first, args, kwargs, beside = self.prepare(first, args, kwargs)
        output = self.function(first, *args, **kwargs)
        return output if beside is None else (output, beside)


class OfItself(nn.Module):
    """An operator whose other arguments are computed from its first argument, by linear layers."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        super().__init__()
        self.function = function
        first, args, kwargs = arguments
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            0.05 * torch.randn(
                x.numel(), first.shape[-1], generator=generator, dtype=torch.float64).to(first.dtype)
            for x in tree_leaves((args, kwargs)) if _is_moved(x))

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        weights = iter(self.weights)

        def moved(x: Tensor) -> Tensor:
            if not _is_moved(x):
                return x
            made = F.linear(first, next(weights))
            return x + made.reshape(-1, x.numel()).mean(0).view(x.shape)

        args, kwargs = tree_map_only(Tensor, moved, (args, kwargs))
        return self.function(first, *args, **kwargs)


def _is_moved(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.layout == torch.strided and x.numel() > 0


def _as_given(first: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    return first, args, kwargs, None


def _views_of_results(first: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Makes every input a view, with an offset, of another operation's result."""
    return *tree_map_only(Tensor, _view_of_result, (first, args, kwargs)), None


def _view_of_result(x: Tensor) -> Tensor:
    if not x.requires_grad or x.layout != torch.strided or x.is_nested:
        return x
    return torch.stack((x.detach(), x)).select(0, 1)


def _saved_before(first: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Lets another operation save the first input: overwriting it must be noticed."""
    made = first.clone()
    return made, args, kwargs, made * made


#: name -> (attribute of an OpInfo, function that prepares the inputs).
VARIANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "function": ("op", _as_given),
    "function of views": ("op", _views_of_results),
    "function of itself": ("op", _as_given),
    "method": ("method_variant", _as_given),
    "in place": ("inplace_variant", _views_of_results),
    "in place after it was saved": ("inplace_variant", _saved_before),
}


@dataclass(frozen=True)
class Selection:
    """Selects operators and modules by their full names.

    Attributes:
        only: names to run; none means all.
        part: number, from 0, of one of the disjoint parts that the names are divided into.
        parts: number of parts.
    """

    only: Container[str] = ()
    part: int = 0
    parts: int = 1

    def __contains__(self, name: str) -> bool:
        # Use a checksum, so another version of PyTorch moves no operator to another part.
        return zlib.crc32(name.encode()) % self.parts == self.part and (
            not self.only or name in self.only)


def op_cases(
        dtype: torch.dtype, variants: Sequence[str], limit: int | None,
        selection: Selection) -> Iterator[Case]:
    """Returns samples of ``op_db``, on CPU.

    Args:
        dtype: dtype of the samples.
        variants: keys of :data:`VARIANTS`.
        limit: most samples of one operator; None: all.
        selection: operators to include.
    """
    for name, op in _ops().items():
        if name not in selection or not op.supports_autograd or (
                dtype not in op.supported_dtypes("cpu")):
            continue
        samples = _samples(name, dtype, limit and limit * _DRAWN_FROM)
        chosen = _spread(len(samples), limit)
        for variant, index in itertools.product(variants, chosen):
            sample = samples[index]
            if _can_run(op, variant, sample):
                yield Case(
                    name, variant, index, _op_build(op, variant, sample),
                    sample.output_process_fn_grad)


@functools.cache
def _ops() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.full_name: op for op in op_db}


# With a limit, one of so many samples is taken: making all samples takes longer than running some.
_DRAWN_FROM = 5


@functools.cache
def _samples(name: str, dtype: torch.dtype, most: int | None) -> list[Any]:
    """Returns the first samples of an operator. They must not be written to, see :func:`_copied`."""
    from torch.testing._internal.common_utils import set_rng_seed

    set_rng_seed(0)  # NumPy's and Python's too
    op = _ops()[name]
    # op.sample_inputs calls this function too, but also searches the stack for a test, which is slow.
    made = op.sample_inputs_func(op, "cpu", dtype, True)
    return list(itertools.islice(made, most))


def _can_run(op: Any, variant: str, sample: Any) -> bool:
    """Whether the variant exists; methods need a tensor, of full size if it is overwritten."""
    attribute = VARIANTS[variant][0]
    if getattr(op, attribute) is None or (
            attribute != "op" and not isinstance(sample.input, Tensor)):
        return False
    if variant == "function of itself" and not (
            _is_moved(sample.input) and sample.input.dim() and
            any(_is_moved(x) for x in tree_leaves((sample.args, sample.kwargs)))):
        return False
    return not (attribute == "inplace_variant" and sample.broadcasts_input)


def _op_build(op: Any, variant: str, sample: Any) -> Build:
    attribute, prepare = VARIANTS[variant]
    function = getattr(op, attribute)

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        args, kwargs = _copied(((sample.input, *sample.args), sample.kwargs))
        if variant == "function of itself":
            return OfItself(function, (args[0], args[1:], kwargs)), args, kwargs
        return Called(function, prepare), args, kwargs

    return build


def module_cases(
        dtype: torch.dtype, limit: int | None, selection: Selection) -> Iterator[Case]:
    """Returns samples of ``module_db``, on CPU, in training and evaluation mode; arguments as above."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if dtype not in info.supported_dtypes("cpu"):
            continue
        for training in (True, False) if info.train_and_eval_differ else (True,):
            name = f"{info.name}{'' if training else ' (eval)'}"
            if name not in selection:
                continue
            torch.manual_seed(0)
            samples = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=True, training=training)
            for index in _spread(len(samples), limit):
                yield Case(
                    name, "module", index, _module_build(info, samples[index], dtype, training),
                    lambda output: output)


def _module_build(info: Any, sample: Any, dtype: torch.dtype, training: bool) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        made, given = sample.constructor_input, sample.forward_input
        args, kwargs = _copied((given.args, given.kwargs))
        torch.manual_seed(0)
        module = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        if info.is_lazy:
            with torch.no_grad():
                module(*args, **kwargs)
        return module, args, kwargs

    return build


def _copied(arguments: Any) -> Any:
    """Copies everything at once: arguments that share memory share it in the copy."""
    memo: dict[int, Any] = {}
    for x in tree_leaves(arguments):
        # Other tensors have their own deep copy, which keeps strides.
        if isinstance(x, Tensor) and not (x.is_leaf and x.layout in _COPYABLE):
            memo[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    return copy.deepcopy(arguments, memo)


_COPYABLE = (torch.strided, torch.sparse_coo)


def _spread(total: int, limit: int | None) -> list[int]:
    """Returns at most ``limit`` of ``range(total)``, from the middle of equal parts."""
    if limit is None or total <= limit:
        return list(range(total))
    return [(2 * part + 1) * total // (2 * limit) for part in range(limit)]
