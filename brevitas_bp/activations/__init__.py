"""Activation functions: their derivatives in closed form, and few-bit tables of these."""
