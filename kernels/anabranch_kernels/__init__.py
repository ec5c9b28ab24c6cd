"""Compiled kernels as torch ops. Import an op from its own module: `from anabranch_kernels.paged_attention.op import ...`"""
