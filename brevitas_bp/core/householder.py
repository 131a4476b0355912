"""Block Householder transform of rows: spreads a large row over many small ones."""

from typing import NamedTuple

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import unit_of

# A row whose range is below this share of the largest counts as if it had this range. Rows of zeros
# would otherwise be scaled without limit.
_SMALLEST = 2.0**-40


class Blocks(NamedTuple):
    """Which rows a transform mixes, for N rows sorted by falling range.

    Attributes:
        order: index of each sorted row in the matrix, [N].
        leader: sorted index of the row that leads the block of each sorted row, [N]. Leaders come first.
        is_leader: bool [N].
        size: number of rows in the block of each sorted row, [N], in the dtype of the matrix.
        scale: factor of each sorted row before it is mixed, [N].
    """

    order: Tensor
    leader: Tensor
    is_leader: Tensor
    size: Tensor
    scale: Tensor


def blocks_of(ranges: Tensor) -> Blocks:
    """Groups rows into blocks, each with one large row and as many small ones as its range deserves.

    The G largest rows lead. G is the largest number with
    ``(N - G) * range_G >= range_1 + ... + range_G``. The others follow; a leader gets a share of them
    that is proportional to its range. The scales minimise the variance of a row-wise quantizer,
    ``s1**-2 + (n - 1) * s2**-2`` for a given range of the mixed rows: ``s1 = w1**(-1/3)`` and
    ``s2 = (w2 / (n - 1))**(-1/3)``, with ``w1 = range_leader / sqrt(n)`` and
    ``w2 = range_follower * max|Q|``.

    Nothing waits for the device.

    Args:
        ranges: largest minus smallest element of each row, finite, [N] with N >= 2.
    """
    count, dtype, device = len(ranges), ranges.dtype, ranges.device
    ranges, order = torch.sort(ranges.double(), descending=True, stable=True)
    largest = ranges[0]
    ranges = torch.where(largest > 0, ranges / largest.clamp_min(torch.finfo(torch.float64).tiny), 1)
    ranges = ranges.clamp_min(_SMALLEST)
    place = torch.arange(count, device=device)
    sums = ranges.cumsum(0)
    leads = (count - 1 - place) * ranges >= sums
    leads[-1] = False
    last_leader = (leads * place).amax()
    is_leader, followers = place <= last_leader, count - 1 - last_leader
    shares = sums / sums.gather(0, last_leader.view(1)) * followers
    ends = torch.where(place < last_leader, (shares + 0.5).floor().to(torch.int64), followers)
    starts = torch.where(place > 0, ends.roll(1), 0)
    leader = torch.where(
        is_leader, place, torch.searchsorted(ends, place - last_leader - 1, right=True))
    size = (1 + ends - starts)[leader].double()
    first_follower = (last_leader + 1 + starts).clamp_max(count - 1)
    scale = torch.where(
        is_leader, _cube_root_of(ranges / size.sqrt()),
        _cube_root_of(ranges[first_follower][leader] * _largest_entry(size) / (size - 1).clamp_min(1)))
    return Blocks(order, leader, is_leader, size.to(dtype), scale.to(dtype))


def _cube_root_of(weight: Tensor) -> Tensor:
    return weight.pow(-1 / 3)


def _largest_entry(size: Tensor) -> Tensor:
    """Returns ``max|Q|`` of the reflection of ``size`` rows; of two rows, no two followers are mixed."""
    size = size.clamp_min(2)
    first, between = size.rsqrt(), 1 / (size - size.sqrt())
    among = torch.where(size > 2, between, 0)
    return torch.maximum(torch.maximum(first, (1 - between).abs()), among)


