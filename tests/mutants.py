"""Kernels that are broken on purpose: each is one edit of a source file of `_triton`.

`python -m tests.mutants` prints which case of the check refuses each, and why.
"""

import contextlib
import importlib
import linecache
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import entropy_kernels._triton as kernels
from entropy_kernels._triton.common import tiles
from entropy_kernels.testing import mend_interpreter
from entropy_kernels.verification.checks import check
from entropy_kernels.verification.offset_cases import far_cases
from entropy_kernels.verification.question import Question
from tests.concurrent_programs import at_once

CPU = torch.device("cpu")

FOLDER = Path(kernels.__file__).parent
# They import every other file.
LAUNCHERS = [f"{op}.launch" for op in ("head_forward", "head_backward", "selection", "ratio_loss")]
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
        "mask = (offs_s < n_split)[:, None]",
        "mask = (offs_s < n_split - 1)[:, None]",
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


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The package with the mutant's kernels, in place.

    Raises:
        ValueError: the text to replace does not occur once.
    """
    path = FOLDER / f"{mutant.file}.py"
    for user in LAUNCHERS:
        importlib.import_module(f"{kernels.__name__}.{user}")
    name = f"{kernels.__name__}.{mutant.file.replace('/', '.')}"
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} must occur once in {path.name}")
    before = dict(vars(sys.modules[name]))
    # The interpreter reads the source of a kernel again.
    text, file = source.replace(mutant.old, mutant.new), f"<{mutant.name}>"
    edited = dict(before)
    with contextlib.ExitStack() as stack:
        lines = {file: (len(text), None, text.splitlines(keepends=True), file)}
        stack.enter_context(mock.patch.dict(linecache.cache, lines))
        exec(compile(text, file, "exec"), edited)
        defined = {id(before.get(key)): x for key, x in edited.items() if x is not before.get(key)}
        for module in [x for key, x in sys.modules.items() if key.startswith(kernels.__name__)]:
            for key, x in list(vars(module).items()):
                if callable(x) and id(x) in defined:
                    stack.enter_context(mock.patch.object(module, key, defined[id(x)]))
        yield


def reason(mutant: Mutant, where: torch.device = CPU) -> str | None:
    """Why the check refuses the mutant, while programs run at once; None where it does not."""
    with broken(mutant), at_once():
        return refusal(mutant.question, where)


def refusal(question: Question, where: torch.device = CPU) -> str | None:
    """Why the check refuses the kernels of a question, offsets beyond 2^31 among its cases."""
    torch.manual_seed(0)
    if found := check(question, where):
        return found
    if question.op in ("forward", "dlogits"):
        pair = (question.tile, None) if question.op == "forward" else (None, question.tile)
        for case in far_cases(pair, question.dtype, where):
            try:
                case.run()
            except AssertionError as error:
                return f"{case.name}: {error}"
    return None


def main() -> None:
    """Prints a row per mutant."""
    warnings.simplefilter("ignore")
    mend_interpreter()
    torch.use_deterministic_algorithms(True, warn_only=True)
    print("| mutant | question | refused by |\n|---|---|---|")
    for mutant in MUTANTS:
        found = reason(mutant) or "nothing"
        print(f"| {mutant.name} | {mutant.question.text} | {found} |", flush=True)


if __name__ == "__main__":
    main()
