"""Compiled kernels for CUDA tensors, by Triton."""
