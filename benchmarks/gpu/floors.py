"""Stage `floors`: what the GPU is, what it copies, and what its library multiplies.

T tokens, D hidden, V vocabulary, R rows with a gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import timing
from benchmarks.gpu.environment import properties
from benchmarks.gpu.problem import FRACTION
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.setting import Setting, setting_of

ROWS = 2048
SPLITS = (4, 16)
COPY_BYTES = 1 << 31


def run(rows: Rows, job: Row) -> None:
    setting = setting_of(rows, job)
    rows.measure("environment", "machine", lambda: properties(setting.device))
    rows.measure("environment", "copy", lambda: _copy(setting))
    tokens = setting.sizes.base[0]
    for hidden in setting.sizes.hidden:
        shape = {"tokens": tokens, "hidden": hidden, "vocabulary": setting.sizes.vocabulary}
        for name, (call, units) in _products(setting, tokens, hidden).items():
            measure = partial(_timed, setting, call, units, shape)
            rows.measure("floors", name, measure, **shape)


def _timed(
    setting: Setting, call: Callable[[], object], units: float, shape: dict[str, int]
) -> Row:
    row = timing.timed(call, setting.device, setting.sizes.rounds)
    return timing.rate(row, units, **shape) if units else row


def _copy(setting: Setting) -> Row:
    """Bytes read and bytes written, of a buffer far larger than any cache."""
    size = COPY_BYTES if not setting.quick else 1 << 16
    a = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    b = torch.empty_like(a)
    row = timing.timed(lambda: b.copy_(a), setting.device, setting.sizes.rounds)
    return row | {"gb_per_s": 2 * size / row["p50_ms"] / 1e6}


def _products(
    setting: Setting, tokens: int, hidden: int
) -> dict[str, tuple[Callable[[], object], float]]:
    """Calls and their units; all inputs random, for zeros multiply faster than data."""
    vocabulary, dtype = setting.sizes.vocabulary, setting.sizes.dtype

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=setting.device, dtype=dtype)

    h, w = random(tokens, hidden), random(vocabulary, hidden)
    count, rows = int(FRACTION * tokens), min(ROWS, tokens)
    dz = random(count, vocabulary)
    active = h[:count].contiguous()
    rounded = torch.empty(rows, vocabulary, dtype=dtype, device=setting.device)
    exact = torch.empty(rows, vocabulary, dtype=torch.float32, device=setting.device)
    out_dtype = {} if dtype == torch.float32 else {"out_dtype": torch.float32}

    def logits(out: Tensor, **options: torch.dtype) -> None:
        for chunk in h.split(rows):
            torch.mm(chunk, w.T, out=out[: len(chunk)], **options)

    def split(parts: int) -> Tensor:
        width = vocabulary // parts
        left = dz[:, : width * parts].view(count, parts, width).transpose(0, 1)
        right = w[: width * parts].view(parts, width, hidden)
        return torch.bmm(left, right).sum(0, dtype=torch.float32)

    found: dict[str, tuple[Callable[[], object], float]] = {
        "logits, 16-bit out": (lambda: logits(rounded), 1.0),
        "logits, fp32 out": (lambda: logits(exact, **out_dtype), 1.0),
        "logsumexp of a chunk": (lambda: exact.logsumexp(1), 0.0),
        "dW": (lambda: torch.mm(dz.T, active), FRACTION),
        "dH": (lambda: torch.mm(dz, w), FRACTION),
    }
    for parts in SPLITS:
        found[f"dH, split {parts}"] = (partial(split, parts), FRACTION)
    return found
