"""GPUs that times are predicted for: public constants, and assumptions, each with its source.

An assumption is what no maker publishes, such as a library's rate. A run of `python -m
benchmarks.gpu` measures those of its GPU: stages `environment` and `floors`.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Per GPU or, where it says so, per multiprocessor and clock.

    name: as torch reports it.
    processors, gigahertz: multiprocessors, and the boost clock that `tensor` is told at.
    tensor: flops of dense 16-bit products with fp32 sums, per multiprocessor and clock.
    fma: fp32 multiply-adds per multiprocessor and clock.
    lanes: threads of which a scheduler starts an instruction per clock.
    memory: bytes per second of the datasheet.
    feed: bytes from L2 into shared memory, per multiprocessor and clock.
    sustained: the share of the tensor cores' datasheet rate that a long product reaches.
    """

    name: str
    architecture: str
    processors: int
    gigahertz: float
    tensor: int
    fma: int
    lanes: int
    memory: float
    feed: float
    sustained: float

    @property
    def peak(self) -> float:
        """Flops per second of dense 16-bit products."""
        return self.processors * self.tensor * self.gigahertz * 1e9


# Multiprocessors, clocks, rates and memory: NVIDIA's datasheets of H200, H100 SXM, A100 SXM 80 GB
# and B200, and its architecture papers of Ampere, Ada and Blackwell GPUs. `feed`: A100's L2 reads
# 5,120 bytes per clock (its paper). On an H100 a Triton product without multicast reaches 1,347
# TF/s in fp8 (triton-lang/triton#5461), which reads 34 bytes; the paths are 64 bytes wide.
# `sustained`: Liger-Kernel#1422 has 791 TF/s on an H200; A100 and RTX GPUs are not limited by
# power as much. B200 is assumed to be like H200. MI300X: AMD's datasheet and its paper of CDNA 3,
# whose L2 reads 2 KB per clock for 38 compute units; SemiAnalysis measured 620 TF/s in bf16.
GPUS = (
    Gpu("NVIDIA H200", "sm_90", 132, 1.83, 4096, 128, 32, 4.8e12, 36, 0.80),
    Gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, 1.83, 4096, 128, 32, 3.35e12, 36, 0.80),
    Gpu("NVIDIA B200", "sm_100", 148, 1.85, 8192, 128, 32, 8e12, 64, 0.80),
    Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 1.41, 2048, 64, 32, 2.04e12, 47, 0.88),
    Gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, 1.695, 512, 128, 32, 0.936e12, 32, 0.95),
    Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 2.52, 512, 128, 32, 1.008e12, 32, 0.95),
    Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 2.407, 512, 128, 32, 1.792e12, 32, 0.95),
    Gpu("AMD Instinct MI300X", "gfx942", 304, 2.1, 2048, 128, 16, 5.3e12, 54, 0.47),
)
# The share of its datasheet's bandwidth that a copy reaches, counting reads and writes.
COPY = 0.9
# A library's product loses as much time to its beginning and end as this depth takes.
LIBRARY_DEPTH = 160
# Warp instructions that a scheduler issues per clock where two to four warps wait for each other.
# Four schedulers are in a multiprocessor.
ISSUE = 0.6
SCHEDULERS = 4
# Special functions per multiprocessor and clock.
SPECIAL = 16
# Seconds of a launch that has little to do.
LAUNCH = 3e-6


def gpu(name: str | None) -> Gpu | None:
    """The GPU that torch reports by this name; None for one without constants here."""
    return next((x for x in GPUS if x.name == name), None)
