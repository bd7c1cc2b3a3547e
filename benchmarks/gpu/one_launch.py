"""python -m benchmarks.gpu.one_launch NAME small|full: one call, for tools that watch a process."""

import sys
from typing import Any

import torch

import entropy_kernels as ek
from benchmarks.gpu import ours
from entropy_kernels.verification.launches import launch_backward, launch_forward

LAUNCHES = ("forward", "backward", "stored_rows", "selection", "ratio_loss")
# Room for the logits that are stored: fewer rows than there are.
STORED_ROWS = {"small": 100, "full": 1024}
# (tokens, hidden, vocabulary): odd ones for the sanitizer, real ones for the profiler.
SIZES = {"small": (130, 72, 1037), "full": (8192, 4096, 151936)}


def main(name: str, size: str, device: str = "cuda") -> None:
    tokens, hidden, vocabulary = SIZES[size]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    entropy = torch.rand(tokens, device=device)
    if name == "selection":
        ours.top_entropy_mask(entropy, entropy > 0.1, "triton")
    if name == "ratio_loss":
        ek.ratio_loss(-entropy, -entropy, entropy, entropy > 0.5, impl="triton")
    if name in ("selection", "ratio_loss"):
        return
    h = torch.randn(tokens, hidden, device=device, dtype=dtype)
    w = torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5
    inputs = (h, w, torch.arange(tokens, device=device), None)
    options: dict[str, Any] = {}
    if name == "stored_rows":
        options = {"store_above": torch.zeros((), device=device), "store_rows": STORED_ROWS[size]}
    found = launch_forward(inputs, None, options)
    if name != "forward":
        gradient = (entropy > 0.8).float()
        options = {"max_active_rows": int(gradient.sum())}
        launch_backward([gradient, None, None], inputs, found, None, options)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
