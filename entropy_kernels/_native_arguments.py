"""What every call of the backend "cpu" needs: dtypes, pointers, the module, counted products."""

from types import ModuleType

import torch
from torch import Tensor

from . import _extensions

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_products = 0


def products() -> int:
    """Multiplications in the extension's products since it was loaded: half their flops."""
    return _products


def count(more: int) -> None:
    """Adds to `products()`."""
    global _products
    _products += more


def loaded() -> ModuleType:
    """The CPU kernels; an AssertionError where they are missing."""
    module, why = _extensions.load("cpu")
    assert module is not None, why
    return module


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether data_ptr() is the first of numel() values of `dtype` in this machine's memory."""
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def has_rows(matrix: Tensor) -> bool:
    """Whether it is a matrix of contiguous rows, of one of the dtypes, in this machine's memory."""
    contiguous = matrix.ndim == 2 and (matrix.stride(1) == 1 or matrix.shape[1] <= 1)
    return contiguous and matrix.dtype in DTYPES and matrix.device.type == "cpu"


def pointer(tensor: Tensor | None) -> int:
    """The tensor's data_ptr(), and 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
