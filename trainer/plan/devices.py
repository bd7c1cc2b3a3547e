"""What the vendor says a GPU has. Nothing here is measured."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU in a node of several. Rates are the vendor's peaks; 0 where there is none."""

    memory: float
    """Bytes."""
    flops: float
    """A second, of dense bf16 matrix products."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """Between GPUs of a node, bytes a second and direction."""
    network: float
    """Between nodes, bytes a second and GPU."""
    source: str
    is_gpu: bool = True


_DGX_NETWORK = 400e9 / 8  # one ConnectX-7 port of 400 Gb/s a GPU, as in NVIDIA's DGX nodes

GPUS = {
    "a100": Device(
        *(80e9, 312e12, 2.039e12, 300e9, 200e9 / 8),
        "NVIDIA A100 80GB SXM data sheet; network: one 200 Gb/s port a GPU, as in DGX A100",
    ),
    "h100": Device(
        *(80e9, 989e12, 3.35e12, 450e9, _DGX_NETWORK),
        "NVIDIA H100 SXM data sheet, flops without sparsity; network as in DGX H100",
    ),
    "h200": Device(
        *(141e9, 989e12, 4.8e12, 450e9, _DGX_NETWORK),
        "NVIDIA H200 SXM data sheet, flops without sparsity; network as in DGX H200",
    ),
    "b200": Device(
        *(180e9, 2250e12, 8e12, 900e9, _DGX_NETWORK),
        "NVIDIA HGX B200 data sheet, flops without sparsity; network as in DGX B200",
    ),
}


def cpu() -> Device:
    """This machine: its memory, and no rates."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(float(pages), 0.0, 0.0, 0.0, 0.0, "this machine's memory", is_gpu=False)
