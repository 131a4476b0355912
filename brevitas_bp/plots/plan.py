"""Plots a plan: bits and bytes of each saved tensor, what stays exact, and the budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from brevitas_bp.allocate.plan import BitPlan, PlannedTensor, parse_bytes
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    MUTED,
    NAMED,
    ORANGE,
    PALE,
    RED,
    name_modules,
    new_figure,
    tidy,
    written,
)
from brevitas_bp.text import short_mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Reach of a rounding error -> colour and label.
_REACHES = {
    "weight": (BLUE, "error reaches one weight"), "sum": (GREEN, "error reaches a sum"),
    "norm": (ORANGE, "error reaches all, weakly (norm)"), "all": (RED, "error reaches all")}
#: With fewer tensors, the picture is not filled: bars would be as wide as the picture.
_FEW = 8
_TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


def plot_plan(
        plan: BitPlan, budget: int | str | None = None, path: str | Path | None = None) -> Figure:
    """Plots the planned bits of each saved tensor, its bytes, and all bytes beside the budget.

    Tensors are in the order of the forward pass. Tensors that the plan keeps exact are hollow squares.
    The bottom shows all bytes: planned tensors, and tensors about which the plan has no say (exact ones,
    masks, indices).

    Args:
        plan: the plan.
        budget: draws a line; bytes, or text such as "400MB" or "10%", as for
            :func:`~brevitas_bp.plan_bit_widths`. None: no line, since a plan does not remember it.
        path: file to write; the extension chooses the format. None: write no file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the plan has no tensors, or the budget is not one.
    """
    if not plan.tensors:
        raise ValueError(
            "brevitas_bp.plots.plot_plan: a plan needs at least one tensor, got none; nothing that the "
            "network saves can be rounded")
    limit = None if budget is None else parse_bytes(budget, plan.exact_bytes)
    count = len(plan.tensors)
    figure = new_figure(min(15.0, 7.5 + 0.06 * count), 6.4)
    bits, sizes, whole = figure.subplots(3, 1, height_ratios=(3, 2, 0.55))
    sizes.sharex(bits)
    _draw_bits(bits, plan.tensors)
    _draw_sizes(sizes, plan.tensors)
    _draw_whole(whole, plan, limit)
    bits.set_xlim(-0.8, max(count, _FEW) - 0.2)
    bits.set_title(
        f"{count} tensor{'s' * (count > 1)}, {plan.average_bits:.2f} stored bits per element; expected "
        f"squared error {plan.error:.2g} of the gradient's", loc="left", fontsize=10, color=INK)
    handles, labels = bits.get_legend_handles_labels()
    more, names = sizes.get_legend_handles_labels()
    figure.legend(
        [*handles, *more], [*labels, *names], frameon=False, fontsize=8, loc="outside lower right",
        ncols=4, labelcolor=MUTED)
    return written(figure, path)


def _draw_bits(axes: Axes, tensors: tuple[PlannedTensor, ...]) -> None:
    for reach, (color, label) in _REACHES.items():
        mine = [i for i, t in enumerate(tensors) if t.reach == reach and not _is_exact(t)]
        if mine:
            axes.plot(
                mine, [_bits(tensors[i]) for i in mine], "o", color=color, markersize=_size(tensors),
                label=label, zorder=3)
    exact = [i for i, t in enumerate(tensors) if _is_exact(t)]
    if exact:
        axes.plot(
            exact, [_bits(tensors[i]) for i in exact], "s", color=INK, markersize=_size(tensors),
            fillstyle="none", label="kept exact", zorder=3)
    drawn = [_bits(t) for t in tensors]
    low, high = min(1.0, *drawn) / 1.3, max(8.0, *drawn) * 1.3
    axes.set_yscale("log", base=2)
    axes.set_yticks([], minor=True)
    axes.set_yticks(shown := [t for t in _TICKS if low < t < high], [f"{t:g}" for t in shown])
    axes.set_ylim(low, high)
    axes.set_ylabel("bits of each code", fontsize=9, color=MUTED)
    axes.tick_params(axis="x", labelbottom=False)
    tidy(axes, "y")


def _draw_sizes(axes: Axes, tensors: tuple[PlannedTensor, ...]) -> None:
    places = range(len(tensors))
    width = 0.8 if len(tensors) <= NAMED else 1.0
    axes.bar(
        places, [t.exact_bytes / 2**20 for t in tensors], width, color=PALE, zorder=2,
        label="plain autograd")
    axes.bar(
        places, [t.stored_bytes / 2**20 for t in tensors], width, color=BLUE, zorder=2,
        label="stored")
    axes.set_ylabel("MiB of each tensor", fontsize=9, color=MUTED)
    name_modules(axes, [_module(t) for t in tensors])
    tidy(axes, "y")


def _draw_whole(axes: Axes, plan: BitPlan, limit: int | None) -> None:
    """Draws one bar of all stored bytes, and the budget."""
    planned = sum(t.stored_bytes for t in plan.tensors)
    fixed, planned_mib = plan.fixed_bytes / 2**20, planned / 2**20
    axes.barh(0, fixed, color=GREY)
    axes.barh(0, planned_mib, left=fixed, color=BLUE)
    right = max(fixed + planned_mib, 0 if limit is None else limit / 2**20)
    told = (
        f"all: {short_mib(round(plan.stored_bytes))} of {short_mib(plan.exact_bytes)} "
        f"({plan.exact_bytes / plan.stored_bytes:.1f}x less) = {short_mib(plan.fixed_bytes)} exact, "
        f"masks, indices (grey) + {short_mib(round(planned))} planned (blue)")
    if limit is not None:
        axes.axvline(limit / 2**20, color=ORANGE, linewidth=2)
        told += f"; budget {short_mib(limit)} (line)"
    axes.set_title(told, loc="left", fontsize=8, color=INK)
    axes.set_xlim(0, 1.03 * right)
    axes.set_yticks([])
    axes.set_xlabel("MiB", fontsize=9, color=MUTED)
    tidy(axes, "x")
    axes.spines["left"].set_color(LIGHT)


def _size(tensors: tuple[PlannedTensor, ...]) -> float:
    return 5 if len(tensors) <= NAMED else 3.5


def _is_exact(tensor: PlannedTensor) -> bool:
    return Candidate.parse(tensor.chosen).bits is None


def _bits(tensor: PlannedTensor) -> float:
    """Returns the bits of each element's code; those of the dtype if the tensor is kept exact."""
    if _is_exact(tensor):
        return 8 * tensor.exact_bytes / max(1, tensor.elements)
    return Candidate.parse(tensor.chosen).nominal_bits


def _module(tensor: PlannedTensor) -> str:
    """Returns the module of the first site that saves the tensor."""
    return tensor.sites[0].partition(":")[0]
