"""What shows that kernels compute rightly on the GPU at hand: their cases, against fp64."""
