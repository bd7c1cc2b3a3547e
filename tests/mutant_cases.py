"""Edits of source files of `_triton`, each of which breaks kernels that a question is about."""

from typing import NamedTuple

import torch

from entropy_kernels._triton.common import tiles
from entropy_kernels.verification.question import Question

INTERPRETED = tiles.TILES[tiles.Key("forward", "interpreter", "any", tiles.ANY, tiles.ANY)]
OF_BACKWARD = tiles.TILES[tiles.Key("dlogits", "interpreter", "any", tiles.ANY, tiles.ANY)]


class Mutant(NamedTuple):
    """An edit of one file, and the question whose kernels it breaks.

    file: under `_triton`, without its ending. new: replaces `old`, which occurs once there.
    variant: of the tile; "" for none.
    """

    name: str
    file: str
    old: str
    new: str
    op: str
    variant: str = ""
    flags: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def question(self) -> Question:
        """What has to be answered with no."""
        found = OF_BACKWARD if self.op == "dlogits" else INTERPRETED
        (tile,) = [x for x in found if x.variant == self.variant] or [None]
        return Question(self.op, self.dtype, tile, self.flags)


FORWARD, SUMS, MERGE = "head_forward", "head_forward/row_sum_functions", "head_forward/merge_kernel"
DZ, ROWS = "head_backward/dlogits_functions", "head_backward/row_kernels"

