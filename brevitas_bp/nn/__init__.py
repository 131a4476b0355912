"""Layers and weight quantizers that train through quantized tensors."""
