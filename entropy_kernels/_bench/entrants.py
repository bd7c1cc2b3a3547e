"""Who takes part: eager, torch.compile of it, others' heads, and our step as it is used."""

from functools import partial

import torch

from .. import backends
from .contestant import EVERYTHING, NO_ENTROPIES, TOLD, Contestant
from .others import torch_head, trl_head
from .step import dense, dense_by_onednn, ours, plain_head

# Name, label, whether in chunks: torch's head in its fastest setting, and without all logits.
TORCH_HEADS = (
    ("lce", "torch's linear_cross_entropy, no entropies", False),
    ("lce-chunked", "torch's linear_cross_entropy in chunks, no entropies", True),
)
# Those that hold all logits.
HOLD_LOGITS = ("eager", "eager-onednn", "compile", "lce")


def entrants(
    impl: str, device: torch.device, dtype: torch.dtype, fraction: float
) -> list[Contestant]:
    """The first is what the others are compared with. `impl` is what "auto" stands for."""
    setting = {"fraction": fraction}
    eager = partial(dense, plain_head, fraction=fraction)
    compiled = partial(eager, compiled=True)
    found = [Contestant("eager", "eager: all logits", eager, setting, computes=TOLD)]
    if device.type == "cpu" and dtype == torch.float32:
        by_onednn = partial(dense_by_onednn, plain_head, fraction=fraction)
        label = "eager with oneDNN's products"
        found.append(Contestant("eager-onednn", label, by_onednn, setting, computes=TOLD))
    label = "torch.compile of eager"
    found.append(Contestant("compile", label, compiled, setting, uncompiled=eager, computes=TOLD))
    trl = partial(dense, trl_head, fraction=fraction)
    label = "TRL's kernels head"
    found.append(Contestant("trl", label, trl, setting, needs=("trl",), computes=TOLD))
    for name, label, chunked in TORCH_HEADS:
        run = partial(dense, partial(torch_head, chunked=chunked), fraction=fraction)
        found.append(Contestant(name, label, run, setting, computes=NO_ENTROPIES))
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
    # Known beforehand, log-probs are those of the selected tokens.
    computes = NO_ENTROPIES if known else EVERYTHING
    return Contestant(name, label, run, setting, exact=True, computes=computes)


def is_ours(contestant: Contestant) -> bool:
    return contestant.name.split("-")[0] in ("cpu", "torch", "triton", "cuda")
