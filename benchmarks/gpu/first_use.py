"""What a user's first calls check, the seconds of that, and the record they leave.

After it "auto" takes this machine's kernels without a check of its own. T tokens, D hidden.
"""

import os
import tempfile
import time
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu import ours
from benchmarks.gpu.correctness import STAGE
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import Setting, setting_of
from entropy_kernels.verification import first_use

# Ways to take a step, by the options that its call of the head asks about.
WAYS = {
    "the tokens of highest entropy": ("gradient",),
    "a threshold known beforehand": ("stored", "gradient"),
    "a mask known beforehand": ("keep_logits", "gradient"),
}
# These are asked about by dtype.
OF_SAMPLER = ("support", "entropy_from_logits")


def run(rows: Rows, job: Row) -> None:
    """The calls of one hidden size; those of all but the head where it is 0."""
    if not ours.has_triton():
        return
    setting, hidden = setting_of(rows, job), job["hidden"]
    with tempfile.TemporaryDirectory() as folder:
        # What the interpreter finds is of no use to anybody.
        place = {"EK_CACHE_DIR": folder} if setting.quick else {}
        with mock.patch.dict(os.environ, place | {first_use.VARIABLE: "force"}):
            for op in () if hidden else ("selection", "ratio_loss", *OF_SAMPLER):
                dtype = setting.sizes.dtype if op in OF_SAMPLER else torch.float32
                ask = partial(first_use.right, op, setting.device, dtype)
                rows.measure(STAGE, f"first use: {op}", partial(_asked, setting, ask), kernels=[op])
            ways = list(WAYS.items())[: 1 if setting.quick else None]
            for way, options in ways if hidden else ():
                sizes = setting.sizes.base[0], setting.sizes.vocabulary
                call = ("linear_logprob_entropy", setting.device, setting.sizes.dtype, hidden)
                ask = partial(first_use.right, *call, options, *sizes)
                name = f"first use: D={hidden}, {way}"
                rows.measure(STAGE, name, partial(_asked, setting, ask), kernels=["head"])


def _asked(setting: Setting, ask: "partial[first_use.Answer]") -> Row:
    began = time.monotonic()
    found = ask()
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    row: Row = {"seconds": time.monotonic() - began}
    # Tiles that gave way to others.
    answers = first_use.known(setting.device)
    wrong = [f"{text}: {x.reason}" for text, x in answers.items() if not x.right]
    row |= {"wrong": wrong} if wrong else {}
    return row | ({"passed": True} if found.right else {"error": found.reason})
