"""Quantized gradients."""
