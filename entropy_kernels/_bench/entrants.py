"""Who takes part: eager and torch.compile of it, and our step in the ways it is used."""

from functools import partial

import torch

from .. import backends
from .contestant import Contestant
from .step import dense, dense_by_onednn, ours, plain_head


def entrants(
    impl: str, device: torch.device, dtype: torch.dtype, fraction: float
) -> list[Contestant]:
    """The first is what the others are compared with. `impl` is what "auto" stands for."""
    setting = {"fraction": fraction}
    eager = partial(dense, plain_head, fraction=fraction)
    compiled = partial(eager, compiled=True)
    found = [Contestant("eager", "eager: all logits", eager, setting)]
    if device.type == "cpu" and dtype == torch.float32:
        by_onednn = partial(dense_by_onednn, plain_head, fraction=fraction)
        found.append(Contestant("eager-onednn", "eager with oneDNN's products", by_onednn, setting))
    label = "torch.compile of eager"
    found.append(Contestant("compile", label, compiled, setting, uncompiled=eager))
    impls = [impl]
    for other in ("triton", "cuda"):
        if device.type == "cuda" and impl != other and backends.why_not(other, device) is None:
            # Not yet what "auto" takes there; what is checked first may be timed.
            impls.append(other)
    ways = [(1.0, False), (fraction, False), (fraction, True)]
    return found + [our_contestant(x, *way) for x in impls for way in dict.fromkeys(ways)]


def our_contestant(
    impl: str, fraction: float, known: bool = False, half: bool = False
) -> Contestant:
    """`known`, the tokens are told beforehand; `half`, of the advantages are zero."""
    name = f"{impl}-{fraction:g}" + "-known" * known + "-half" * half
    label = f"ours ({impl}), {100 * fraction:g}% of the tokens"
    label += ", known beforehand" * known + ", half of the advantages zero" * half
    run = partial(ours, impl=impl, fraction=fraction, known=known, half=half)
    setting = {"fraction": fraction, "half": True} if half else {"fraction": fraction}
    return Contestant(name, label, run, setting, exact=True)


def is_ours(contestant: Contestant) -> bool:
    return contestant.name.split("-")[0] in ("cpu", "torch", "triton", "cuda")
