"""`import entropy_kernels`: it asks for no GPU, imports no compiler, takes little, says nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entropy_kernels._compiler import constant

ROOT = Path(__file__).parents[1]

# The driver is asked through these, by torch and by Triton; once it is, CUDA fails in forks.
NO_DRIVER = """
import os, sys, torch

def refuse(*_):
    raise SystemExit("the import asked for a GPU")

names = [x for x in vars(torch._C) if x.startswith("_cuda_") and callable(vars(torch._C)[x])]
asked = [(torch._C, x) for x in names]
asked += [(torch.cuda, x) for x in ("is_available", "device_count", "init", "_lazy_init")]
before = [(owner, name, getattr(owner, name)) for owner, name in asked]
for owner, name in asked:
    setattr(owner, name, refuse)

import entropy_kernels, entropy_kernels.distributed, entropy_kernels.reference

for name in ("triton", "torch._dynamo", "transformers", "trl", "liger_kernel"):
    assert name not in sys.modules, f"the import brought {name}"
assert "entropy_kernels._bench" not in sys.modules
for owner, name, function in before:
    setattr(owner, name, function)
child = os.fork()
if child == 0:
    mask = entropy_kernels.top_entropy_mask(torch.rand(10))
    on_gpu = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    os._exit(0 if int(mask.sum()) == 2 and not torch.cuda._is_in_bad_fork() else 1)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
def test_import_asks_for_no_gpu_and_a_fork_after_it_computes():
    done = run(NO_DRIVER)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("missing", ["", "numpy", "jaxtyping"])
def test_import_says_nothing(missing):
    done = run(f"import sys; sys.modules[{missing!r}] = None\nimport entropy_kernels", "-Walways")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_takes_a_fraction_of_torchs():
    """Less than a third of it: .3 s of the processor where torch takes one second."""
    code = (
        "import time; a = time.process_time()\nimport torch\nb = time.process_time()\n"
        "import entropy_kernels\nprint((time.process_time() - b) / (b - a))"
    )
    shares = []
    while not shares or (shares[-1] >= 1 / 3 and len(shares) < 3):
        shares.append(float(run(code).stdout))
    assert shares[-1] < 1 / 3, f"{min(shares):.2f} of torch's own import"


def test_constant_is_what_the_compiler_reads():
    def ours():
        return 1

    def theirs():
        return 1

    constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs)
