"""Fast forms of :mod:`brevitas_bp.format`: numba for CPUs, Triton for CUDA; ``dispatch`` chooses."""

from brevitas_bp.kernels.dispatch import use

__all__ = ["use"]
