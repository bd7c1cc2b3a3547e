"""Stage `profile`: compute-sanitizer and Nsight Compute on one launch of each kernel.

Where a tool is not there, or cannot read this GPU, the row says so. What they print is kept in
files beside the rows. `python -m benchmarks.gpu.one_launch` is what they watch.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial

from benchmarks.gpu import correctness, ours
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.one_launch import LAUNCHES
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting

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
SECONDS = 150
CHECKS = ("memcheck", "racecheck")


def run(setting: Setting) -> None:
    if not ours.has_triton():
        setting.rows.log("profile: the package has no Triton kernels of the head")
        return
    for launch in LAUNCHES:
        for check in CHECKS:
            command = ["compute-sanitizer", "--tool", check, "--error-exitcode", "1"]
            name = f"{check} {launch}"
            watch = partial(_sanitized, setting, command, name, launch)
            setting.rows.measure("profile", name, watch)
        refusal = correctness.refusal(setting.rows)
        if refusal:
            setting.rows.log(f"profile: ncu {launch}: {refusal}")
            continue
        sections = [x for section in SECTIONS for x in ("--section", section)]
        command = ["ncu", "--clock-control", "none", "--launch-count", "1", *sections]
        command += ["--kernel-name", KERNELS[launch]]
        name = f"ncu {launch}"
        setting.rows.measure("profile", name, partial(_profiled, setting, command, name, launch))


def _sanitized(setting: Setting, command: list[str], name: str, launch: str) -> Row:
    done = _watch(setting, command, name, launch, "small")
    errors = re.findall(r"ERROR SUMMARY: (\d+) errors?", done.stdout)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazards?", done.stdout)
    assert errors or hazards, f"exit status {done.returncode}: {done.stdout[-200:]}"
    return {"errors": int((errors or hazards)[-1]), "exit_status": done.returncode}


def _profiled(setting: Setting, command: list[str], name: str, launch: str) -> Row:
    done = _watch(setting, command, name, launch, "full")
    found = {key: f"{value} {unit}" for key, unit, value in REPORTED.findall(done.stdout)}
    assert found, f"exit status {done.returncode}: {done.stdout[-200:]}"
    return found


def _watch(
    setting: Setting, command: list[str], name: str, launch: str, size: str
) -> "subprocess.CompletedProcess[str]":
    """Runs one launch under a tool; its output goes into a file."""
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
    (setting.out / f"{name.replace(' ', '-')}.txt").write_text(done.stdout)
    return done
