"""The backend "cuda": launches of the kernels of csrc/cuda.

They take tensors, allocate the results, check what they are given and pass pointers on. No launch
waits for the GPU.
"""