class RowHouseholder(NamedTuple):
    """An invertible linear map of the rows of a matrix, ``Y = T X``, made for one matrix.

    T is block diagonal after a permutation of rows. A block is ``Q diag(s1, s2, ..., s2)``. Q is the
    Householder reflection that maps the first unit vector to ``(1, ..., 1) / sqrt(n)``: it spreads the
    block's one large row over all its rows. A quantizer with one scale for each row then has nearly
    ``1 / n`` of the variance. For rows of equal range, it has about the variance that it has without T.

    T is never stored as a matrix: the map takes a few passes over X. It depends on X, but not on any
    noise. So if a quantizer is unbiased, then so is ``T^-1 quantizer(T X)``.

    Source: Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks",
    2020. That paper's code has no guard for two rows or fewer.

    Attributes:
        blocks: see :class:`Blocks`.
        unit: power of two near the largest magnitude, 0-d; so nothing overflows.
        inverse_unit: its reciprocal.
        poison: 0, or NaN if an element of the matrix is not finite.

    >>> x = torch.randn(7, 5) * torch.tensor([100.0, 1, 1, 1, 1, 1, 1])[:, None]
    >>> transform = RowHouseholder.of(x)
    >>> bool(torch.allclose(transform.inverse(transform.forward(x)), x, atol=1e-4))
    True
    """

    blocks: Blocks
    unit: Tensor
    inverse_unit: Tensor
    poison: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "RowHouseholder":
        """Returns the transform for ``x`` [N, D], N >= 2."""
        low, high = x.amin(1), x.amax(1)
        poison = (low.sum() + high.sum()) * 0
        poison = torch.where(low.isfinite().all() & high.isfinite().all(), 0, poison * torch.nan)
        # Halves, so that the range of finite rows is finite.
        ranges = (high / 2 - low / 2).nan_to_num(0, 0, 0)
        unit, _ = unit_of(torch.maximum(high, -low).nan_to_num(0, 0, 0).amax().view(1))
        # Far from the largest and the smallest float, so that products with scales are normal numbers.
        unit = unit[0].clamp(2.0**-100, 2.0**100)
        return cls(blocks_of(ranges), unit, 1 / unit, poison)

    def forward(self, x: Tensor) -> Tensor:
        """Maps rows [N, D] to mixed rows [N, D], in another order."""
        factor = self.blocks.scale * self.inverse_unit
        return self._reflect(x.index_select(0, self.blocks.order) * factor.unsqueeze(1))

    def inverse(self, y: Tensor) -> Tensor:
        """Maps mixed rows back."""
        # Through the inverse of a permutation, each row is written once.
        place = torch.empty_like(self.blocks.order)
        place = place.scatter(0, self.blocks.order, torch.arange(len(y), device=y.device))
        factor = self.unit / self.blocks.scale + self.poison
        return self._reflect(y).index_select(0, place) * factor.index_select(0, place).unsqueeze(1)

    def _reflect(self, z: Tensor) -> Tensor:
        """Multiplies sorted rows by Q, which is its own inverse.

        A leader becomes ``(leader + sum of its followers) / sqrt(n)``. To a follower is added
        ``leader / sqrt(n) - sum of the followers / (n - sqrt(n))``.
        """
        _, leader, is_leader, size, _ = self.blocks
        if z.device.type == "cpu" and not z.requires_grad and not torch.compiler.is_compiling():
            # Here, reading the number of leaders waits for nothing.
            return self._reflect_apart(z, int(is_leader.sum()))
        is_leader, root = is_leader.unsqueeze(1), size.sqrt().unsqueeze(1)
        sums = torch.zeros_like(z).index_add(0, leader, torch.where(is_leader, 0, z))
        shift = z / root - sums / _between(size)
        return torch.where(is_leader, (z + sums) / root, z + shift.index_select(0, leader))

    def _reflect_apart(self, z: Tensor, leaders: int) -> Tensor:
        leader, size = self.blocks.leader[leaders:], self.blocks.size[:leaders]
        first, rest, root = z[:leaders], z[leaders:], size.sqrt().unsqueeze(1)
        sums = torch.zeros_like(first).index_add_(0, leader, rest)
        out = torch.empty_like(z)
        torch.div(first + sums, root, out=out[:leaders])
        shift = (first / root).sub_(sums.div_(_between(size)))
        torch.add(rest, shift.index_select(0, leader), out=out[leaders:])
        return out


def _between(size: Tensor) -> Tensor:
    """Returns ``n - sqrt(n)``, and 1 for a leader without followers."""
    return (size - size.sqrt() + (size == 1)).unsqueeze(1)
