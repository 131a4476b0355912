"""Weight and bias quantizers whose scale is learned: ``floor(P / s) * s``."""

import math
from typing import Any, Literal, get_args

import torch
from brevitas import config
from brevitas.function.ops_ste import scalar_clamp_min_ste
from torch import Tensor, nn

from brevitas_bp.core.nested_floor import (
    LEAST_SCALE,
    check_lam,
    check_shapes,
    nested_floor,
    nested_integers,
)
from brevitas_bp.errors import nearest

Granularity = Literal["row", "column", "channel", "scalar"]

# Dimensions of a parameter -> granularity -> the dimension along which scales differ. Rows and columns
# are those of the thesis, whose framework stores weights the other way round: (in, out) and
# (height, width, in, out).
_KEPT: dict[int, dict[str, int]] = {
    2: {"row": 1, "column": 0},
    3: {"channel": 1},
    4: {"row": 2, "column": 3, "channel": 1},
    5: {"channel": 1}}


def granularities(dims: int) -> list[str]:
    """Returns the granularities that a tensor with ``dims`` dimensions can have."""
    return ["scalar", *_KEPT.get(dims, {})]


def scale_shape(
        where: str, granularity: str, shape: tuple[int, ...],
        transposed: bool = False) -> tuple[int, ...]:
    """Returns the shape of the scale of a parameter.

    | granularity | Linear (out, in) | Conv2d (out, in, height, width) |
    | --- | --- | --- |
    | scalar | () | () |
    | row | (1, in) | (1, 1, height, 1) |
    | column | (out, 1) | (1, 1, 1, width) |
    | channel | - | (1, in, 1, 1) |

    Conv1d and Conv3d have "channel" and "scalar".

    Args:
        where: the caller, for the message.
        granularity: one of the table.
        shape: shape of the parameter.
        transposed: whether it belongs to a transposed convolution, (in, out, ...).

    Raises:
        ValueError: the granularity is unknown, or a tensor of this shape cannot have it.

    >>> scale_shape("here", "row", (10, 784)), scale_shape("here", "channel", (64, 3, 5, 5))
    ((1, 784), (1, 3, 1, 1))
    """
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"{where}: granularity must be one of {', '.join(get_args(Granularity))}, got "
            f"{granularity!r}{nearest(str(granularity), get_args(Granularity))}")
    if granularity == "scalar":
        return ()
    kept = _KEPT.get(len(shape), {}).get(granularity)
    if kept is None:
        raise ValueError(
            f"{where}: a tensor {list(shape)} cannot have the granularity {granularity!r}; it can have "
            f"{' or '.join(granularities(len(shape)))}")
    if transposed and granularity == "channel":
        kept = 0
    return tuple(n if d == kept else 1 for d, n in enumerate(shape))


class LearnedScale(nn.Module):
    """A scale per group that an optimizer moves. Fills ``scaling_impl``.

    The parameter ``value`` may become smaller than ``LEAST_SCALE`` = 1.1920929e-05 (an optimizer or a
    checkpoint may do so). The scale in use is ``max(value, LEAST_SCALE)`` nevertheless.

    Args:
        scale_shape: shape of the scale, see :func:`scale_shape`.
        scale_init: first value of all scales, at least ``LEAST_SCALE``.
        dtype: dtype of the parameter.
        device: its device.

    Raises:
        ValueError: ``scale_init`` is not finite, or too small.

    >>> LearnedScale((1, 2))()
    tensor([[1.1921e-05, 1.1921e-05]], grad_fn=<ScalarClampMinSteFnBackward>)
    """

    def __init__(
            self,
            scale_shape: tuple[int, ...],
            scale_init: float = LEAST_SCALE,
            dtype: torch.dtype | None = None,
            device: torch.device | None = None) -> None:
        super().__init__()
        if not LEAST_SCALE <= scale_init < math.inf:
            raise ValueError(
                "brevitas_bp.core.LearnedScale: scale_init must be a finite number >= 100 * 2**-23 = "
                f"{LEAST_SCALE:.8g}, got {scale_init!r}; smaller scales are not used")
        self.value = nn.Parameter(torch.full(scale_shape, scale_init, dtype=dtype, device=device))

    def forward(self) -> Tensor:
        """Returns the scale in use; its gradient is the parameter's."""
        return scalar_clamp_min_ste(self.value, LEAST_SCALE)

    def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # As in Brevitas' own scales, for checkpoints from before quantization.
        if config.IGNORE_MISSING_KEYS and prefix + "value" in missing_keys:
            missing_keys.remove(prefix + "value")

    def extra_repr(self) -> str:
        return f"shape={tuple(self.value.shape)}"


