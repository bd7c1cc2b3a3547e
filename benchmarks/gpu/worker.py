"""python -m benchmarks.gpu.worker [MODULE...]: one shard of a run, in a process of its own.

It imports the modules, then waits on stdin for its job as one line of JSON. Exit status: 0 when the
shard is done, 3 when its time was over first, 4 when it has lost its GPU.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import LostError, OutOfTimeError, Rows

OUT_OF_TIME, LOST = 3, 4
_PR_SET_PDEATHSIG = 1


def main(modules: list[str]) -> int:
    _end_with_parent()
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from entropy_kernels.testing import mend_interpreter

        mend_interpreter()
    for module in modules:
        importlib.import_module(module)
    # What was imported need not be searched before every measurement.
    gc.freeze()
    line = sys.stdin.readline()
    return _work(json.loads(line)) if line else 0


def _work(job: dict[str, Any]) -> int:
    # The clock is the same in all processes of a machine.
    rows = Rows(Path(job["out"]) / "rows.jsonl", job["about"], _say, job["until"])
    module, function = job["work"].split(":")
    work = getattr(importlib.import_module(module), function)
    try:
        work(rows, job)
    except OutOfTimeError:
        return OUT_OF_TIME
    except LostError:
        return LOST
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _end_with_parent() -> None:
    """A run that is killed leaves nothing on the GPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
