"""pytest benchmarks/ --benchmark-only [-k "bfloat16 and V151936"] [--quick] [-s]

pytest-benchmark would time one contestant after the other; here it times whole rounds, in which
all of them alternate, and carries their samples in extra_info. The result files are what counts.
"""

import functools

import pytest
import torch

from benchmarks import linear_logprob_entropy as op
from benchmarks import runner

# Of a 0.5B model's head and of a small one's, with the rounds that half an hour allows.
SHAPES = {(2048, 896, 151936): 5, (4096, 512, 32768): 7}
QUICK = (64, 32, 512), 2
IDS = "T{}-D{}-V{}".format


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: IDS(*shape))
def bench_linear_logprob_entropy(shape, dtype, quick, record):
    if quick and shape != next(iter(SHAPES)):
        pytest.skip("--quick has one shape")
    shape, rounds = QUICK if quick else (shape, SHAPES[shape])
    record(functools.partial(measure, shape, dtype, rounds))


def measure(shape, dtype, rounds, folder, log=print):
    """The result file's entries."""
    tokens, hidden, vocabulary = shape
    about = runner.about_this_run() | {
        "op": "linear_logprob_entropy",
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
        "rounds": rounds,
    }
    log(f"{tokens} x {hidden} x {vocabulary}, {about['dtype']}")
    problem = op.make_problem(tokens, hidden, vocabulary, dtype)
    entries = runner.run_suite(
        op.contestants(), problem, op.truth, rounds=rounds, dtype=dtype, log=log
    )
    timed = [entry for entry in entries if "wall_s" in entry]
    # A process a contestant takes seconds whatever the shape.
    names = [entry["name"] for entry in timed][: None if shape in SHAPES else 1]
    peaks = runner.peak_bytes(op.__name__, names, problem)
    for entry in timed:
        entry["units"] = entry["flops"] / (2 * tokens * hidden * vocabulary)
        entry["peak_bytes"] = peaks.get(entry["name"])
    log(f"wrote {runner.write(folder, about, entries)}")
    return entries