class NestedFloor(nn.Module):
    """Base of the learned quantizers: ``P_q = floor(P / s)``, ``P_r = P_q s``.

    Gradients and bias: see :func:`~brevitas_bp.core.nested_floor.nested_floor`. There is no clamp and no
    bit width: the range of the integers follows from the scale.

    Args:
        scaling_impl: the scale.
        lam: threshold of the gradient-ratio rule; 0 leaves scales as they are. None: the scale gets no
            gradient from here, but from a penalty (:mod:`brevitas_bp.nn.learned`).
        unanimity: whether a group without votes votes unanimously (the finished version of the thesis;
            False: the earlier one).

    Raises:
        TypeError: ``lam`` is no number.
        ValueError: ``lam`` is negative or not finite.
    """

    def __init__(
            self, scaling_impl: LearnedScale, lam: float | None, unanimity: bool = True) -> None:
        super().__init__()
        self.scaling_impl = scaling_impl
        self.lam = lam
        self.unanimity = unanimity

    @property
    def lam(self) -> float | None:
        """Threshold of the rule. It may be changed during training."""
        return self._lam

    @lam.setter
    def lam(self, lam: float | None) -> None:
        self._lam = check_lam("brevitas_bp.core.NestedFloor", lam)

    @property
    def scale(self) -> Tensor:
        """The scale in use, see :class:`LearnedScale`."""
        return self.scaling_impl()

    def values(self, x: Tensor) -> Tensor:
        """Returns ``P_r``, in the dtype of ``x``."""
        scale = self.scaling_impl.value
        check_shapes(f"brevitas_bp.core.{type(self).__name__}", x, scale)
        return nested_floor(x, scale, self.lam, self.unanimity)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Returns ``P_q`` as floats."""
        return nested_integers(x.detach(), self.scaling_impl.value)

    def extra_repr(self) -> str:
        return f"lam={self.lam}" + ("" if self.unanimity else ", unanimity=False")


class LearnedFloor(NestedFloor):
    """The learned quantizer as a parametrization of ``torch.nn.utils.parametrize``.

    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(3, 2)
    >>> floor = LearnedFloor(LearnedScale((1, 3)), lam=1e-10)
    >>> _ = parametrize.register_parametrization(layer, "weight", floor)
    >>> bool((layer.weight <= layer.parametrizations.weight.original).all())
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``P_r`` of the parameter ``x``."""
        return self.values(x)

    def right_inverse(self, x: Tensor) -> Tensor:
        """Returns ``x``: a weight that is assigned becomes the parameter, and is quantized when read."""
        return x


class SmallestBitWidth(nn.Module):
    """Computes the smallest signed width that holds all integers. Fills ``bit_width_impl``.

    At least 2 bits. The result is a 0-d float tensor, so nothing waits for a device.

    >>> SmallestBitWidth()(torch.tensor([-8., 7.])), SmallestBitWidth()(torch.tensor([8.]))
    (tensor(4.), tensor(5.))
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, integers: Tensor) -> Tensor:
        """Returns the width [0-d] for float integers of any shape."""
        if integers.numel() == 0:
            return integers.new_full((), 2.0)
        # In float32, -low - 1 would be rounded from 2**24 on.
        low, high = (bound.double() for bound in integers.aminmax())
        # n bits and a sign hold -2**n .. 2**n - 1. frexp gives the number of bits exactly.
        magnitude = torch.maximum(high, -low - 1)
        return (torch.frexp(magnitude).exponent.to(integers.dtype) + 1).clamp(min=2)


class LearnedFloorQuant(NestedFloor):
    """The learned quantizer in a Brevitas layer. Fills ``tensor_quant``.

    Args:
        scaling_impl: see :class:`NestedFloor`.
        bit_width_impl: the integers as floats -> their width.
        lam: see :class:`NestedFloor`.
        unanimity: see :class:`NestedFloor`.
    """

    def __init__(
            self,
            scaling_impl: LearnedScale,
            bit_width_impl: nn.Module,
            lam: float | None,
            unanimity: bool = True) -> None:
        super().__init__(scaling_impl, lam, unanimity)
        self.bit_width_impl = bit_width_impl

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (value, scale, zero point, bit width) of the parameter ``x``."""
        value, scale = self.values(x), self.scaling_impl()
        with torch.no_grad():
            bit_width = self.bit_width_impl(self.integers(x))
        return value, scale, torch.zeros((), dtype=scale.dtype, device=scale.device), bit_width
