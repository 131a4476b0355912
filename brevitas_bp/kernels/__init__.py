"""Arrays in, arrays out: the byte format, its reference and its fast forms."""
