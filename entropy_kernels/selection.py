"""Exact selection of the highest-entropy tokens: the indicator I[H >= tau] of equation 6.

"Beyond the 80/20 Rule" (arXiv 2506.01939), section 5.1, trains on the `fraction` of the tokens
with the highest entropy. Only valid tokens count (no prompt, padding or tool token): of n,

    k = max(1, ceil(fraction * n))

are selected, `fraction` being read as a decimal: 0.55 of 100 is 55, though fp64's product is
above it. With n = 0 the threshold is +inf and nothing is selected. A NaN ranks above every number,
so a broken entropy is selected and shows in the loss instead of disappearing. -0 equals +0. Rows
whose target is -100 have entropy 0 and are no tokens: leave them out of the mask.

Nothing here is differentiable, and nothing waits for a GPU. B sequences, L tokens a sequence.
"""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributed import ProcessGroup

from ._arguments import (
    check_choice,
    check_fraction,
    check_generator,
    check_group,
    check_tensor,
    shown,
)
from ._radix import (
    SKETCH_BITS,
    Chunk,
    count_at_least,
    keep_largest,
    keep_largest_of_rows,
    keep_threshold,
    kth_largest,
    sketch_count_at_least,
    sketch_histogram,
    sketch_kth_largest,
)
from ._shapes import Bool, Float, Int
from .distributed import all_reduce_sum, rank_offset, world_size

SCOPES = ("batch", "sequence")
WHICH = ("top", "bottom", "random")
TIES = ("exact", "threshold")
MODES = ("exact", "sketch")
COUNTS = ("selected", "all")


def entropy_threshold(
    entropy: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    fraction: float = 0.2,
    *,
    group: ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """The entropy of the k-th highest valid token, k = max(1, ceil(fraction * n)).

    tau of equation 6 (arXiv 2506.01939, section 5.1): an entropy of the batch, the k-th largest
    exactly, not a value interpolated between two as torch.quantile's, which stops at 2**24
    elements besides. Three histograms of the bits, linear in n, with bounded memory.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        group: tokens of all its ranks count, and every rank calls, also one without a token; 40 KB
            of histograms a rank are summed and nothing else moves. None: this process alone.

    Returns a 0-dim fp32 on the device of `entropy`; +inf without a valid token.

    Raises:
        ValueError: another dtype, a mask of another shape or device, a fraction outside (0, 1].
    """
    _check_tokens(entropy, mask)
    check_fraction(fraction)
    check_group("group", group)
    return kth_largest([_flat(entropy, mask)], fraction, group).value


def top_entropy_mask(
    entropy: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    fraction: float = 0.2,
    *,
    scope: str = "batch",
    which: str = "top",
    ties: str = "exact",
    group: ProcessGroup | None = None,
    generator: Generator | None = None,
) -> Bool[Tensor, "*shape"]:
    """The k valid tokens with the highest entropy, k = max(1, ceil(fraction * n)), as a mask.

    Args:
        entropy: fp32 of any shape, nats.
        mask: bool, the valid tokens; None for all.
        scope: "batch" takes n and k over all tokens of the call (the paper, section 5.1) and of
            all ranks of `group`; "sequence" over each row of [B, L] by itself, by a sort.
        which: "top"; "bottom", the k lowest (a NaN first here too); "random", k uniformly random
            valid tokens, the control of arXiv 2605.07660, blind to all entropies but NaN, which
            come first here too.
        ties: "exact" keeps exactly k, at the threshold those of the lowest (rank, index) first;
            "threshold" keeps every token that ranks there or above, the paper's indicator.
        group: as in `entropy_threshold`; "exact" ties move one int64 a rank more.
        generator: what "random" draws from, by torch.rand; seed the ranks differently.

    Returns a bool tensor of entropy's shape, false wherever `mask` is.

    Raises:
        ValueError: as `entropy_threshold`; an unknown option; scope="sequence" with other than two
            dimensions or with a group (a sequence lives on one rank); a generator where nothing is
            random.
    """
    _check_tokens(entropy, mask)
    check_fraction(fraction)
    _check_options(entropy, scope, which, ties, group, generator)
    score = _score(entropy.detach(), which, generator)
    if scope == "sequence":
        return keep_largest_of_rows(score, mask, fraction, ties)
    values, valid = _flat(score, mask)
    kth = kth_largest([(values, valid)], fraction, group)
    if ties == "threshold":
        keep = keep_threshold(values, valid, kth.value)
    else:
        quota = kth.quota - rank_offset(kth.equal, group)
        keep = keep_largest(values, valid, kth.value, quota)
    return keep.view(entropy.shape)


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
        _check_tokens(entropy, mask)
        if not self._takes(entropy.device):
            why = "as device= says" if self._device_is_given else "as in earlier updates"
            raise ValueError(f"entropy must be on {self._device}, {why}; got {entropy.device}")
        values, valid = _flat(entropy, mask)
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
        _check_tokens(entropy, mask)
        self._takes(entropy.device)
        values, valid = _flat(entropy, mask)
        return keep_threshold(values, valid, self.value()).view(entropy.shape)

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


def _flat(score: Tensor, mask: Tensor | None) -> Chunk:
    """The tokens in one dimension, contiguous and without gradient."""
    values = score.detach().reshape(-1).contiguous()
    return values, None if mask is None else mask.reshape(-1).contiguous()


def _score(entropy: Tensor, which: str, generator: Generator | None) -> Tensor:
    """What `which` selects the largest of; NaN where the entropy is, which ranks first."""
    if which == "random":
        lot = torch.rand(
            entropy.shape, generator=generator, dtype=torch.float32, device=entropy.device
        )
        return lot.masked_fill(entropy.isnan(), torch.nan)
    return -entropy if which == "bottom" else entropy


def _check_tokens(entropy: Tensor, mask: Tensor | None) -> None:
    check_tensor("entropy", entropy)
    if entropy.dtype != torch.float32:
        raise ValueError(f"entropy must be torch.float32; got {entropy.dtype}")
    if mask is not None:
        check_tensor("mask", mask, "bool", entropy, "entropy")


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


def _check_options(
    entropy: Tensor,
    scope: str,
    which: str,
    ties: str,
    group: ProcessGroup | None,
    generator: Generator | None,
) -> None:
    check_choice("scope", scope, SCOPES)
    check_choice("which", which, WHICH)
    check_choice("ties", ties, TIES)
    check_group("group", group)
    if generator is not None and which != "random":
        raise ValueError(f'generator is for which="random"; got which={which!r}')
    check_generator(generator, entropy, "entropy")
    if scope == "batch":
        return
    if entropy.dim() != 2:
        raise ValueError(f'scope="sequence" needs entropy of [B, L]; got {tuple(entropy.shape)}')
    if group is not None:
        raise ValueError(
            f'scope="sequence" takes no group, as a sequence lives on one rank; got {shown(group)}'
        )
