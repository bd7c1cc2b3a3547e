"""Triton kernels, one file an op; on CPU tensors they run in Triton's interpreter."""
