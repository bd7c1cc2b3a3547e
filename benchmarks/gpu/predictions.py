"""Predictions made before any measurement. They are not results.

From a cost model for an H200 at V = 151936, bf16, 20% of the tokens: products of 2 T D V at the
rates of their kernels, copies at 4.3 TB/s. Uncertain by 15% for ours, by 25% for eager, CCE and
Liger's GRPO loss. Milliseconds of forward and backward, by contestant and tokens, for the hidden
sizes of HIDDEN.
"""

HIDDEN = (1024, 2048, 4096, 5120)
GPU = "NVIDIA H200"
VOCABULARY = 151936

STEP_MS: dict[str, dict[int, tuple[float, ...]]] = {
    "eager": {8192: (39.0, 48.5, 66.9, 76.5), 32768: (156, 194, 268, 306)},
    "compile": {8192: (15.8, 25.3, 43.8, 53.4), 32768: (63, 101, 175, 214)},
    "liger-grpo": {8192: (112, 217, 427, 532)},
    "liger-grpo-tf32": {8192: (27.8, 48.2, 88.6, 109)},
    "cce-exact": {8192: (30, 55, 104, 128)},
    "cce-filtered": {8192: (20, 35, 63, 77)},
    "verl": {8192: (34.0, 54.3, 83.3, 102.8), 32768: (136, 217, 333, 411)},
    "flsce": {8192: (16.7, 29.5, 53.1, 66.1), 32768: (67, 118, 212, 265)},
    "flsce-composed": {8192: (7.8, 13.8, 25.4, 31.7), 32768: (30, 53, 97, 122)},
    "triton-0.2": {8192: (7.7, 13.9, 26.0, 32.0), 32768: (30.3, 54.4, 101.7, 125.4)},
    # Forward by cuBLAS: 1 unit, its logits read; of the rows stored, a copy and another read.
    "triton-threshold": {8192: (7.6, 12.3, 21.3, 26.0), 32768: (30.9, 51.4, 91.5, 112.2)},
    "triton-known": {8192: (3.3, 5.6, 9.9, 12.2), 32768: (12.4, 20.6, 36.5, 44.8)},
}
# TF/s of forward alone.
FORWARD_TFLOPS: dict[str, tuple[float, ...]] = {
    "logits, 16-bit out": (650, 720, 770, 775),
    "triton-forward": (520, 580, 620, 630),
    "flsce-forward": (650, 747, 789, 789),
    "verl-forward": (300, 372, 460, 470),
}
COPY_GB_PER_S = 4300.0
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


def milliseconds(name: str, tokens: int, hidden: int) -> float | None:
    """Predicted for a contestant; times scale with the tokens where no others are given."""
    if hidden not in HIDDEN:
        return None
    at = HIDDEN.index(hidden)
    if name in FORWARD_TFLOPS:
        return 2 * tokens * hidden * VOCABULARY / FORWARD_TFLOPS[name][at] / 1e9
    by_tokens = STEP_MS.get(name, {})
    if tokens in by_tokens:
        return by_tokens[tokens][at]
    if 8192 in by_tokens:
        return by_tokens[8192][at] * tokens / 8192
    return None
