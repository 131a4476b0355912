"""Fast forms of :mod:`brevitas_bp.format`: numba for CPUs, Triton for CUDA; ``dispatch`` chooses."""
