"""pytest benchmarks/ --benchmark-only [-k "bfloat16 and V151936"] [--quick] [--contestants NAMES]

pytest-benchmark would time one contestant after the other; here it times whole rounds, in which
all of them alternate, and carries their samples in extra_info. The result files are what counts.
"""

import functools

import pytest
import torch

from benchmarks import linear_logprob_entropy as op
from benchmarks import runner

# Of a 0.5B model's head and of a small one's, with their rounds.
SHAPES = {(2048, 896, 151936): 5, (4096, 512, 32768): 5}
QUICK = (64, 32, 512), 2
IDS = "T{}-D{}-V{}".format


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: IDS(*shape))
def bench_linear_logprob_entropy(shape, dtype, quick, record, request):
    if quick and shape != next(iter(SHAPES)):
        pytest.skip("--quick has one shape")
    shape, rounds = QUICK if quick else (shape, SHAPES[shape])
    names = request.config.getoption("--contestants")
    record(functools.partial(measure, shape, dtype, rounds, names=names))


def measure(shape, dtype, rounds, folder, log=print, names=None):
    """The result file's entries, of all contestants or of those named."""
    tokens, hidden, vocabulary = shape
    about = runner.about_this_run(dtype) | {
        "op": "linear_logprob_entropy",
        "device": "cpu",
        "shape": {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
        "rounds": rounds,
    }
    log(f"{tokens} x {hidden} x {vocabulary}, {about['dtype']}")
    problem = op.make_problem(tokens, hidden, vocabulary, dtype)
    everyone = op.contestants(dtype=dtype)
    contestants = [c for c in everyone if names is None or c.name in names]
    if names is not None and len(contestants) != len(names):
        raise ValueError(
            f"--contestants must be some of {', '.join(c.name for c in everyone)}; "
            f"got {', '.join(names)}"
        )
    entries = runner.run_suite(contestants, problem, op.truth, rounds=rounds, dtype=dtype, log=log)
    timed = [entry for entry in entries if "wall_s" in entry]
    # A process a contestant takes seconds whatever the shape.
    watched = [entry["name"] for entry in timed][: None if shape in SHAPES else 1]
    peaks = runner.peak_bytes(op.__name__, watched, problem)
    for entry in timed:
        entry["units"] = entry["flops"] / (2 * tokens * hidden * vocabulary)
        entry["peak_bytes"] = peaks.get(entry["name"])
    log(f"wrote {runner.write(folder, about, entries)}")
    return entries
