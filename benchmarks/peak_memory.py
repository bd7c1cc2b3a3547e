"""Peak resident memory of one contestant above its inputs, in a process of its own.

python -m benchmarks.peak_memory MODULE PROBLEM CONTESTANT prints bytes. Linux only.
"""

import argparse
import importlib

import torch

from entropy_kernels._bench.rounds import peak_of


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
    results, peak = peak_of(lambda: contestant.run(problem), torch.device("cpu"))
    print(peak)
    del results


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.peak_memory", description=__doc__)
    for name in ("module", "problem", "contestant"):
        parser.add_argument(name)
    options = parser.parse_args()
    main(options.module, options.problem, options.contestant)
