"""Triton kernels, in folders by what they compute; on CPU tensors they run in the interpreter.

Names tell what a file holds:

- `launch.py` has the functions that the backends call, `launch_*.py` the steps they take. They run
  on the host: they choose tiles, allocate and launch.
- `*_kernel.py` and `*kernels.py` have the kernels, all named `*_kernel` and launched by those.
- `*_functions.py` have device functions, @triton.jit too, which kernels call. A device function of
  one file's kernels alone lies beside them and begins with `_`.
- The rest of `common/` runs on the host: the table of tiles, matrix products by torch, and how
  programs share values.
"""
