"""Checks that a policy's states have no noise and depend on no other sequence of batch or row.

T tokens, D hidden.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Layout, Packed, arrange
from trainer.config import is_flash
from trainer.model.modes import random_state

_SEVEN = 7  # tokens of the sequence that is compared
_NOISY = ("drop", "jitter", "noise")


def some_tokens(policy: Any, count: int) -> Tensor:
    """`count` token ids of the model's vocabulary."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    return torch.arange(count, device=policy.device) % vocabulary


@torch.no_grad()
def check_states(policy: Any) -> None:
    """Check that a sequence has the same states each time, and beside short or long others.

    Collective where the policy is sharded.

    Raises:
        ValueError: it has not, or they are not finite; with what its settings say of noise.
    """
    name = type(policy.model).__name__
    alone = arrange(some_tokens(policy, _SEVEN), torch.tensor([_SEVEN]), "padded")
    before = random_state(policy.device)
    first = _states(policy, alone)
    if not first.isfinite().all():
        raise ValueError(f"{name} cannot be trained: its states in {_dtype(policy)} are not finite")
    far, near = _beside(policy, policy.longest or _SEVEN), _beside(policy, _SEVEN)
    crowd = _behind(policy)
    again = _states(policy, alone)
    drawn = not all(map(torch.equal, before, random_state(policy.device)))
    if drawn and not torch.equal(first, again):
        raise ValueError(
            f"{name} cannot be trained: its states differ each time, for it draws random numbers "
            f"in eval mode; {_noise(policy.model.config)}"
        )
    twice = arrange(some_tokens(policy, _SEVEN).repeat(2), torch.tensor([2 * _SEVEN]), "padded")
    joined = _states(policy, twice)[_SEVEN:]
    for got, want, what in (
        (again, first, "the batches before"),
        (near, first, "the other sequences of its batch"),
        (crowd, first, "the other sequences of its batch"),
        (far, near, "how long the other sequences of its batch are"),
    ):
        if not _alike(got, want, joined, _dtype(policy)):
            raise ValueError(
                f"{name} cannot be trained: the states of a sequence depend on {what} (by up to "
                f"{float((got - want).abs().max()):.1e}), so its log-probs are not the sampler's"
            )


@torch.no_grad()
def check_cache(policy: Any, cache: Any) -> None:
    """Check that logits token by token, with the `cache`, are those of one forward.

    Raises:
        ValueError: they are not.
    """
    tokens = some_tokens(policy, 2 * _SEVEN)[None]

    def logits(first: int, end: int, **options: Any) -> Tensor:
        place = torch.arange(end, device=policy.device)[None]
        asked = {"input_ids": tokens[:, first:end], "attention_mask": torch.ones_like(place)}
        asked["position_ids"] = place[:, first:]
        return policy.model(**asked, **options).logits[0].float()

    def cached(first: int, end: int) -> Tensor:
        return logits(first, end, past_key_values=cache, use_cache=True)

    want = logits(0, 2 * _SEVEN, use_cache=False)
    parts = [(0, _SEVEN), *((place, place + 1) for place in range(_SEVEN, 2 * _SEVEN))]
    got, other = torch.cat([cached(first, end) for first, end in parts]), want.roll(1, 0)
    if not _alike(got, want, other, policy.model.dtype):
        raise ValueError(
            f"{type(policy.model).__name__} cannot be sampled: token by token its logits are not "
            f"those of the whole sequence (by up to {float((got - want).abs().max()):.1e})"
        )


@torch.no_grad()
def choose_layout(policy: Any) -> Layout:
    """The layout: rows of several sequences, if their hidden states are those of each alone.

    They are within rounding, which is that of an unknown number of 16-bit operations: far closer
    than without any boundary between the sequences. Chunks of attention are counted from the start
    of the row, so sequences that may be longer than one have a row each.
    """
    settings = policy.model.config.get_text_config()
    chunk = getattr(settings, "attention_chunk_size", None)
    if chunk is not None and (policy.longest is None or policy.longest > chunk):
        return "padded"
    tokens, apart = some_tokens(policy, 2 * _SEVEN), torch.tensor([7, 4, 3])
    layout: Layout = "row" if is_flash(settings._attn_implementation) else "rows"
    alone = _states(policy, arrange(tokens, apart, "padded"))
    packed = _states(policy, arrange(tokens, apart, layout))
    joined = _states(policy, arrange(tokens, torch.tensor([len(tokens)]), layout))
    return layout if _close(packed, alone, joined) else "padded"


def _dtype(policy: Any) -> torch.dtype:
    return policy.compute_dtype or policy.model.dtype


def _states(policy: Any, packed: Packed) -> Tensor:
    return policy(packed, 1.0, lambda head: head.hidden.float())


def _close(got: Tensor, want: Tensor, other: Tensor) -> bool:
    """Whether it is within rounding of `want`, far closer than `other` is."""
    rounding = 64 * torch.finfo(torch.float32).eps * want.abs().max()
    apart = (other - want).abs().max() / 16
    return bool((got - want).abs().max() <= torch.maximum(apart, rounding))


def _beside(policy: Any, end: int) -> Tensor:
    """States of `check_states`' tokens beside others at the positions before `end`."""
    tokens = some_tokens(policy, 2 * _SEVEN)
    packed = arrange(tokens, torch.tensor([_SEVEN, _SEVEN]), "padded")
    positions = packed.positions_RW.clone()
    positions[1] += max(end - _SEVEN, 0)
    return _states(policy, replace(packed, positions_RW=positions))[:_SEVEN]


def _behind(policy: Any) -> Tensor:
    """States of the tokens of `check_states` behind two sequences, one of them longer if it may be.

    These repeat a token, and have taken what is shared out, such as the room of an expert.
    """
    tokens = some_tokens(policy, _SEVEN)
    long = max(min(policy.longest or 2 * _SEVEN, 2 * _SEVEN), _SEVEN)
    counts = torch.tensor([long, _SEVEN, _SEVEN])
    others = tokens[:1].repeat(long + _SEVEN)
    return _states(policy, arrange(torch.cat([others, tokens]), counts, "padded"))[-_SEVEN:]


def _alike(got: Tensor, want: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether the mean is within rounding, which in 16 bits is far less than `other`'s distance.

    The mean is compared, since 16-bit rounding may send a token to another expert.
    """
    apart, bound = (got - want).abs().mean(), 1e-4 * want.abs().mean()
    if dtype != torch.float32:
        bound = torch.maximum(bound, (other - want).abs().mean() / 4)
    return bool(apart <= bound)


def _noise(config: Any) -> str:
    """The settings of `config` whose names suggest it."""
    named = {
        name: value
        for part in (config, config.get_text_config())
        for name, value in vars(part).items()
        if any(word in name for word in _NOISY) and isinstance(value, float) and value
    }
    listed = ", ".join(f"{name}={value}" for name, value in sorted(named.items()))
    return f"its settings that may: {listed or 'none is named like noise'}"
