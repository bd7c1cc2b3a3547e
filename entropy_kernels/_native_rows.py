"""The backend "cpu" on rows: products of pairs of rows, and entropies of rows of logits.

P pairs, D hidden, R rows of logits, V vocabulary.
"""

import torch
from torch import Tensor

from . import _processor
from ._native_arguments import DTYPES, count, has_rows, is_plain, loaded, pointer


def pair_dots(left: Tensor, right: Tensor, i_P: Tensor, j_P: Tensor) -> Tensor:
    """left[i] . right[j] of each pair, fp32 [P], with fp32 sums.

    left and right are [*, D] of one dtype with contiguous rows; i_P and j_P are int64. Each product
    has a sum of its own: the same bits at any number of threads.
    """
    assert has_rows(left)
    assert has_rows(right)
    assert left.dtype == right.dtype
    assert left.shape[1] == right.shape[1]
    assert i_P.shape == j_P.shape
    i_P, j_P = _indices(i_P, left.shape[0]), _indices(j_P, right.shape[0])
    dots_P = torch.empty(i_P.shape)
    count(
        loaded().pair_dots(
            left_ptr=left.data_ptr(),
            left_stride=left.stride(0),
            right_ptr=right.data_ptr(),
            right_stride=right.stride(0),
            dtype=DTYPES[left.dtype],
            left_row_ptr=i_P.data_ptr(),
            right_row_ptr=j_P.data_ptr(),
            pairs=i_P.numel(),
            dim=left.shape[1],
            threads=torch.get_num_threads(),
            out_ptr=dots_P.data_ptr(),
            isa=_isa(),
        )
    )
    return dots_P


def pair_sums(
    scale_P: Tensor, rows: Tensor, i_P: Tensor, place_P: Tensor, out: Tensor, add: bool
) -> None:
    """Writes into out[place], or adds to it, the sum of scale * rows[i] over each run of `place_P`.

    place_P does not fall. rows is [*, D] and out [*, D], of any of the dtypes and with contiguous
    rows; scale_P is fp32, the indices int64. A sum is fp32 and is rounded once. Rows whose scale is
    exactly 0 are not read, and a run of zeros alone is not written. Long runs are summed in fixed
    pieces, which are merged in order: the same bits at any number of threads.
    """
    assert scale_P.dtype == torch.float32
    assert scale_P.device.type == "cpu"
    assert has_rows(rows)
    assert has_rows(out)
    assert rows.shape[1] == out.shape[1]
    assert scale_P.shape == i_P.shape == place_P.shape
    scale_P = scale_P.contiguous()
    i_P, place_P = _indices(i_P, rows.shape[0]), _indices(place_P, out.shape[0])
    assert bool((place_P[1:] >= place_P[:-1]).all()), "places must not fall"
    count(
        loaded().pair_sums(
            scale_ptr=scale_P.data_ptr(),
            rows_ptr=rows.data_ptr(),
            rows_stride=rows.stride(0),
            rows_dtype=DTYPES[rows.dtype],
            row_ptr=i_P.data_ptr(),
            place_ptr=place_P.data_ptr(),
            pairs=i_P.numel(),
            dim=rows.shape[1],
            threads=torch.get_num_threads(),
            out_ptr=out.data_ptr(),
            out_stride=out.stride(0),
            out_dtype=DTYPES[out.dtype],
            add=add,
            isa=_isa(),
        )
    )


def entropy_from_logits(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """The entropy of softmax(logits / temperature) per row, fp32 [R], in nats.

    logits is [R, V] of any of the dtypes with contiguous rows, read once and not copied;
    temperature is fp32 [R] or [1], above 0, and None for 1. Entries of -inf have no probability. A
    row of -inf alone, or with a NaN or inf, gives NaN. The maximum is left out of the sums, so
    entropies of 1e-12 keep their digits. The same bits at any number of threads.
    """
    assert has_rows(logits)
    rows, vocabulary = logits.shape
    if temperature is not None:
        assert is_plain(temperature, torch.float32)
        assert temperature.shape in ((rows,), (1,))
    entropy_R = torch.empty(rows)
    loaded().row_entropies(
        logits_ptr=logits.data_ptr(),
        stride=logits.stride(0),
        dtype=DTYPES[logits.dtype],
        temperature_ptr=pointer(temperature),
        temperature_stride=0 if temperature is None or temperature.numel() == 1 else 1,
        rows=rows,
        vocabulary=vocabulary,
        threads=torch.get_num_threads(),
        out_ptr=entropy_R.data_ptr(),
        isa=_isa(),
    )
    return entropy_R


def _indices(index_P: Tensor, size: int) -> Tensor:
    """Indices in [0, size), contiguous."""
    assert index_P.dtype == torch.int64
    assert index_P.device.type == "cpu"
    assert index_P.ndim == 1
    if index_P.numel() > 0:
        low, high = torch.aminmax(index_P)
        assert 0 <= int(low) <= int(high) < size
    return index_P.contiguous()


def _isa() -> str:
    """The set of fp32: products are fp32 for rows of every dtype."""
    return _processor.instruction_set(loaded(), DTYPES[torch.float32])
