"""Levels of a quantizer for normally distributed values: Lloyd-Max levels of the standard normal.

The levels minimize the mean squared error of a standard normal variable (Lloyd, "Least squares
quantization in PCM", 1957; Max, "Quantizing for minimum distortion", 1960). They are symmetric. A value
gets the nearest level, so the thresholds are the midpoints of neighbouring levels.

The constants solve ``level = (pdf(a) - pdf(b)) / (cdf(b) - cdf(a))`` for the thresholds ``a`` and ``b``
around each level, to 1e-14. They are rounded to float32 where they are used, also for float64 data.
"""

from functools import cache
from itertools import pairwise
from math import erf, inf

import torch
from torch import Tensor

#: Bits of a code -> positive half of the levels.
POSITIVE_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797884583,),
    2: (0.452780038, 1.51041758),
    3: (0.24509418, 0.756005287, 1.34390926, 2.15194559),
    4: (0.128395036, 0.388048291, 0.656759143, 0.942340434, 1.25623119, 1.6180464, 2.06901717,
        2.73258948),
    5: (0.0658896565, 0.198051825, 0.331378311, 0.466699511, 0.604933619, 0.747135699, 0.894565105,
        1.0487833, 1.21180439, 1.38634038, 1.57622802, 1.78723323, 2.02872849, 2.31773949, 2.69111967,
        3.26073241),
    6: (0.0334095061, 0.100278288, 0.167296901, 0.234566987, 0.302192837, 0.37028265, 0.438949674,
        0.508313775, 0.578503013, 0.649655581, 0.721921921, 0.795467675, 0.870476604, 0.947154939,
        1.02573633, 1.10648823, 1.18972015, 1.27579451, 1.36514103, 1.45827639, 1.55583119, 1.65858889,
        1.76754189, 1.88397729, 2.00961113, 2.14681029, 2.29898119, 2.47130489, 2.67227387, 2.9174068,
        3.24043703, 3.74410129),
    7: (0.01682817, 0.0504908636, 0.0841726437, 0.117886283, 0.151644647, 0.185460716, 0.219347641,
        0.253318727, 0.28738755, 0.321567953, 0.355874032, 0.390320301, 0.424921662, 0.459693432,
        0.494651467, 0.529812217, 0.56519264, 0.600810528, 0.636684299, 0.672833323, 0.709277868,
        0.746039152, 0.783139646, 0.820602953, 0.858454227, 0.896719933, 0.9354285, 0.974609971,
        1.01429665, 1.05452323, 1.09532666, 1.13674736, 1.1788286, 1.22161746, 1.26516509, 1.30952764,
        1.35476625, 1.40094852, 1.44814897, 1.49644995, 1.54594374, 1.59673309, 1.64893389, 1.70267701,
        1.75811148, 1.81540775, 1.87476254, 1.93640459, 2.00060177, 2.06767154, 2.13799334, 2.21202755,
        2.29033923, 2.37363434, 2.46281147, 2.55904055, 2.66388655, 2.77951431, 2.90904713, 3.05724621,
        3.23193312, 3.44743037, 3.73493671, 4.18969393),
    8: (0.0084461933, 0.0253393836, 0.0422349833, 0.0591346025, 0.0760398582, 0.0929523557, 0.10987372,
        0.126805589, 0.143749565, 0.160707325, 0.177680492, 0.194670752, 0.211679757, 0.228709206,
        0.245760784, 0.262836218, 0.279937238, 0.297065586, 0.314223051, 0.331411391, 0.348632425,
        0.365888, 0.383179963, 0.400510222, 0.417880654, 0.435293198, 0.452749878, 0.470252663,
        0.487803608, 0.50540477, 0.523058295, 0.540766299, 0.558531046, 0.576354682, 0.594239593,
        0.612188101, 0.630202591, 0.648285508, 0.666439414, 0.684666753, 0.702970266, 0.721352637,
        0.739816606, 0.758365035, 0.777000844, 0.795727015, 0.814546704, 0.833463013, 0.852479279,
        0.871598899, 0.890825272, 0.910162032, 0.929612935, 0.949181795, 0.968872607, 0.988689363,
        1.00863647, 1.02871823, 1.04893923, 1.06930423, 1.08981812, 1.11048603, 1.1313132, 1.15230536,
        1.17346823, 1.19480765, 1.21632993, 1.23804176, 1.25994992, 1.28206146, 1.30438399, 1.32692528,
        1.34969366, 1.37269759, 1.39594638, 1.41944933, 1.44321656, 1.46725869, 1.49158704, 1.51621318,
        1.54114962, 1.56640983, 1.59200752, 1.61795783, 1.6442765, 1.67098033, 1.69808745, 1.72561693,
        1.75358939, 1.78202689, 1.81095314, 1.8403933, 1.87037516, 1.90092802, 1.9320842, 1.96387839,
        1.9963485, 2.02953577, 2.06348515, 2.09824657, 2.13387418, 2.17042828, 2.20797539, 2.2465899,
        2.28635454, 2.32736182, 2.36971712, 2.41353869, 2.4589622, 2.50614262, 2.55525947, 2.60652137,
        2.66017389, 2.71650767, 2.77587056, 2.83868575, 2.90547299, 2.97688222, 3.05374193, 3.13713264,
        3.22850013, 3.32984853, 3.44407177, 3.57558799, 3.73166633, 3.92563772, 4.18659544, 4.60353565)}


