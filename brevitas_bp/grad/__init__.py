"""Quantized gradients: the third kind of tensor in fully quantized training."""

from brevitas_bp.grad.wrapper import QuantGradientWrapper

__all__ = ["QuantGradientWrapper"]
