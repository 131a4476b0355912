"""Numbers that the launcher of the Triton kernels and the kernels share."""

#: Float formats.
F32, F16, BF16 = 0, 1, 2
#: Statistics of a bucket where values are normalized: one, or several. (0: values are as they are.)
ONE, SEVERAL = 1, 2
