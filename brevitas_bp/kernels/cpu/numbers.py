"""The arguments of a compiled bucket kernel: their places in one array of integers.

Encoder and decoder have one layout. Addresses, floats (as bits) and switches are integers, too. For a
small tensor, numba's own way of passing forty arguments takes longer than the kernel.
"""

(
    # Work: the common counter of all threads; buckets of a chunk; the bucket after the last.
    COUNTER, STEP, LAST,
    # The floats (address, elements), and the first bucket in them.
    VALUES, NUMEL, FIRST,
    # Elements of a bucket, and buckets of the whole tensor.
    SIZE, BUCKETS,
    # Layout of mixed widths, see format.widths: mixed buckets, multiplier and shift.
    MIXED, MULTIPLIER, SHIFT,
    # For base and mixed buckets: bits of a code, largest and smallest code.
    WIDTH, MIX_WIDTH, TOP, MIX_TOP, LOWEST, MIX_LOWEST,
    # Numbers of the rows of format.stages, and switches.
    RULE, ROUNDING, TRANSFORM, AFFINE, PADS_WITH_ZERO, BF16, OFFSET_FORM,
    SEED,
    # Stored bytes: codes (address, bytes); metadata (address, words of 16 bits).
    PAYLOAD, NBYTES, METADATA, WORDS,
    # Decoder only: the number of the dtype whose largest float bounds the decoded values.
    LIMIT,
    # Encoder only: the function whose derivative is encoded, or NORMALIZED, or 0.
    DERIVATIVE,
    # Rows: their elements (0: there are no rows) and buckets; flat index of the first element.
    ROW, PER_ROW, INDEX,
    # The affine map of format.normalizing: shifts and scales (address, number), elements of a
    # statistic, the largest scale (the bits of a float64), and whether values are divided by scales.
    SHIFTS, SHIFT_COUNT, SCALES, KINDS, INNER, LARGEST, DIVIDES,
) = range(41)
#: Count of the numbers in a call.
COUNT = DIVIDES + 1
