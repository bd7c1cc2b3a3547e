"""python -m benchmarks.gpu [STAGE...] [--out FOLDER] [--limit SECONDS] [--quick]

Stages in the order to run them; README.md says what each costs. A stage stops at its limit and,
run again, goes on where it stopped. Without a GPU only --quick runs, on tiny shapes.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

STAGES = (
    "environment",
    "floors",
    "correctness",
    "sweep",
    "tune",
    "peers",
    "verl",
    "threshold",
    "graphs",
    "profile",
    "table",
)
LIMIT = 470


def main(arguments: list[str]) -> int:
    """The exit status: 1 where a stage stopped at its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds a stage may take")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens instead of 8192 and 32768")
    parser.add_argument("--hidden", type=int, nargs="+", help="widths instead of 1024 to 5120")
    parser.add_argument("--commit", help="commit of the sources, where there is no .git")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    given = parser.parse_args(arguments)
    unknown = set(given.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        if not given.quick:
            parser.error("no GPU is here; --quick runs tiny shapes on the CPU")
        # Read as the files of the kernels load, which is after this line.
        os.environ["TRITON_INTERPRET"] = "1"
        if find_spec("triton") is not None:
            from entropy_kernels.testing import mend_interpreter

            mend_interpreter()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    from benchmarks.gpu.environment import about
    from benchmarks.gpu.rows import Rows, limited
    from benchmarks.gpu.setting import Setting, quick_setting

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "rows.jsonl", about(device, given.quick, given.commit))
    if given.quick:
        setting = quick_setting(rows, device, given.out)
    else:
        setting = Setting(rows, device, given.out, quick=False)
    setting = dataclasses.replace(
        setting,
        tokens=tuple(given.tokens or setting.tokens),
        hidden=tuple(given.hidden or setting.hidden),
    )
    status = 0
    for name in given.stages or STAGES:
        print(f"== {name}", flush=True)
        work = _stages()[name]
        if not limited(given.limit, partial(work, setting)):
            print(f"{name} stopped at its limit of {given.limit} s; run it again to go on")
            status = 1
    return status


def _stages() -> dict[str, Callable[..., None]]:
    from benchmarks.gpu import correctness, floors, selection, steps, sweep, table, tools, tune

    works = (
        floors.run_environment,
        floors.run_floors,
        correctness.run,
        sweep.run,
        tune.run,
        steps.run_peers,
        steps.run_verl,
        selection.run_threshold,
        selection.run_graphs,
        tools.run,
        table.run,
    )
    return dict(zip(STAGES, works, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