MUTANTS = [
    Mutant(
        "a tail column let in",
        f"{FORWARD}/pointer_kernel",
        "z = tl.where((offs_v < V)[None, :], z, LOWEST)",
        "z = z + 0.0",
        "forward",
        "pointer",
    ),
    Mutant(
        "a tail column let in by a descriptor",
        f"{FORWARD}/tma_kernel",
        "z = tl.where((offs_v < V)[None, :], z, LOWEST)",
        "z = z + 0.0",
        "forward",
        "tma",
    ),
    Mutant(
        "a row not masked",
        ROWS,
        "x = tl.load(in_ptrs, mask=(slot >= 0)[:, None] & mask_d, other=0.0) + start",
        "x = tl.load(in_ptrs, mask=(slot >= -1)[:, None] & mask_d, other=0.0) + start",
        "dlogits",
        "pointer",
    ),
    Mutant(
        "an entropy without its moved maximum",
        SUMS,
        "u = a * (u + total * tl.maximum(shift, LOWEST_EXPONENT))",
        "u = a * u",
        "forward",
        "pointer",
        dtype=torch.bfloat16,
    ),
    Mutant(
        "ties counted twice",
        SUMS,
        "return tl.where(stays, n, 0.0), tl.where(stays, s, a * total), u",
        "return n, tl.where(stays, s, a * total), u",
        "forward",
        "tma",
    ),
    Mutant(
        "sums of the unit before carried on",
        f"{FORWARD}/tma_kernel",
        "s = tl.where(begins, 0.0, s)",
        "s = s + 0.0",
        "forward",
        "tma",
        dtype=torch.float16,
    ),
    Mutant(
        "one split dropped",
        MERGE,
        "\n        mask = (offs_s < n_split)[:, None]",
        "\n        mask = (offs_s < n_split - 1)[:, None]",
        "forward",
        "cublas",
        dtype=torch.bfloat16,
    ),
    Mutant(
        "an ignored row not zeroed",
        MERGE,
        "tl.where(valid, entropy * factor, 0.0)",
        "entropy * factor",
        "forward",
        "cublas",
    ),
    Mutant(
        "a NaN dropped",
        MERGE,
        " & (rest == rest)",
        "",
        "forward",
        "pointer",
    ),
    Mutant(
        "a temperature forgotten in one place",
        MERGE,
        "logsumexp = m / temperature + log_sum",
        "logsumexp = m + log_sum",
        "forward",
        "tma_split",
        ("temperature",),
    ),
    Mutant(
        "a bias forgotten at the target",
        f"{FORWARD}/target_logit_kernel",
        "z += tl.load(bias_ptr + target, mask=mask_t, other=0.0).to(tl.float32)",
        "z += 0.0",
        "forward",
        "pointer",
        ("bias",),
        torch.bfloat16,
    ),
    Mutant(
        "a statistic without its moved maximum",
        f"{FORWARD}/statistics_functions",
        "w = a * (w + shift * (2.0 * u + (s + n) * shift))",
        "w = a * w",
        "forward",
        "cublas",
        ("statistics",),
    ),
    Mutant(
        "the last of equal maxima",
        f"{FORWARD}/statistics_functions",
        "tl.min(tl.where(z == top[:, None], offs_v[None, :], NOWHERE), 1)",
        "tl.max(tl.where(z == top[:, None], offs_v[None, :], -1), 1)",
        "forward",
        "pointer",
        ("statistics",),
    ),
    Mutant(
        "a mean with the columns past the end",
        f"{FORWARD}/statistics_functions",
        "tl.where((offs_v < V)[None, :], z * (1.0 / V), 0.0)",
        "z * (1.0 / V)",
        "forward",
        "tma_split",
        ("statistics",),
    ),
    Mutant(
        "an int32 offset",
        f"{FORWARD}/pointer_kernel",
        "columns = tl.minimum(offs_v, V - 1).to(tl.int64)",
        "columns = tl.minimum(offs_v, V - 1)",
        "forward",
        "pointer",
    ),
    Mutant(
        "dz rounded early",
        DZ,
        "dz = tl.where(offs_v[None, :] == target[:, None], dz_target[:, None], dz)",
        "dz = tl.where(offs_v[None, :] == target[:, None], dz_target[:, None], dz)\n"
        "    dz = dz.to(tl.bfloat16).to(tl.float32)",
        "dlogits",
        "pointer",
    ),
    Mutant(
        "a softcap without slope",
        DZ,
        "        dz *= slope\n",
        "        dz *= 1.0\n",
        "dlogits",
        "tma",
        ("softcap",),
        torch.bfloat16,
    ),
    Mutant(
        "a target as any other column",
        DZ,
        "dz = tl.where(offs_v[None, :] == target[:, None], dz_target[:, None], dz)",
        "dz = dz * 1.0",
        "dlogits",
        "pointer",
        dtype=torch.float16,
    ),
    Mutant(
        "quarters of a tile exchanged",
        "head_backward/dlogits_kernels",
        "add_bias(parts[i], bias_ptr",
        "add_bias(parts[3 - i], bias_ptr",
        "dlogits",
        "tma",
        dtype=torch.bfloat16,
    ),
    Mutant(
        "a gradient over no temperature",
        ROWS,
        "rest += tl.load(grad_logsumexp_ptr + row, mask=mask, other=0.0) * inverse",
        "rest += tl.load(grad_logsumexp_ptr + row, mask=mask, other=0.0)",
        "dlogits",
        "pointer",
        ("temperature",),
        torch.bfloat16,
    ),
    Mutant(
        "bias partials of one block dropped",
        "head_backward/launch",
        "torch.sum(partials[:, : stop - start], 0",
        "torch.sum(partials[1:, : stop - start], 0",
        "dlogits",
        "tma",
        ("bias",),
        torch.float16,
    ),
    Mutant(
        "a stale workspace",
        "head_backward/launch",
        "buffer = rows.hidden.new_empty if rows.active.exact else rows.hidden.new_zeros",
        "buffer = rows.hidden.new_empty",
        "dlogits",
        "pointer",
    ),
    Mutant(
        "more rows than the bound, and no NaN",
        ROWS,
        'start = tl.where(tl.load(number_ptr) > limit, float("nan"), 0.0)',
        "start = 0.0",
        "dlogits",
        "tma",
    ),
    Mutant(
        "a chunk of the first columns' weights",
        "head_backward/dlogits_kernels",
        "columns = tl.minimum(offs_v, stop - 1).to(tl.int64)",
        "columns = tl.minimum(offs_v - start, stop - 1).to(tl.int64)",
        "dlogits",
        "pointer",
        dtype=torch.bfloat16,
    ),
    Mutant(
        "a logit kept in 16 bits",
        f"{FORWARD}/pointer_kernel",
        "tl.store(ptrs, acc, mask=inside)",
        "tl.store(ptrs, acc.to(tl.bfloat16).to(tl.float32), mask=inside)",
        "forward",
        "pointer",
        ("keep_logits",),
    ),
    Mutant(
        "a logit stored for another row",
        f"{FORWARD}/store_kernels",
        "z = tl.load(logits_ptr + row * V + offs_v",
        "z = tl.load(logits_ptr + tl.maximum(row - 1, 0) * V + offs_v",
        "forward",
        "cublas",
        ("stored",),
    ),
    Mutant(
        "the place of a stored row off by one",
        ROWS,
        "tl.store(place_ptr + offs, place, mask=inside)",
        "tl.store(place_ptr + offs, place + 1, mask=inside)",
        "dlogits",
        "pointer",
        ("stored",),
    ),
    Mutant(
        "ties of a threshold counted twice",
        "selection/largest_kernel",
        "        ties += tl.sum(equal)",
        "        ties += 2 * tl.sum(equal)",
        "selection",
    ),
    Mutant(
        "a threshold's digit off by one",
        "selection/radix_kernels",
        "digit = BINS - 1 - tl.sum(",
        "digit = BINS - 2 - tl.sum(",
        "selection",
    ),
    Mutant(
        "a NaN of negative sign at the bottom",
        "selection/key_functions",
        "return tl.where((bits & ~SIGN) > INFINITY, ~SIGN, key)",
        "return key",
        "selection",
    ),
    Mutant(
        "a racy count",
        "selection/radix_kernels",
        'tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")',
        "tl.store(counts_ptr + bins, tl.load(counts_ptr + bins) + counts.to(tl.int64))",
        "selection",
    ),
    Mutant(
        "dual clip missing",
        "ratio_loss/kernels",
        "loss = tl.where((advantage < 0.0) & (most < loss), most, loss)",
        "loss = loss + 0.0 * most",
        "ratio_loss",
    ),
    Mutant(
        "the sums of programs that are not there",
        "ratio_loss/kernels",
        "there = offs < programs",
        "there = offs <= programs",
        "ratio_loss",
    ),
]
