"""The backend "cpu": what the kernels of csrc/cpu are given, checked.

They take raw pointers and sizes, and know nothing of torch.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _extensions, _processor
from ._compiler import constant
from ._native_arguments import DTYPES, count, is_plain, loaded, pointer
from ._native_arguments import products as products
from ._native_rows import entropy_from_logits as entropy_from_logits
from ._native_rows import pair_dots as pair_dots
from ._native_rows import pair_sums as pair_sums
from ._rows import ForwardRows, active_rows, spread
from .head import Head

PANEL = 64  # tokens that the kernels' vectors hold together: kPanel


def cpu() -> ModuleType | None:
    """The CPU kernels, or None where they are missing."""
    return _extensions.load("cpu")[0]


@constant
def why_missing(name: str) -> str | None:
    """A sentence saying why extension `name` ("cpu") is missing; None where it is there."""
    return _extensions.load(name)[1]


def build(name: str) -> str:
    """The compiler of extension `name` and what it was built without. The caller has it."""
    module, why = _extensions.load(name)
    assert module is not None, why
    return module.compiler + ("" if module.openmp else ", without OpenMP: one thread")


@functools.cache
def instruction_set(dtype: torch.dtype) -> str:
    """The instruction set that heads of `dtype` run on; see _processor. The caller has `cpu()`."""
    return _processor.instruction_set(loaded(), DTYPES[dtype])


@functools.cache
def caches() -> dict[str, int]:
    """Bytes of this machine's `l2` and `last` cache, which blocks of the head are fitted to."""
    return dict(loaded().caches())


def radix_histogram(
    values: Tensor,
    mask: Tensor | None,
    prefix: int,
    shift: int,
    bits: int,
    prefix_bits: int,
    counts: Tensor,
) -> None:
    """Adds to counts[d] how many valid values carry digit d of their key.

    A value's key is an unsigned 32-bit integer that orders like the number: -0 equals +0, and a
    NaN of either sign ranks above +inf. Its digit is the `bits` bits above `shift`. Only keys
    whose top `prefix_bits` bits equal `prefix` are counted (0: all of them).

    values is contiguous fp32 on the CPU, mask contiguous bool of the same size (true is valid,
    None is all), counts contiguous int64 [2**bits] with bits <= 20. Integers: the same at any
    number of threads. Nothing is differentiable. The caller has checked `cpu()`.
    """
    module = loaded()
    assert is_plain(values, torch.float32)
    assert mask is None or (is_plain(mask, torch.bool) and mask.numel() == values.numel())
    assert 1 <= bits <= 20
    assert is_plain(counts, torch.int64)
    assert counts.numel() == 1 << bits
    assert 0 <= prefix_bits <= 32
    assert 0 <= prefix < 1 << prefix_bits
    assert 0 <= shift <= 32 - bits
    module.radix_histogram(
        values_ptr=values.data_ptr(),
        mask_ptr=0 if mask is None or mask.numel() == 0 else mask.data_ptr(),
        n=values.numel(),
        prefix=prefix,
        shift=shift,
        bits=bits,
        prefix_bits=prefix_bits,
        counts_ptr=counts.data_ptr(),
    )


