"""The exact threshold over all micro-batches of a step and all ranks: tau of equation 6.

As `entropy_threshold`, for calls of which none has all tokens. Nothing is
differentiable, and nothing waits for a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_choice, check_fraction, check_group, shown
from ._radix import (
    SKETCH_BITS,
    Chunk,
    check_tokens,
    count_at_least,
    flat,
    kth_largest,
    select_threshold,
    sketch_count_at_least,
    sketch_histogram,
    sketch_kth_largest,
)
from ._shapes import Bool, Float, Int
from .distributed import all_reduce_sum, world_size

MODES = ("exact", "sketch")
COUNTS = ("selected", "all")


class StreamingThreshold:
    """The threshold over all micro-batches of a step (and all ranks), one `update` for each.

    `value()` is that of `entropy_threshold` on all tokens at once, whatever their order and
    however they were split.

    Args:
        fraction: as in `entropy_threshold`.
        mode: "exact" keeps the fp32 entropies, 4 bytes a token (on a GPU 5 bytes a token of the
            batch, as dropping the masked ones would wait for it). "sketch" keeps one histogram of
            the sign, the exponent and 10 bits of the mantissa, 4 MB whatever the number of tokens,
            and returns the lower edge of the bin of the exact threshold t:
            t * (1 - 2**-10) <= value <= t for a normal t >= 0, so at least k tokens pass.
        group: every rank calls `value`, `mask` and the counts in the same order, between the same
            updates. A rank without a token may skip `update`. Exact mode sums three histograms,
            40 KB, and sketch mode one of 4 MB; the counts are two int64 more.
        device: of the tokens, and of what a rank without one gives to the collectives; name it for
            NCCL. None: that of the last tokens, also after `reset`, at first torch's default.

    Raises:
        ValueError: a fraction outside (0, 1], an unknown mode.
    """

    def __init__(
        self,
        fraction: float = 0.2,
        *,
        mode: str = "exact",
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_fraction(fraction)
        check_choice("mode", mode, MODES)
        check_group("group", group)
        self.fraction = fraction
        self.mode = mode
        self.group = group
        self._device_is_given = device is not None
        self._device = torch.empty(0, device=device).device
        self.reset()

    def reset(self) -> None:
        """Forget every token, but not the device that they were on."""
        self._chunks: list[Chunk] = []
        self._histogram: Tensor | None = None
        self._value: Tensor | None = None
        self._totals: Tensor | None = None

    def update(
        self, entropy: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> None:
        """Count the valid tokens of a micro-batch: fp32 of any shape, and a bool mask or None.

        Copies what it keeps. Raises ValueError as `entropy_threshold` does, and for another device.
        """
        check_tokens(entropy, mask)
        if not self._takes(entropy.device):
            why = "as device= says" if self._device_is_given else "as in earlier updates"
            raise ValueError(f"entropy must be on {self._device}, {why}; got {entropy.device}")
        values, valid = flat(entropy, mask)
        self._value = self._totals = None
        if self.mode == "sketch":
            counts = sketch_histogram(values, valid)
            self._histogram = counts if self._histogram is None else self._histogram + counts
        elif valid is not None and values.device.type == "cpu":
            self._chunks.append((values[valid], None))
        else:
            self._chunks.append((values.clone(), None if valid is None else valid.clone()))

    @property
    def count(self) -> Int[Tensor, ""]:
        """The number of valid tokens this rank has seen since the last reset: a 0-dim int64."""
        if self.mode == "sketch":
            return self._counts().sum()
        count = torch.zeros((), dtype=torch.int64, device=self._device)
        for values, valid in self._chunks:
            count = count + (values.numel() if valid is None else torch.count_nonzero(valid))
        return count

    def value(self) -> Float[Tensor, ""]:
        """The threshold so far: a 0-dim fp32, +inf without a token. Kept until the next update."""
        if self._value is None and self.mode == "sketch":
            counts = all_reduce_sum(self._counts(), self.group)
            self._value = sketch_kth_largest(counts, self.fraction)
        elif self._value is None:
            chunks = self._chunks or [(torch.empty(0, device=self._device), None)]
            self._value = kth_largest(chunks, self.fraction, self.group).value
        return self._value

    def mask(
        self, entropy: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Bool[Tensor, "*shape"]:
        """The valid tokens that rank at `value()` or above: I[H >= tau] of equation 6.

        All that tie at the threshold are kept, so over the step these are k tokens or a few more.
        A NaN is kept whatever the threshold; where that is NaN, NaN alone is, wherever in the step
        it is. Raises ValueError as `entropy_threshold` does.
        """
        check_tokens(entropy, mask)
        self._takes(entropy.device)
        values, valid = flat(entropy, mask)
        return select_threshold(values, valid, self.value()).view(entropy.shape)

    def kept_count(self) -> Int[Tensor, ""]:
        """How many tokens of all updates and ranks `mask` keeps, ties included; as `value`."""
        return self._over_ranks()[0]

    def denominator(self, count: str = "selected") -> Float[Tensor, ""]:
        """What each micro-batch's loss is divided by where DDP or FSDP2 averages gradients.

        N / W of the W ranks of `group`, N the step's tokens on all of them: those that `mask` keeps
        ("selected"), or the valid ones ("all"). The gradient is then that of one process on all
        tokens at once; see `distributed.mean_count`. Where gradients are summed it is N itself.
        0-dim fp64, 0 without a token; collective, as `value`. Another `count` is a ValueError.
        """
        if count not in COUNTS:
            raise ValueError(f"count must be one of {', '.join(COUNTS)}; got {count!r}")
        return self._over_ranks()[COUNTS.index(count)].double() / world_size(self.group)

    def _over_ranks(self) -> Int[Tensor, "2"]:
        """The kept and the valid tokens of all ranks."""
        if self._totals is None:
            value = self.value()
            if self.mode == "sketch":
                kept = sketch_count_at_least(self._counts(), value)
            else:
                kept = count_at_least(self._chunks, value)
            self._totals = all_reduce_sum(torch.stack([kept, self.count]), self.group)
        return self._totals

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: tensors, a number and a string."""
        state: dict[str, Any] = {"mode": self.mode, "fraction": self.fraction}
        if self.mode == "sketch":
            return state | {"counts": self._counts().clone()}
        valid = [v if m is None else v[m] for v, m in self._chunks]
        return state | {"entropies": torch.cat([torch.empty(0, device=self._device), *valid])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, in place of what was counted here.

        On `device`, or where none was given on that of the state's tensors; an empty state on the
        CPU changes none. Raises ValueError where its mode or fraction is not that of this object,
        or where it is no result of `state_dict`.
        """
        for name in ("mode", "fraction"):
            if not isinstance(state, dict) or name not in state:
                raise ValueError(f"state must be a state_dict() with {name!r}; got {_keys(state)}")
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state's {name} is {state[name]!r}, this object's is "
                    f"{getattr(self, name)!r}"
                )
        _check_kept(state, self.mode)
        self.reset()
        sketch = self.mode == "sketch"
        kept = state["counts" if sketch else "entropies"]
        if kept.device.type == "cpu" and not (kept.any() if sketch else kept.numel()):
            return
        self._takes(kept.device)
        kept = kept.to(self._device, copy=True)
        if sketch:
            self._histogram = kept
        else:
            self._chunks = [(kept, None)]

    def _takes(self, device: torch.device) -> bool:
        """Whether tokens may be on `device`, which is learned where no other is known."""
        if not (self._device_is_given or self._chunks or self._histogram is not None):
            self._device = device
        return device == self._device

    def _counts(self) -> Tensor:
        """The histogram of the sketch."""
        if self._histogram is None:
            return torch.zeros(1 << SKETCH_BITS, dtype=torch.int64, device=self._device)
        return self._histogram


def _keys(state: object) -> str:
    names = f" with {', '.join(map(repr, state))}" if isinstance(state, dict) else ""
    return shown(state) + names


def _check_kept(state: dict[str, Any], mode: str) -> None:
    name, dtype = ("counts", torch.int64) if mode == "sketch" else ("entropies", torch.float32)
    kept: Any = state.get(name)
    size = 1 << SKETCH_BITS if mode == "sketch" else None
    vector = isinstance(kept, Tensor) and kept.dtype == dtype and kept.ndim == 1
    if not vector or (size is not None and kept.shape != (size,)):
        raise ValueError(
            f"state[{name!r}] must be a {dtype} tensor [{size or 'tokens'}]; got {shown(kept)}"
        )
