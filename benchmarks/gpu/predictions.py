"""Predictions made before any measurement. They are not results.

V = 151936, bf16, 20% of the tokens. Ours: the launches of a step (launches.py), each by the time
that its work takes (model.py) with the instructions of its machine code (costs.json). Others: the
products and the memory traffic that their sources show, below. hardware.py has every constant of a
GPU and every assumed rate. Uncertain by 15% for ours on an H200, and by 25% for all else.

T tokens, D hidden, V vocabulary. A unit is one product of 2 T D V flops.
"""

import math
from functools import cache

from benchmarks.gpu.hardware import COPY, GPUS, LAUNCH, Gpu
from benchmarks.gpu.launches import Shape, forward_of, step_of
from benchmarks.gpu.model import library, of_cuda, seconds

HIDDEN = (1024, 2048, 4096, 5120)
GPU = GPUS[0]
VOCABULARY = 151936
FRACTION = 0.2
WAYS = {
    "triton-0.2": "0.2",
    "triton-threshold": "threshold",
    "triton-recomputed": "recomputed",
    "triton-known": "known",
    "cuda-0.2": "0.2",
}
# Selection and ratio loss: bytes per token of their tensors, and launches.
LOSS_BYTES, LOSS_LAUNCHES = 43, 40

# Others on any GPU: (units of 16-bit products, units of fp32 products, bytes per logit and pass).
# Traffic that a product itself causes is left out: it is hidden under the product.
# eager: fp32 copy 6, log_softmax 16, since a row is read three times, exp 8, product 12, sum 4;
#   backward zeros 4, log_softmax 20, 16-bit copy 6, and what autograd adds to and scales, 12.
# compile: two passes over 16-bit logits, and one that writes their gradient.
# trl: kernels/chunked_logprob.py of TRL 1.16: a pass over each 16-bit tile; again, in backward, one
#   that overwrites it. flsce of Liger: the same three products after a recomputation.
# torch-lce: F.linear_cross_entropy in chunks. Gradients in forward; log_softmax in fp32 as eager's.
# liger-grpo: chunks of 2048 x 4096; two products in fp32 with their copies (fused_linear_ppo.py).
_TRAFFIC: dict[str, tuple[float, float, float]] = {
    "eager": (3, 0, 88),
    "compile": (3, 0, 8),
    "trl": (4, 0, 6),
    "torch-lce": (3, 0, 40),
    "liger-grpo": (2, 2, 24),
    "liger-grpo-tf32": (2, 2, 24),
}
# Others by the rates of their kernels on an H200, TF/s at D of HIDDEN: forward, backward. Those of
# FLSCE and verl at 2048 and 4096 are of Liger-Kernel#1422, forward without entropy. The rest, and
# all of cut-cross-entropy's, which is a kernel like verl's, are assumed.
_RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "flsce": ((650, 747, 789, 789), (600, 675, 762, 765)),
    "verl": ((300, 372, 460, 470), (300, 377, 500, 505)),
    "cce": ((330, 390, 450, 460), (330, 390, 450, 460)),
}
# The share of its blocks that cut-cross-entropy keeps where it filters: peaked logits, assumed.
CCE_KEPT = 0.3
# FLSCE on a few rows, relative to all of them.
FEW_ROWS = {8192: 0.85, 32768: 0.93}
# The share of fp32 multiply-adds at their peak that a library reaches; TF32 on an H200 in TF/s.
FP32, TF32_TFLOPS = 0.75, 400

THRESHOLD_MS = 2.0
# Bytes above inputs and gradients at 32768 tokens.
PEAK_BYTES = 0.6e9

# What the project set itself: (ours, other, at most this share of the other's time).
TARGETS = (
    ("triton-0.2", "eager", 0.40),
    ("triton-0.2", "compile", 0.60),
    ("triton-0.2", "flsce", 0.50),
    ("triton-0.2", "flsce-composed", 1.0),
    ("triton-known", "flsce", 0.20),
)
VERL_TARGETS = (("triton-0.2", "verl", 0.30),)
FORWARD_SHARE_OF_CUBLAS = 0.85


@cache
def milliseconds(name: str, tokens: int, hidden: int, on: Gpu | None = GPU) -> float | None:
    """Predicted for a contestant on a GPU; None where nothing is."""
    if on is None:
        return None
    impl, _, way = name.partition("-")
    if impl == "cuda" and not of_cuda(on):
        return None
    if name in WAYS:
        return _ours(WAYS[name], tokens, hidden, on, impl)
    if way == "forward" and impl in ("triton", "cuda"):
        found = forward_of(shape(on, tokens, hidden), impl=impl)
        return 1e3 * sum(seconds(launch, on) for launch in found)
    if name == "logits, 16-bit out":
        return 1e3 * library(_unit(tokens, hidden), hidden, on)
    if name in _TRAFFIC:
        return _by_traffic(name, tokens, hidden, on)
    if on == GPU and hidden in HIDDEN:
        return _by_rates(name, tokens, hidden)
    return None


def forward_tflops(name: str, hidden: int, on: Gpu | None = GPU) -> float | None:
    """The rate of a forward, or of the library's product."""
    tokens = 8192
    found = milliseconds(name, tokens, hidden, on)
    return found and _unit(tokens, hidden) / found / 1e9


def copy_gb_per_s(on: Gpu | None) -> float | None:
    return None if on is None else COPY * on.memory / 1e9


def shape(where: Gpu, tokens: int, hidden: int) -> Shape:
    active = math.ceil(FRACTION * tokens)
    return Shape(where.architecture, where.processors, tokens, hidden, VOCABULARY, active)


def _unit(tokens: int, hidden: int) -> float:
    return 2 * tokens * hidden * VOCABULARY


def _ours(way: str, tokens: int, hidden: int, where: Gpu, impl: str) -> float:
    step = shape(where, tokens, hidden)
    found, rows = step_of(step, way, impl), step.active if way == "known" else tokens
    loss = LOSS_BYTES * rows / (COPY * where.memory) + LOSS_LAUNCHES * LAUNCH
    return 1e3 * (loss + sum(seconds(launch, where) for launch in found))


def _by_traffic(name: str, tokens: int, hidden: int, where: Gpu) -> float | None:
    units, fp32_units, per_logit = _TRAFFIC[name]
    total = units * library(_unit(tokens, hidden), hidden, where)
    total += per_logit * tokens * VOCABULARY / (COPY * where.memory)
    if fp32_units:
        if name.endswith("tf32") and where != GPU:
            return None
        fma = 2 * where.processors * where.fma * where.gigahertz * 1e9
        rate = TF32_TFLOPS * 1e12 if name.endswith("tf32") else FP32 * fma
        total += fp32_units * _unit(tokens, hidden) / rate
    return 1e3 * total


def _by_rates(name: str, tokens: int, hidden: int) -> float | None:
    kernel, _, part = name.partition("-")
    if kernel not in _RATES:
        return None
    unit, at = _unit(tokens, hidden), HIDDEN.index(hidden)
    forward, backward = (1e3 * unit / (1e12 * rates[at]) for rates in _RATES[kernel])
    few = FRACTION * (forward + 3 * backward) / FEW_ROWS.get(tokens, 1.0)
    found = {
        "": forward + 3 * backward,
        "forward": forward,
        "composed": forward + few,
        "known": few,
        "exact": forward + 3 * backward,
        "filtered": forward + (1 + 2 * CCE_KEPT) * backward,
    }
    return found.get(part)
