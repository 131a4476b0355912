"""Fast forms of :mod:`brevitas_bp.format`: numba on CPUs, Triton on CUDA; ``dispatch`` chooses."""

from brevitas_bp.kernels.dispatch import use

__all__ = ["use"]
