"""Numbers shared by the Triton kernels and their launcher."""

#: Float formats; bytes, which are no floats.
F32, F16, BF16, BYTE = 0, 1, 2, 3
INF_BITS = 0x7F800000
#: Statistics of a bucket if values are normalized: one, or several. (0: values are not normalized.)
ONE, SEVERAL = 1, 2
