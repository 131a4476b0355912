"""Groups of neighbours and the quantizer of their means."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor

from brevitas_bp import quant
from brevitas_bp.core.average import AverageQuant, group_means, spread
from brevitas_bp.core.bucket import memory_order, unflatten
from tests.strategies import LAYOUTS, normals
from tests.support import same_bits

CONFIG = quant.ShiftedUint2Avg4DynamicActPerBucketFloat


def naive(x: Tensor, size: int) -> Tensor:
    """Computes means by Python loops over the rows of the last dimension, in index order."""
    rows = x.double().contiguous().view(-1, x.shape[-1]).tolist()
    means = [[sum(row[i:i + size]) / len(row[i:i + size]) for i in range(0, len(row), size)]
             for row in rows]
    return torch.tensor(means, dtype=torch.float64).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("size", [2, 4, 8])
def test_groups_run_along_the_last_dimension_in_every_layout(
        layout: Callable[[Tensor], Tensor], size: int) -> None:
    x = layout(normals((2, 5, 9, 11)))
    means = group_means(x, size)
    assert means.is_contiguous()
    # Sums of at most 8 numbers of size 4 in float64, and as many divisions.
    torch.testing.assert_close(means, naive(x, size), rtol=0, atol=32 * 2.0**-52)


def test_groups_along_memory_would_be_others() -> None:
    # Positive control: means of the flattened tensor in channels_last.
    x = LAYOUTS["channels_last"](normals((2, 4, 8, 8)))
    along_memory = x.permute(0, 2, 3, 1).reshape(-1, 4).mean(1).view(2, 8, 8, 1)
    assert not torch.allclose(along_memory.flatten(), group_means(x, 4).flatten())


@pytest.mark.parametrize(("shape", "expected"), [
    ((), (1,)), ((1,), (1,)), ((7,), (2,)), ((8,), (2,)), ((5, 1), (5, 1)), ((5, 3), (5, 1)),
    ((2, 0), (2, 0)), ((0, 6), (0, 2))])
def test_shapes_of_means(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert group_means(normals(shape), 4).shape == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_spread_undoes_the_mean_of_equal_neighbours(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(normals((2, 5, 9, 3)).float().repeat_interleave(4, -1)[..., :11])
    flat = spread(group_means(x, 4), 4, x.shape[-1], memory_order(x))
    assert torch.equal(unflatten(flat, x), x)


@pytest.mark.parametrize("size", [0, -2, 2.0, True, "4"])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="average_size must be a positive integer"):
        AverageQuant(torch.nn.Identity(), size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_value_is_like_the_input(
        dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(normals((2, 5, 9, 11)).to(dtype))
    value = CONFIG.tensor_quant(x)[0]
    assert (value.shape, value.dtype) == (x.shape, dtype)
    groups = value.unfold(-1, 3, 4)[..., :1, :]
    assert torch.equal(groups, groups[..., :1].expand_as(groups))


def test_the_gradient_of_a_layer_is_the_mean_over_each_group() -> None:
    x = normals((4, 16)).float().requires_grad_()
    y = QuantIdentity(CONFIG, return_quant_tensor=False, bit_width=8)(x)
    upstream = normals((4, 16), 1).float()
    (grad,) = torch.autograd.grad(y, x, upstream)
    groups = grad.view(4, 4, 4)
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    # The sum over a group passes through, except in two of 16 groups: those contain the ends of the
    # one bucket, which get a gradient through the range.
    error = (groups.sum(-1) - upstream.view(4, 4, 4).sum(-1)).abs() > 1e-5
    assert error.sum() <= 2


def test_a_layer_that_observes_changes_nothing() -> None:
    quantizer, x = CONFIG.tensor_quant, normals((4, 16)).float()
    quantizer.observer_only = True
    assert quantizer(x)[0] is x
    quantizer.observer_only = False
    assert not same_bits(quantizer(x)[0], x)
