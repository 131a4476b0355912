"""Compiled kernels for CPU tensors, by numba. Importing this room imports numba."""
