"""Brevitas quantizers for the tensors that autograd saves for backward."""

__version__ = "0.1.0"
