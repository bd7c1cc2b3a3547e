"""Shards that stand for a GPU's troubles in tests of `python -m benchmarks.gpu`.

python -m tests.gpu_shards FOLDER    a run of quick shards, or what is left of one that was killed
"""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.conductor import Conductor
from benchmarks.gpu.plan import Shard
from benchmarks.gpu.rows import Row, Rows

ABOUT = {"gpu": None, "driver": None, "versions": {}, "source": "s", "quick": True}
WORK = "tests.gpu_shards:work"


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


def main(out: str) -> int:
    """Some shards run beside each other, and some after each other; the status of the program."""
    plan = [
        Shard(stage, name, WORK, 1.0, {"shard": name, "does": "slow0.03 " * 8})
        for stage in ("floors", "correctness")
        for name in (f"{stage} {number}" for number in range(3))
    ]
    Path(out).mkdir(exist_ok=True)
    rows = Rows(Path(out) / "rows.jsonl", ABOUT)
    job = {"out": out, "about": ABOUT}
    return int(bool(Conductor(rows, plan, time.monotonic() + 300, job, 2, 0).run()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
