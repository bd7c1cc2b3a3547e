"""Shards that stand for a GPU's troubles in tests of `python -m benchmarks.gpu`."""

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.rows import Row, Rows


def work(rows: Rows, job: Row) -> None:
    """One measurement for each word of `does`, by which it succeeds or not."""
    for number, what in enumerate(job["does"].split()):
        name = f"{job['shard']} {number} {what}"
        run = partial(_do, what, Path(job["out"]))
        rows.measure("floors", name, run, kernels=[f"op {number}"])


def _do(what: str, out: Path) -> Row:
    if what == "crash":
        print("a reason", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        # As a call of CUDA: no signal but SIGKILL ends it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])
        (out / "child").write_text(str(child.pid))
        child.wait()
    if what == "lost":
        raise RuntimeError("an illegal memory access was encountered")
    if what == "fail":
        raise ValueError("out of\nmemory")
    if what.startswith("slow"):
        time.sleep(float(what.removeprefix("slow")))
    return {"p50_ms": 1.0}
