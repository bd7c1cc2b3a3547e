"""What a machine is called: its processor by make and model, and torch's libraries; its memory."""

import functools
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _native

_AMD, _INTEL = "AuthenticAMD", "GenuineIntel"
# Models of a family, as ranges, that have one core: from Linux, arch/x86/kernel/cpu/amd.c.
_Ranges = tuple[tuple[int, int], ...]
_ZEN: dict[int, dict[str, _Ranges]] = {
    23: {"AMD Zen": ((0x00, 0x2F), (0x50, 0x5F)), "AMD Zen 2": ((0x30, 0x4F), (0x60, 0xAF))},
    25: {
        "AMD Zen 3": ((0x00, 0x0F), (0x20, 0x5F)),
        "AMD Zen 4": ((0x10, 0x1F), (0x60, 0xAF)),
    },
    26: {"AMD Zen 5": ((0x00, 0x2F), (0x40, 0x4F), (0x60, 0x7F))},
}
# Models of family 6, from Linux, arch/x86/include/asm/intel-family.h.
_CORES = {
    0x3F: "Intel Haswell-X",
    0x4F: "Intel Broadwell-X",
    0x55: "Intel Skylake-X",
    0x6A: "Intel Ice Lake-X",
    0x8F: "Intel Sapphire Rapids",
    0xAD: "Intel Granite Rapids",
    0xCF: "Intel Emerald Rapids",
}
# Parts of implementer 0x41, from Linux, arch/arm64/include/asm/cputype.h.
_NEOVERSE = {
    0xD0C: "Arm Neoverse N1",
    0xD40: "Arm Neoverse V1",
    0xD49: "Arm Neoverse N2",
    0xD4F: "Arm Neoverse V2",
}
_LIBRARIES = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate", "eigen": "Eigen"}
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Processor:
    """Strings as the system gives them, empty where it does not."""

    name: str
    """A virtual machine's is often cut short: "AMD EPYC"."""
    vendor: str = ""
    family: str = ""
    model: str = ""

    def __str__(self) -> str:
        family = f"family {self.family}, " if self.family else ""
        return f"{self.name} ({family}model {self.model})" if self.model else self.name

    @property
    def make(self) -> str:
        """The core's name, as in "AMD Zen 5"; vendor, family and model where it is not known."""
        family, model = (int(x, 0) if x else -1 for x in (self.family, self.model))
        if self.vendor == _AMD:
            for name, ranges in _ZEN.get(family, {}).items():
                if any(low <= model <= high for low, high in ranges):
                    return name
        known = _CORES if (self.vendor, family) == (_INTEL, 6) else {}
        known = _NEOVERSE if self.vendor == "0x41" else known
        plain = " ".join(x for x in (self.vendor, self.family, self.model) if x)
        return known.get(model, plain or self.name)

    @property
    def slug(self) -> str:
        """The make as a part of a file's name: "amd-zen-5"."""
        return re.sub(r"[^a-z0-9]+", "-", self.make.lower()).strip("-") or "unknown"

    @classmethod
    def parse(cls, text: str) -> "Processor":
        """From `str` of one, which is all that older result files have."""
        found = re.fullmatch(r"(.*) \(family (\d+), model (\d+)\)", text)
        if found is None:
            return cls(text)
        vendors = {"AMD": _AMD, "Intel": _INTEL}
        vendor = next((v for word, v in vendors.items() if word in found[1]), "")
        return cls(found[1], vendor, found[2], found[3])


@functools.cache
def processor() -> Processor:
    """This machine's."""
    if platform.system() == "Darwin":
        return Processor(_sysctl("machdep.cpu.brand_string") or platform.machine())
    try:
        return from_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        return from_windows(platform.processor() or platform.machine())


def from_cpuinfo(text: str) -> Processor:
    """The first processor of Linux's /proc/cpuinfo."""
    lines = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    found = {key.strip(): value.strip() for key, value in lines}
    if "CPU part" in found:
        part = Processor(platform.machine(), found["CPU implementer"], "", found["CPU part"])
        return Processor(part.make, part.vendor, part.family, part.model)
    names = ("vendor_id", "cpu family", "model")
    name = found.get("model name", platform.machine())
    return Processor(name, *(found.get(key, "") for key in names))


def from_windows(text: str) -> Processor:
    """As in "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"."""
    found = re.search(r"Family (\d+) Model (\d+).*, (\w+)$", text)
    return Processor(text, found[3], found[1], found[2]) if found else Processor(text)


def _sysctl(name: str) -> str:
    try:
        return subprocess.check_output(["sysctl", "-n", name], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def libraries() -> str:
    """What torch multiplies with on a CPU, as in "MKL 2024.2, oneDNN 3.12.0"."""
    text = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=(\w+)", text)
    name = blas[1] if blas else "no BLAS that torch names"
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", text)
    found = [_LIBRARIES.get(name, name) + (f" {mkl[1]}" if mkl and name == "mkl" else "")]
    onednn = re.search(r"MKL-DNN v([\d.]+)", text)
    if torch.backends.mkldnn.is_available():
        found.append(f"oneDNN {onednn[1]}" if onednn else "oneDNN")
    return ", ".join(found)


def about(dtype: torch.dtype) -> dict[str, Any]:
    """For result files: processor, threads, libraries, and the instruction set for `dtype`."""
    here = processor()
    return {
        "machine": str(here),
        "processor": asdict(here) | {"make": here.make, "slug": here.slug},
        "instruction": _native.instruction_set(dtype) if _native.cpu() else None,
        "blas": libraries(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken, within the container's limit; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        # Without Linux's answer, all that the machine has.
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    return min(free, _container_bytes())


def _container_bytes() -> int:
    """What a limit of version 2 or 1 of Linux's control groups leaves."""
    left = _UNLIMITED
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max":
            left = min(left, int(most) - int(now))
    return max(left, 0)
