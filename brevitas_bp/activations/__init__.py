"""Activation functions: their derivatives, and few-bit tables of these derivatives."""
