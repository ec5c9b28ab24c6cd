"""Compiled kernels as torch ops. An op is imported from its own module, `anabranch_kernels.<op>.op`."""