def ratio_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    advantage_BL: Tensor,
    selected_BL: Tensor,
    weight_B: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_bound: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clipped loss and its gradient in one pass; see `_torch.ratio_loss` for what it returns.

    Sums are fp64 over fixed parts of the tokens: the same bits at any number of threads.
    """
    inputs = [
        x.contiguous() for x in (logprob_BL, old_logprob_BL, advantage_BL, selected_BL, weight_B)
    ]
    assert all(is_plain(x, torch.bool if x is inputs[3] else torch.float32) for x in inputs)
    assert all(x.shape == logprob_BL.shape for x in inputs[:4])
    assert weight_B.shape == logprob_BL.shape[:1]
    assert 0 < log_ratio_bound <= 80
    loss, grad_BL = torch.empty(()), torch.empty(logprob_BL.shape)
    sums, counts = torch.empty(4), torch.empty(3, dtype=torch.int64)
    logprob_ptr, old_logprob_ptr, advantage_ptr, selected_ptr, weight_ptr = map(pointer, inputs)
    loaded().ratio_loss(
        logprob_ptr=logprob_ptr,
        old_logprob_ptr=old_logprob_ptr,
        advantage_ptr=advantage_ptr,
        selected_ptr=selected_ptr,
        weight_ptr=weight_ptr,
        sequences=logprob_BL.shape[0],
        length=logprob_BL.shape[1],
        low=1 - clip_low,
        high=1 + clip_high,
        dual=math.inf if dual_clip is None else dual_clip,
        log_ratio=log_ratio_bound,
        threads=torch.get_num_threads(),
        loss_ptr=loss.data_ptr(),
        grad_ptr=grad_BL.data_ptr(),
        sums_ptr=sums.data_ptr(),
        counts_ptr=counts.data_ptr(),
    )
    return loss, grad_BL, sums, counts


def forward(
    head: Head,
    *,
    keep_logits: bool,
    isa: str | None = None,
    statistics: Tensor | None = None,
) -> ForwardRows:
    """Log-probability, entropy and what backward needs; rows without a target are zero and free.

    `statistics`, contiguous fp32 [6, T], is filled with what _rows.STATISTICS names. `isa` is one
    that the extension lists, else `instruction_set`. Sums over the vocabulary are divided among
    torch's threads in fixed parts: the same bits at the same number of threads. Logits are stored
    in the kernels' own order, and those of rows without a target too.
    """
    description, inputs = _describe(head)
    tokens, valid_T = head.target.shape[0], head.valid
    logits = torch.empty(stored_shape(tokens, head.weight.shape[0]) if keep_logits else (0,))
    index_R = None if keep_logits or bool(valid_T.all()) else valid_T.nonzero().squeeze(1)
    rows = torch.zeros(5, tokens)
    if statistics is not None:
        assert is_plain(statistics, torch.float32)
        assert statistics.shape == (6, tokens)  # what csrc fills
        statistics.zero_()
    count(
        loaded().linear_logprob_entropy(
            loaded().Head(**description, logits_ptr=pointer(logits if keep_logits else None)),
            index_ptr=pointer(index_R),
            count=tokens if index_R is None else index_R.numel(),
            rows_ptr=rows.data_ptr(),
            statistics_ptr=pointer(statistics),
            isa=isa or instruction_set(head.hidden.dtype),
        )
    )
    del inputs
    if statistics is not None:
        statistics.masked_fill_(~valid_T, 0)
    # An op's outputs are not views of one tensor.
    own_rows = [x.where(valid_T, 0) if keep_logits else x.clone() for x in rows]
    return ForwardRows._make([*own_rows, logits, None])


def stored_shape(tokens: int, vocabulary: int) -> tuple[int, int]:
    """The shape of the logits that forward stores: all those of whole panels of tokens."""
    return -(-tokens // PANEL) * PANEL, vocabulary


def backward(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    head: Head,
    rows: ForwardRows,
    needs: tuple[bool, bool, bool],
    *,
    isa: str | None = None,
    main_grad: Tensor | None = None,
    reduce_hidden: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from those of logprob, entropy and log-sum-exp.

    A gradient that `needs` does not ask for is None. So is the weight's where it is added to
    `main_grad`, contiguous [V, D] of any of the dtypes. Beyond its outputs it holds R x D fp32 for
    each thread, the same twice for all, and some MB of blocks.

    `reduce_hidden` takes the hidden states' gradient of the active rows, fp32 [R, D], and their
    numbers, [R], before it is rounded. It may change it in place, to add what other ranks have.
    """
    description, inputs = _describe(head)
    index_R = active_rows(gradients, head.target, head.ignore_index)
    grad_logprob_R, grad_entropy_R, grad_logsumexp_R = (
        None if grad_T is None else grad_T[index_R].float() for grad_T in gradients
    )
    row_values = torch.stack(rows[:5])
    need_hidden, need_weight, need_bias = needs
    dhidden_RD = torch.empty(index_R.numel(), head.hidden.shape[1]) if need_hidden else None
    add = need_weight and main_grad is not None
    alone = need_weight and not add
    own = torch.empty(head.weight.shape, dtype=head.weight.dtype) if alone else None
    dweight_VD = main_grad if add else own
    assert dweight_VD is None or (
        is_plain(dweight_VD, dweight_VD.dtype) and dweight_VD.shape == head.weight.shape
    )
    dbias_V = torch.empty(head.weight.shape[0]) if need_bias else None
    logits = rows.logits if rows.logits.numel() else None
    count(
        loaded().linear_logprob_entropy_backward(
            loaded().Head(**description, logits_ptr=pointer(logits)),
            index_ptr=index_R.data_ptr(),
            count=index_R.numel(),
            rows_ptr=row_values.data_ptr(),
            grad_logprob_ptr=pointer(grad_logprob_R),
            grad_entropy_ptr=pointer(grad_entropy_R),
            grad_logsumexp_ptr=pointer(grad_logsumexp_R),
            dhidden_ptr=pointer(dhidden_RD),
            dweight_ptr=pointer(dweight_VD),
            dweight_dtype=DTYPES[(head.weight if dweight_VD is None else dweight_VD).dtype],
            add_dweight=add,
            dbias_ptr=pointer(dbias_V),
            isa=isa or instruction_set(head.hidden.dtype),
        )
    )
    del inputs
    if dhidden_RD is not None and reduce_hidden is not None:
        reduce_hidden(dhidden_RD, index_R)
    dhidden_TD = None if dhidden_RD is None else spread(dhidden_RD, index_R, head.hidden)
    if dbias_V is not None and head.bias is not None:
        dbias_V = dbias_V.to(head.bias.dtype)
    return dhidden_TD, own, dbias_V


def _describe(head: Head) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The extension's description of a head, and the tensors that must outlive its use."""
    hidden_TD, weight_VD, temperature_T = head.hidden, head.weight, head.temperature_T
    assert hidden_TD.device.type == weight_VD.device.type == "cpu"
    assert hidden_TD.dtype == weight_VD.dtype
    hidden_TD = hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous()
    weight_VD = weight_VD if weight_VD.stride(1) == 1 else weight_VD.contiguous()
    inputs = {
        "hidden_ptr": hidden_TD,
        "weight_ptr": weight_VD,
        "target_ptr": head.target.contiguous(),
        "bias_ptr": None if head.bias is None else head.bias.float().contiguous(),
        "temperature_ptr": None if temperature_T is None else temperature_T.contiguous(),
    }
    return {
        **{name: pointer(tensor) for name, tensor in inputs.items()},
        "hidden_stride": hidden_TD.stride(0),
        "weight_stride": weight_VD.stride(0),
        "softcap": head.softcap or 0.0,
        "tokens": head.target.shape[0],
        "dim": hidden_TD.shape[1],
        "vocabulary": weight_VD.shape[0],
        "dtype": DTYPES[hidden_TD.dtype],
        "threads": torch.get_num_threads(),
        **caches(),
    }, [*inputs.values()]
