"""Stage `profile`: compute-sanitizer and Nsight Compute on one launch of each kernel.

It is no part of a run by default. Where a tool is not there, or cannot read this GPU, the row says
so. What they print is kept in one file beside the rows. They watch `benchmarks.gpu.one_launch`.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.gpu import ours
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.one_launch import LAUNCHES
from benchmarks.gpu.rows import Row, Rows

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
# The kernel of each launch that is looked at, and the lines of the report that a row keeps.
KERNELS = {
    "forward": "regex:forward_.*",
    "backward": "regex:dlogits_.*",
    "stored_rows": "regex:copy_rows",
    "selection": "regex:.*histogram.*",
    "ratio_loss": "regex:.*tokens_kernel",
}
REPORTED = re.compile(
    r"^\s+(Duration|Compute \(SM\) Throughput|L2 Cache Throughput|DRAM Throughput|L2 Hit Rate"
    r"|L1/TEX Cache Throughput|Executed Ipc Active|Registers Per Thread|Achieved Occupancy)\s+"
    r"(\S+)\s+([\d.,]+)$",
    re.MULTILINE,
)
# Less than a conductor waits for a measurement.
SECONDS = 50
LOG_CHARACTERS = 1 << 18
CHECKS = ("memcheck", "racecheck")


def run(rows: Rows, job: Row) -> None:
    if not ours.has_triton():
        rows.log("profile: no Triton is here")
        return
    log = Path(job["out"]) / "profile.txt"
    for launch in LAUNCHES:
        for check in CHECKS:
            command = ["compute-sanitizer", "--tool", check, "--error-exitcode", "1"]
            rows.measure("profile", f"{check} {launch}", partial(_sanitized, log, command, launch))
        sections = [x for section in SECTIONS for x in ("--section", section)]
        command = ["ncu", "--clock-control", "none", "--launch-count", "1", *sections]
        command += ["--kernel-name", KERNELS[launch]]
        rows.measure("profile", f"ncu {launch}", partial(_profiled, log, command, launch))


def _sanitized(log: Path, command: list[str], launch: str) -> Row:
    done = _watch(log, command, launch, "small")
    errors = re.findall(r"ERROR SUMMARY: (\d+) errors?", done.stdout)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazards?", done.stdout)
    assert errors or hazards, f"exit status {done.returncode}: {done.stdout[-200:]}"
    return {"errors": int((errors or hazards)[-1]), "exit_status": done.returncode}


def _profiled(log: Path, command: list[str], launch: str) -> Row:
    done = _watch(log, command, launch, "full")
    found = {key: f"{value} {unit}" for key, unit, value in REPORTED.findall(done.stdout)}
    assert found, f"exit status {done.returncode}: {done.stdout[-200:]}"
    return found


def _watch(
    log: Path, command: list[str], launch: str, size: str
) -> "subprocess.CompletedProcess[str]":
    """Runs one launch under a tool; the end of its output is added to `log`."""
    tool = shutil.which(command[0])
    if tool is None:
        raise FileNotFoundError(f"{command[0]} is not on the PATH")
    watched = [sys.executable, "-m", "benchmarks.gpu.one_launch", launch, size]
    done = subprocess.run(
        [tool, *command[1:], *watched],
        cwd=ROOT,
        # An allocator of its own would hide what lies outside of a tensor.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    with log.open("a") as file:
        file.write(f"== {' '.join(command)}: {launch}\n{done.stdout[-LOG_CHARACTERS:]}\n")
    return done
