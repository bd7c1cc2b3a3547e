"""The conditions of a result: GPU and its state, driver, versions, sources, commit, date."""

import datetime
import hashlib
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.sources import ROOT, versions
from benchmarks.sources import commit as commit_of
from entropy_kernels import device as gpu
from entropy_kernels._bench.machine import processor

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "nvidia-cutlass-dsl")
PACKAGES = ("torch", "triton", *PEERS)
# The files that a result depends on, and those that only say something about results.
SOURCES = ("entropy_kernels/**/*.py", "csrc/cuda/*", "benchmarks/gpu/*.py")
PREDICTING = ("predictions", "model", "hardware", "launches", "costs", "assembly")
NOT_SOURCES = {f"benchmarks/gpu/{name}.py" for name in ("table", "schema", *PREDICTING)}
QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"


def about(device: torch.device, quick: bool, commit: str | None) -> dict[str, Any]:
    """Written into every row."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "architecture": architecture(device),
        "driver": state().get("driver_version"),
        "versions": versions(PACKAGES),
        "source": _digest(),
        "commit": commit or commit_of("entropy_kernels", "benchmarks/gpu", length=10),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "quick": quick,
    }


def architecture(device: torch.device) -> str:
    """As entropy_kernels.device names it."""
    try:
        return gpu.architecture(device)
    except ImportError:
        return "no triton"


def properties(device: torch.device) -> dict[str, Any]:
    """Properties of the GPU, or the name of the CPU."""
    if device.type != "cuda":
        return {"machine": str(processor())}
    found = torch.cuda.get_device_properties(device)
    return {
        "processors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "mm_overloads": torch.ops.aten.mm.overloads(),
        **state(),
    }


def state() -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi reads them; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    return dict(zip(QUERY.split(","), values, strict=False)) if done.returncode == 0 else {}


def _digest() -> str:
    """A digest of the sources, for machines without .git: equal files have equal digests."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in NOT_SOURCES:
                digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
