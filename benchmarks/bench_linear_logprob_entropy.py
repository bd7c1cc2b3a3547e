"""pytest benchmarks/ --benchmark-only [-k "bfloat16 and V151936"] [--quick] [--contestants NAMES]

pytest-benchmark would time one contestant after the other; here it times whole rounds, in which
all of them alternate, and carries their samples in extra_info. The result files are what counts.
"""

import functools

import pytest
import torch

from benchmarks import linear_logprob_entropy as op
from benchmarks import runner

# The heads of a 0.5B model and of a small one, with their rounds.
SHAPES = {(2048, 896, 151936): 3, (4096, 512, 32768): 5}
QUICK = (64, 32, 512), 2
IDS = "T{}-D{}-V{}".format


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: IDS(*shape))
def bench_linear_logprob_entropy(shape, dtype, start, record, request):
    shape, rounds = start(SHAPES, shape, QUICK)
    names = request.config.getoption("--contestants")
    record(functools.partial(measure, shape, dtype, rounds, names=names))


def measure(shape, dtype, rounds, folder, log=print, names=None):
    """The result file's entries, of all contestants or of those named."""
    tokens, hidden, vocabulary = shape
    everyone = op.contestants(dtype=dtype)
    contestants = [c for c in everyone if names is None or c.name in names]
    if names is not None and len(contestants) != len(names):
        raise ValueError(
            f"--contestants must be some of {', '.join(c.name for c in everyone)}; "
            f"got {', '.join(names)}"
        )
    return runner.measure(
        "linear_logprob_entropy",
        {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary},
        contestants,
        op.make_problem(tokens, hidden, vocabulary, dtype),
        op.truth,
        rounds=rounds,
        folder=folder,
        dtype=dtype,
        log=log,
        # A process per contestant takes seconds whatever the shape.
        watched=None if shape in SHAPES else 1,
        module=op.__name__,
        more=lambda entry: {"units": entry["flops"] / (2 * tokens * hidden * vocabulary)},
    )
