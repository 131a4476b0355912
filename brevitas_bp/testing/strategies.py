"""Hypothesis strategies for tensors; they need the package hypothesis.

>>> from hypothesis import given, settings
>>> @settings(max_examples=5, derandomize=True, database=None)
... @given(float_tensors(values=("nan",), layouts=("contiguous", "transposed")))
... def test(x):
...     assert x.isnan().any()
>>> test()
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from brevitas_bp.testing.tensors import DTYPES, FINITE, LAYOUTS, VALUES, checked_names, normals

if TYPE_CHECKING:
    from hypothesis import strategies as st
else:
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError(
            "brevitas_bp.testing: strategies need the package hypothesis, which is not installed; "
            "install it (pip install hypothesis), or with the extra 'test' of this package") from error

#: 64-bit seeds, as ``Codec.encode`` takes them.
seeds = st.integers(0, 2**64 - 1)


def shapes(
        max_dims: int = 4, min_size: int = 1,
        max_size: int = 13) -> "st.SearchStrategy[tuple[int, ...]]":
    """Draws shapes of any rank up to ``max_dims``; () is a tensor of rank 0.

    Args:
        max_dims: largest rank.
        min_size: smallest size of a dimension; 0 allows empty tensors.
        max_size: largest size of a dimension.
    """
    return st.lists(st.integers(min_size, max_size), max_size=max_dims).map(tuple)


@st.composite
def float_tensors(
        draw: "st.DrawFn",
        dtypes: Sequence[torch.dtype] = DTYPES,
        values: Sequence[str] = tuple(FINITE),
        layouts: Sequence[str] = tuple(LAYOUTS),
        shape: "st.SearchStrategy[tuple[int, ...]] | None" = None) -> Tensor:
    """Draws tensors of any rank up to 4, layout, dtype and kind of values.

    Args:
        draw: given by hypothesis.
        dtypes: dtypes to choose from.
        values: kinds of values, names of :data:`~brevitas_bp.testing.tensors.VALUES`; finite ones by
            default. A kind "nan" has one NaN, or none if the tensor is
            empty or expanded.
        layouts: names of :data:`~brevitas_bp.testing.tensors.LAYOUTS`. A layout that the rank does not
            have, such as "channels_last", leaves the tensor contiguous.
        shape: strategy of shapes; None: :func:`shapes`.

    Raises:
        UnknownNameError: a name is in neither table.
    """
    kinds = checked_names("float_tensors: values", values, VALUES)
    names = checked_names("float_tensors: layouts", layouts, LAYOUTS)
    size = draw(shapes() if shape is None else shape)
    dtype = draw(st.sampled_from(tuple(dtypes)))
    kind = draw(st.sampled_from(kinds))
    layout = draw(st.sampled_from(names))
    normal = normals(size, draw(st.integers(0, 2**16)))
    return LAYOUTS[layout](VALUES[kind](normal, dtype).to(dtype))


@st.composite
def positions(
        draw: "st.DrawFn", dtypes: Sequence[torch.dtype] = DTYPES, top: int = 255) -> Tensor:
    """Draws what a rounding gets: numbers in steps, between 0 and ``top``, [buckets, elements].

    Some of them are integers, some lie next to an integer or halfway between two.

    Args:
        draw: given by hypothesis.
        dtypes: dtypes to choose from.
        top: the largest code.
    """
    dtype = draw(st.sampled_from(tuple(dtypes)))
    size = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    floor = torch.randint(0, top, size, generator=generator).double()
    fractions = torch.tensor([0.0, 2.0**-12, 0.25, 0.5, 0.75, 1 - 2.0**-12, 1.0], dtype=torch.float64)
    which = torch.randint(0, len(fractions), size, generator=generator)
    return (floor + fractions[which]).clamp(0, top).to(dtype)
