"""The byte format: what a quantizer is, and every byte it writes, in torch operations."""
