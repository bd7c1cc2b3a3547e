"""The cases of the head beyond 2^31 elements, too long for a first call.

T tokens, D hidden, V vocabulary.
"""

import mmap
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..head import Head
from .head_cases import Case
from .head_runs import Shape, Tiles, close, ours
from .launches import Inputs

# Linux: memory that is never touched is not refused.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def offset_cases(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, small: bool = False
) -> list[Case]:
    """Tensors of more than 2^31 elements: an address in 32 bits reads elsewhere, or nothing."""
    big = 1 << (12 if small else 31)
    found = []
    for name, shape in {
        "hidden": (big // 32 + 3, 32, 40) if small else (big // 4096 + 3, 4096, 264),
        "weight": (9, 32, big // 32 + 5) if small else (130, 16384, big // 16384 + 5),
        "logits": (67, 32, 61) if small else (big // 65536 + 70, 64, 65537),
        "stored rows": (67, 32, 61) if small else (big // 65536 + 70, 64, 65537),
    }.items():
        options: dict[str, Any] = {"keep_logits": name == "logits"}
        if name == "stored rows":
            options |= {"store_above": torch.zeros((), device=device), "store_rows": shape[0]}
        run = partial(_last_rows, tiles, dtype, device, shape, options)
        found.append(Case(f"2^31: {name}", run, 7 * 2 * big))
    return found


def far_cases(tiles: Tiles, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The same in the interpreter: rows lie 2^30 elements apart in memory that nobody touches."""
    return [
        Case(f"2^31: rows of {name}", partial(_far_rows, tiles, dtype, device, name))
        for name in ("hidden", "weight")
        if tiles[0] is None or tiles[0].variant != "cublas"
    ]


def _far_rows(tiles: Tiles, dtype: torch.dtype, device: torch.device, name: str) -> None:
    T, D, V = 4, 32, 5
    h, w = torch.randn(T, D, device=device).to(dtype), torch.randn(V, D, device=device).to(dtype)
    y = torch.arange(T, device=device)
    gradients: list[Any] = [torch.randn(T, device=device) for _ in range(3)]
    far = {"hidden": h, "weight": w}
    far[name] = spread(far[name])
    _, got = ours(tiles, (far["hidden"], far["weight"], y, None), gradients, {})
    _, near = ours(tiles, (h, w, y, None), gradients, {})
    for x, wanted in zip(got, near, strict=True):
        assert torch.equal(x, wanted), f"{name} is read elsewhere beyond 2^31"


def spread(rows: Tensor) -> Tensor:
    """The same rows, 2^30 elements apart, with zeros where an offset in 32 bits would read."""
    stride = 1 << 30
    size = ((len(rows) + 2) * stride + rows.shape[1]) * rows.element_size()
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    found = torch.frombuffer(memory, dtype=rows.dtype)
    return found.as_strided(rows.shape, (stride, 1), 2 * stride).copy_(rows)


def _last_rows(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, shape: Shape, options: dict[str, Any]
) -> None:
    """The rows whose offsets pass 2^31 against fp64, with a gradient at the last ones only."""
    T, D, V = shape
    generator = torch.Generator(device).manual_seed(int(torch.randint(1 << 30, ())))
    h = torch.empty(T, D, dtype=dtype, device=device).normal_(generator=generator)
    w = torch.empty(V, D, dtype=dtype, device=device).normal_(generator=generator).mul_(D**-0.5)
    y = torch.randint(V, (T,), device=device, generator=generator)
    last = slice(max(T - 64, 0), T)
    y[last] = V - 1 - torch.arange(T - last.start, device=device) % V
    gradients: list[Any] = [torch.zeros(T, device=device) for _ in range(3)]
    for gradient in gradients:
        gradient[last] = torch.randn(T - last.start, device=device)
    _, got = ours(tiles, (h, w, y, None), gradients, options)
    # Few rows and few columns of the weight's gradient are enough, and fp64 of all would not fit.
    rows = (h[last].contiguous(), w, y[last], None)
    kept = [g[last] for g in gradients]
    want = _blocked_reference(rows, kept)
    for x, truth in zip([g[last] for g in got[:4]], want[:4], strict=True):
        close(x, truth, dtype)
    assert not got[3][: last.start].any(), "a row without gradient has one"
    columns = slice(max(V - 256, 0), V)
    close(got[4][columns], want[4][columns], dtype)


def _blocked_reference(inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """fp64 results of few rows without fp64 copies of the whole weight."""
    h, w, y, _ = inputs
    blocks = w.split(1 << 13)
    z = torch.cat([h.double() @ block.double().T for block in blocks], 1).requires_grad_()
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device) if z.shape[1] < 4096 else None
    outputs = (
        _statistics(z, y) if eye is None else reference.linear_logprob_entropy(Head(z, eye, y))
    )
    torch.autograd.backward(outputs, [g.double() for g in gradients])
    dz = z.grad
    assert dz is not None
    starts = range(0, w.shape[0], 1 << 13)
    dh = torch.zeros(h.shape, dtype=torch.float64, device=h.device)
    for start, block in zip(starts, blocks, strict=True):
        dh += dz[:, start : start + len(block)] @ block.double()
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
    tail = slice(max(w.shape[0] - 256, 0), w.shape[0])
    dw[tail] = (dz[:, tail].T @ h.double()).float()
    return [*(x.detach() for x in outputs), dh, dw]


def _statistics(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, y.unsqueeze(1)).squeeze(1), entropy, z.logsumexp(1)
