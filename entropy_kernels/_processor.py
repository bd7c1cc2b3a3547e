"""Which of the extension's instruction sets runs a head on this processor."""

import os
from types import ModuleType

BF16 = 1  # the extension's number for it


def instruction_set(module: ModuleType, dtype: int) -> str:
    """The set that EK_CPU_ISA names, else this machine's best for `dtype`, the extension's number.

    For bf16 a few milliseconds of measuring tell whether products of pairs of bf16 are the faster
    instruction. Intel's Sapphire Rapids runs vdpbf16ps at half the rate of fp32 FMA, AMD's Zen 4
    and 5 at twice that rate. The margin lies in between, so a machine decides the same way every
    time. BFDOT of aarch64, not yet measured anywhere, is chosen likewise.
    Raises a ValueError where EK_CPU_ISA names a set that this machine cannot run.
    """
    names: list[str] = module.instruction_sets()
    wanted = os.environ.get("EK_CPU_ISA", "").strip().lower()
    if wanted:
        if wanted not in module.instruction_sets(models=True):
            raise ValueError(f"EK_CPU_ISA must be one of {', '.join(names)} here; got {wanted!r}")
        return wanted
    if dtype != BF16:
        return next(name for name in names if name != "amx")  # its tiles hold bf16
    best, *others = names
    seconds = {name: module.seconds(name, dtype) for name in names}
    for name in others:
        if seconds[name] < 0.8 * seconds[best]:
            best = name
    return best