@cache
def levels(bit_width: int) -> tuple[float, ...]:
    """Returns all levels in ascending order, as float32 values. The code of a level is its place.

    >>> [round(level, 4) for level in levels(2)]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    positive = torch.tensor(POSITIVE_LEVELS[bit_width], dtype=torch.float32, device="cpu").tolist()
    return *(-level for level in reversed(positive)), *positive


@cache
def thresholds(bit_width: int) -> tuple[float, ...]:
    """Returns the positive thresholds in ascending order, as float32 values.

    >>> thresholds(1), [round(threshold, 4) for threshold in thresholds(2)]
    ((), [0.9816])
    """
    positive = levels(bit_width)[2**(bit_width - 1):]
    middles = [(a + b) / 2 for a, b in pairwise(positive)]
    return tuple(torch.tensor(middles, dtype=torch.float32, device="cpu").tolist())


@cache
def relative_error(bit_width: int) -> float:
    """Returns the squared error of unbiased levels over the energy of normally distributed values.

    The mean squared error of the levels is ``D``, for values of variance 1. The scale that makes them
    unbiased raises it to ``D / (1 - D)``.

    >>> [round(relative_error(bits), 4) for bits in (1, 2, 3, 4)]
    [0.5708, 0.1331, 0.0358, 0.0096]
    """
    positive = levels(bit_width)[2**(bit_width - 1):]
    edges = (0.0, *thresholds(bit_width), inf)
    # The levels are means of their intervals, so 1 - D is the energy of the levels.
    kept = sum(
        (erf(high / 2**0.5) - erf(low / 2**0.5)) * level * level
        for level, (low, high) in zip(positive, pairwise(edges), strict=True))
    return 1 / kept - 1


def nearest_level(u: Tensor, bit_width: int) -> Tensor:
    """Returns the codes of the nearest levels, as floats. Zero and NaN count as positive.

    The magnitude decides: a value at a threshold gets the larger level.
    """
    half = 2**(bit_width - 1)
    borders = torch.tensor(thresholds(bit_width), dtype=u.dtype, device=u.device)
    place = torch.bucketize(u.abs(), borders, right=True)
    return torch.where(u < 0, half - 1 - place, half + place).to(u.dtype)


def level_of(codes: Tensor, bit_width: int) -> Tensor:
    """Returns the levels of codes given as floats, in their dtype."""
    table = torch.tensor(levels(bit_width), dtype=codes.dtype, device=codes.device)
    return table[codes.to(torch.int64)]
