"""The namespace of the registered ops, which is the package's own name.

Several copies of the package can so live in one process under different names, such as a copy
loaded from the Hugging Face Hub beside an installed one. The Hub's builder writes a file of this
name and these contents by itself.
"""

import torch

NAMESPACE = (__package__ or "entropy_kernels").replace(".", "_")
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` in this copy's namespace, as torch.library wants it."""
    return f"{NAMESPACE}::{op_name}"
