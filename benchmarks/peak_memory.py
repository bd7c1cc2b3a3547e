"""Peak resident memory of one contestant above its inputs, in a process of its own.

python -m benchmarks.peak_memory MODULE PROBLEM CONTESTANT prints bytes. Linux only.
"""

import argparse
import ctypes
import gc
import importlib
from pathlib import Path

import torch


def main(module_name: str, problem_path: str, name: str) -> None:
    module = importlib.import_module(module_name)
    contestant = next(c for c in module.contestants() if c.name == name)
    problem = module.Problem(*torch.load(problem_path))
    if contestant.uncompiled is None:
        # Libraries are loaded and threads started at a small size, and nothing else.
        contestant.run(module.small_problem(problem))
    else:
        # A compiler's own memory is not the step's.
        contestant.run(problem)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    results = contestant.run(problem)
    print(status("VmHWM") - before)
    del results


def status(key: str) -> int:
    """Bytes of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.peak_memory", description=__doc__)
    for name in ("module", "problem", "contestant"):
        parser.add_argument(name)
    options = parser.parse_args()
    main(options.module, options.problem, options.contestant)
