"""The exact threshold over all micro-batches of a step and all ranks: tau of equation 6.

`entropy_threshold` wants all tokens in one call; this takes them micro-batch by micro-batch.
Nothing is differentiable, and nothing waits for a GPU.
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
from .backends import check_impl, resolve
from .distributed import all_reduce_sum, world_size

MODES = ("exact", "sketch")
COUNTS = ("selected", "all")


class StreamingThreshold:
    """The threshold over all micro-batches of a step (and all ranks), one `update` for each.

    `value()` equals `entropy_threshold` of all tokens at once, whatever their order and however
    they were split.

    Args:
        fraction: as in `entropy_threshold`.
        mode: "exact" holds the fp32 entropies: 4 bytes per valid token on a CPU, and 5 bytes per
            token on a GPU, where dropping the masked ones would have to wait. "sketch" holds one
            histogram of the sign, the exponent and 10 bits of the mantissa, 4 MB for any number of
            tokens. It returns the lower edge of the bin that holds the exact threshold t:
            t * (1 - 2**-10) <= value <= t for a normal t >= 0, so at least k tokens pass.
        group: every rank calls `value`, `mask` and the counts in the same order, between the same
            updates. A rank without a token may skip `update`. Exact mode sums three histograms,
            40 KB, and sketch mode one of 4 MB; the counts add two int64.
        device: where the tokens are, and what a rank without a token gives to the collectives. NCCL
            needs it named. None is the device of the last tokens, also after `reset`, and torch's
            default before the first.
        impl: as in `entropy_threshold`.

    Raises:
        ValueError: a fraction outside (0, 1], an unknown mode or `impl`.
    """

    def __init__(
        self,
        fraction: float = 0.2,
        *,
        mode: str = "exact",
        group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        impl: str = "auto",
    ) -> None:
        check_fraction(fraction)
        check_choice("mode", mode, MODES)
        check_group("group", group)
        check_impl(impl, "selection")
        self.fraction = fraction
        self.mode = mode
        self.group = group
        self.impl = impl
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

        Copies what it holds. Raises ValueError as `entropy_threshold` does, and for another device.
        """
        check_tokens(entropy, mask)
        if not self._takes(entropy.device):
            why = "as device= says" if self._device_is_given else "as in earlier updates"
            raise ValueError(f"entropy must be on {self._device}, {why}; got {entropy.device}")
        resolve("selection", self.impl, entropy.device)
        values, valid = flat(entropy, mask)
        self._value = self._totals = None
        if self.mode == "sketch":
            counts = sketch_histogram(values, valid, self.impl)
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
        """The threshold so far: a 0-dim fp32, +inf without a token. Updates drop its cache."""
        if self._value is None and self.mode == "sketch":
            counts = all_reduce_sum(self._counts(), self.group)
            self._value = sketch_kth_largest(counts, self.fraction)
        elif self._value is None:
            chunks = self._chunks or [(torch.empty(0, device=self._device), None)]
            self._value = kth_largest(chunks, self.fraction, self.group, self.impl).value
        return self._value

    def mask(
        self, entropy: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Bool[Tensor, "*shape"]:
        """The valid tokens that rank at `value()` or above: I[H >= tau] of equation 6.

        All tokens that tie at the threshold are selected, so the step has k of them or a few more.
        A NaN is selected whatever the threshold; a threshold of NaN selects the NaNs of the step
        alone. Raises ValueError as `entropy_threshold` does.
        """
        check_tokens(entropy, mask)
        self._takes(entropy.device)
        values, valid = flat(entropy, mask)
        return select_threshold(values, valid, self.value()).view(entropy.shape)

    def selected_count(self) -> Int[Tensor, ""]:
        """How many tokens of all updates and ranks `mask` selects, ties included; collective."""
        return self._over_ranks()[0]

    def denominator(self, count: str = "selected") -> Float[Tensor, ""]:
        """The number that divides each micro-batch's loss where DDP or FSDP2 averages gradients.

        It is N / W for the W ranks of `group`. N counts the step's tokens on all of them: the ones
        that `mask` selects ("selected"), or the valid ones ("all"). The gradient then equals that
        of one process on all tokens at once; see `distributed.mean_count`. Where gradients are
        summed, divide by N itself. Returns a 0-dim fp64, 0 without a token; collective, as `value`.
        Another `count` is a ValueError.
        """
        if count not in COUNTS:
            raise ValueError(f"count must be one of {', '.join(COUNTS)}; got {count!r}")
        return self._over_ranks()[COUNTS.index(count)].double() / world_size(self.group)

    def _over_ranks(self) -> Int[Tensor, "2"]:
        """The selected and the valid tokens of all ranks."""
        if self._totals is None:
            value = self.value()
            if self.mode == "sketch":
                selected = sketch_count_at_least(self._counts(), value)
            else:
                selected = count_at_least(self._chunks, value)
            self._totals = all_reduce_sum(torch.stack([selected, self.count]), self.group)
        return self._totals

    def state_dict(self) -> dict[str, Any]:
        """The state from which `load_state_dict` goes on: tensors, a number and a string."""
        state: dict[str, Any] = {"mode": self.mode, "fraction": self.fraction}
        if self.mode == "sketch":
            return state | {"counts": self._counts().clone()}
        valid = [v if m is None else v[m] for v, m in self._chunks]
        return state | {"entropies": torch.cat([torch.empty(0, device=self._device), *valid])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, and forget what was counted here.

        Tokens then lie on `device`, or on the state's device where none was given. An empty state
        on the CPU leaves the device as it is. Raises ValueError if mode or fraction differ from
        this object's, or if `state` is no result of `state_dict`.
        """
        for name in ("mode", "fraction"):
            if not isinstance(state, dict) or name not in state:
                raise ValueError(f"state must be a state_dict() with {name!r}; got {_keys(state)}")
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state's {name} is {state[name]!r}, this object's is "
                    f"{getattr(self, name)!r}"
                )
        _check_held(state, self.mode)
        self.reset()
        sketch = self.mode == "sketch"
        held = state["counts" if sketch else "entropies"]
        if held.device.type == "cpu" and not (held.any() if sketch else held.numel()):
            return
        self._takes(held.device)
        held = held.to(self._device, copy=True)
        if sketch:
            self._histogram = held
        else:
            self._chunks = [(held, None)]

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


def _check_held(state: dict[str, Any], mode: str) -> None:
    name, dtype = ("counts", torch.int64) if mode == "sketch" else ("entropies", torch.float32)
    held: Any = state.get(name)
    size = 1 << SKETCH_BITS if mode == "sketch" else None
    vector = isinstance(held, Tensor) and held.dtype == dtype and held.ndim == 1
    if not vector or (size is not None and held.shape != (size,)):
        raise ValueError(
            f"state[{name!r}] must be a {dtype} tensor [{size or 'tokens'}]; got {shown(held)}"
        )
