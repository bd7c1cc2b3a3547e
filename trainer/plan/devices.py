"""The memory and rates of a GPU, by its name. Rates are the vendor's peaks, not measured."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

MiB = 2.0**20


@dataclass(frozen=True)
class Device:
    """One GPU in a machine of several. Rates are the vendor's peaks; 0 where there is none."""

    memory: float
    """Bytes: the total that nvidia-smi or rocm-smi shows. A data sheet's "141 GB" is a name: an
    H200 shows 143,771 MiB. CUDA gives a process up to 1% less."""
    flops: float
    """Flops per second of dense bf16 matrix products."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second and direction between the GPUs of a machine."""
    network: float
    """Bytes per second and GPU between machines."""
    source: str
    is_gpu: bool = True


_PORT_400, _PORT_200 = 400e9 / 8, 200e9 / 8  # a network port of its own for each GPU
_SHARED_100 = 100e9 / 8 / 8  # 100 Gb/s for a machine of eight: an assumption
_PCIE_4 = 32e9
_TOTALS = "memory as nvidia-smi shows it; rates: NVIDIA's data sheet of the"

GPUS = {
    "a100-40gb": Device(
        *(40_960 * MiB, 312e12, 1.555e12, 300e9, _PORT_200),
        f"{_TOTALS} A100 40GB SXM; network: one 200 Gb/s port per GPU, as in DGX A100",
    ),
    "a100-80gb": Device(
        *(81_920 * MiB, 312e12, 2.039e12, 300e9, _PORT_200),
        f"{_TOTALS} A100 80GB SXM; network: one 200 Gb/s port per GPU, as in DGX A100",
    ),
    "h100": Device(
        *(81_559 * MiB, 989e12, 3.35e12, 450e9, _PORT_400),
        f"{_TOTALS} H100 SXM, flops without sparsity; network as in DGX H100",
    ),
    "h200": Device(
        *(143_771 * MiB, 989e12, 4.8e12, 450e9, _PORT_400),
        f"{_TOTALS} H200 SXM, flops without sparsity; network as in DGX H200",
    ),
    "b200": Device(
        *(183_359 * MiB, 2250e12, 8e12, 900e9, _PORT_400),
        f"{_TOTALS} HGX B200, flops without sparsity; network as in DGX B200",
    ),
    "l40s": Device(
        *(46_068 * MiB, 362e12, 0.864e12, _PCIE_4, _SHARED_100),
        f"{_TOTALS} L40S, flops without sparsity; links: PCIe 4; network: 100 Gb/s per machine, "
        "an assumption",
    ),
    "4090": Device(
        *(24_564 * MiB, 165e12, 1.008e12, _PCIE_4, _SHARED_100),
        f"{_TOTALS} GeForce RTX 4090, flops with fp32 sums; links: PCIe 4; network: 100 Gb/s per "
        "machine, an assumption",
    ),
    "mi300x": Device(
        *(206_141_652_992.0, 1307e12, 5.3e12, 448e9, _PORT_400),
        "memory as rocm-smi shows it; rates: AMD's data sheet of the Instinct MI300X, links: "
        "seven of 64 GB/s; network: one 400 Gb/s port per GPU, an assumption",
    ),
}
_ALSO_NAMED = {
    "a100": "a100-80gb",
    "h100-80gb": "h100",
    "h200-141gb": "h200",
    "b200-180gb": "b200",
    "b200-192gb": "b200",
    "l40s-48gb": "l40s",
    "rtx4090": "4090",
    "4090-24gb": "4090",
    "mi300x-192gb": "mi300x",
}
# What vendors and nvidia-smi write around the name. "PCIe" and "NVL" are none of these: such
# cards have other numbers.
_AROUND = re.compile(r"nvidia|amd|instinct|geforce|rtx|tesla|sxm\d*|oam|hgx|dgx|hbm\d*e?|gpu")


def find_device(name: str, own: dict[str, float]) -> Device:
    """The GPU `name` in any spelling ("H200", "NVIDIA H100 80GB HBM3"), or "cpu", this machine.

    `own` are numbers that replace those of the table, by the fields of `Device`; with memory,
    flops and bandwidth among them any name will do.

    Raises:
        ValueError: an unknown name without these numbers, or a number that is not positive.
    """
    if any(value <= 0 for value in own.values()):
        raise ValueError(f"a GPU's numbers must be positive; got {own}")
    words = re.findall(r"[a-z0-9]+", name.lower())
    short = "-".join(word for word in words if not _AROUND.fullmatch(word))
    short = re.sub(r"(?<=\d)g$", "gb", short)
    short = _ALSO_NAMED.get(short, short)
    if short == "cpu":
        known = cpu()
    elif short in GPUS:
        known = GPUS[short]
    elif {"memory", "flops", "bandwidth"} <= set(own):
        known = Device(0, 0, 0, _PCIE_4, _SHARED_100, "links: PCIe 4 and 100 Gb/s, assumptions")
    else:
        raise ValueError(
            f"no GPU {name!r} is known; there are {', '.join(GPUS)} and cpu, and for any other "
            "--gpu-memory (GB), --gpu-tflops and --gpu-bandwidth (TB/s)"
        )
    return _replaced(known, own)


def _replaced(known: Device, own: dict[str, float]) -> Device:
    if not own:
        return known
    changes: dict[str, Any] = {**own, "source": f"{known.source}; {', '.join(own)} as given"}
    found = replace(known, **changes)
    if bool(found.flops) != bool(found.bandwidth):
        raise ValueError("a device without rates needs both --gpu-tflops and --gpu-bandwidth")
    return found


def cpu() -> Device:
    """This machine: its memory, and no rates."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(float(pages), 0.0, 0.0, 0.0, 0.0, "this machine's memory", is_gpu=False)
