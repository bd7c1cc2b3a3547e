"""What every launch does with its tensors: pointers, the stream, and checks that name the call."""

from collections.abc import Mapping

import torch
from torch import Tensor

# A tensor or None, and the dtype and the shape that are wanted.
Given = tuple[Tensor | None, torch.dtype, tuple[int, ...]]


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 is null, for a tensor without elements too."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def stream(where: torch.device) -> int:
    """The stream that torch launches on there; a CPU has none."""
    return torch.cuda.current_stream(where).cuda_stream if where.type == "cuda" else 0


def check(call: str, like: Tensor, given: Mapping[str, Given]) -> dict[str, int]:
    """The pointers of tensors by their names: contiguous, as wanted, and on the device of `like`.

    Raises:
        ValueError: one is not; the message names the call of csrc/cuda and the tensor.
    """
    for name, (tensor, dtype, shape) in given.items():
        if tensor is None:
            continue
        wanted = (dtype, shape, like.device, True)
        got = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
        if got != wanted:
            raise ValueError(f"{name} of {call} must be {_words(*wanted)}; got {_words(*got)}")
    return {name: pointer(tensor) for name, (tensor, *_) in given.items()}


def check_temperature(
    call: str, temperature_T: Tensor | None, like: Tensor, count: int
) -> dict[str, int]:
    """The pointer and the stride of a temperature per row, fp32 [T]; a stride of 0 shares one."""
    if temperature_T is None:
        return {"temperature": 0, "stride_temperature": 0}
    one = temperature_T if temperature_T.stride(0) else temperature_T[:1]
    shape = (count,) if temperature_T.stride(0) else (1,)
    given = {"temperature": (one, torch.float32, shape)}
    return check(call, like, given) | {"stride_temperature": temperature_T.stride(0)}


def _words(
    dtype: torch.dtype, shape: tuple[int, ...], where: torch.device, contiguous: bool
) -> str:
    return f"{dtype} {list(shape)} on {where}{'' if contiguous else ', not contiguous'}"
