"""Analysis of the graphs of ``torch.compile``, and the hooks that are inlined into them."""
