"""The byte format: defines a quantizer and every byte that it writes, in torch operations."""
