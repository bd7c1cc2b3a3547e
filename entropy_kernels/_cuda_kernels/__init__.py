"""The backend "cuda": launches of the kernels of csrc/cuda."""
