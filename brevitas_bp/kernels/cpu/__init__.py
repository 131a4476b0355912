"""Compiled kernels for CPU tensors, by numba. Importing this package imports numba."""
