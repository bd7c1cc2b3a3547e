"""Sampling with transformers: one prefill per prompt, then one token per step.

B sequences of a batch, P prompt width, L response width, V vocabulary. N kept ids of all rows.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import entropy_kernels as ek
from trainer.config import NO_TRUNCATION, Truncation
from trainer.engines.engine import Sampled
from trainer.finite import NotFinite, first_nonfinite
from trainer.model.probes import check_cache
from trainer.policy import Policy, positions

# Finished rows leave the batch once they are this share of it, as each time the cache is copied.
DROP_SHARE = 0.2
# Tokens whose probabilities are summed first.
BLOCK = 512


class TransformersEngine:
    """Samples `batch_size` sequences at once from the model that is trained, or from a copy.

    `copy_in` is the dtype of the copy. It is made now, on `device` (by default the policy's), and
    gets its weights by `update_weights`.
    """

    def __init__(
        self,
        policy: Policy,
        batch_size: int,
        copy_in: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        self._policy, self._batch_size = policy, batch_size
        self._weights: dict[str, Tensor] | None = None
        self._checked = False
        if copy_in is not None:
            self._policy = Policy(
                copy.deepcopy(policy.model), policy.tokenizer, policy.longest or 0
            )
            self._policy.chat = policy.chat
            # `to` would round the frequencies of positions.
            for weight in self._policy.parameters():
                weight.requires_grad_(False).data = weight.data.to(copy_in)
            self._policy.materialize(device or policy.device)
            self._weights = dict(self._policy.model.named_parameters())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
    ) -> list[Sampled]:
        """As `Engine.sample`."""
        self._policy.train(False)
        if not self._checked and prompts:
            check_cache(self._policy, _cache(self._policy))
            self._checked = True
        size = self._batch_size
        return [
            sampled
            for start in range(0, len(prompts), size)
            for sampled in self._batch(
                prompts[start : start + size],
                _uniform(seeds[start : start + size], max_new_tokens).to(self._policy.device),
                temperature,
                truncation,
            )
        ]

    def sleep(self) -> None:
        """Nothing to give back."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the copy; a model that is shared has them."""
        if self._weights is not None:
            for name, weight in weights:
                self._weights[name].copy_(weight)
            if poisoned := first_nonfinite(self._weights.items()):
                raise NotFinite(f"{poisoned} is not finite in the engine's copy of the weights")

    def close(self) -> None:
        """Nothing to end."""

    def process(self, logits_BV: Tensor) -> Tensor:
        """The logits to sample from; a subclass may change them."""
        return logits_BV

    @torch.no_grad()
    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_BL: Tensor,
        temperature: float,
        truncation: Truncation,
    ) -> list[Sampled]:
        """One response to each prompt; `uniform_BL` are their random numbers."""
        policy = self._policy
        model, cache = policy.model, _cache(policy)
        eos_ids = policy.eos_ids.to(policy.device)
        different = list(dict.fromkeys(map(tuple, prompts)))
        prompt_BP, mask = _left_padded(different, policy)
        logits = model(
            input_ids=prompt_BP,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        place = {prompt: row for row, prompt in enumerate(different)}
        keep = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=policy.device)
        cache.batch_select_indices(keep)
        logits, mask = logits[keep], mask[keep]
        rows = torch.arange(len(mask), device=mask.device)  # the sequence of each row of the batch
        running = torch.ones_like(rows, dtype=torch.bool)
        steps: list[tuple[Tensor, _Drawn]] = []
        for step in range(uniform_BL.shape[1]):
            drawn = _draw(self.process(logits), temperature, truncation, uniform_BL[rows, step])
            steps.append((rows[running], drawn.at(running.nonzero().squeeze(1))))
            token = drawn.token
            running = running & ~torch.isin(token, eos_ids)
            if step + 1 == uniform_BL.shape[1] or not running.any():
                break
            if running.float().mean() <= 1 - DROP_SHARE:
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, mask, running = (x[keep] for x in (rows, token, mask, running))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = model(
                input_ids=token.unsqueeze(1),
                attention_mask=mask.long(),
                position_ids=positions(mask)[:, -1:],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return _responses(steps)


class _Drawn(NamedTuple):
    """A token per row, its log-probability, the row's entropy, and the ids that it kept."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    kept: ek.Support | None = None

    def at(self, index: Tensor) -> "_Drawn":
        kept = self.kept and self.kept.at(index)
        return _Drawn(self.token[index], self.logprob[index], self.entropy[index], kept)


def _responses(steps: Sequence[tuple[Tensor, _Drawn]]) -> list[Sampled]:
    """What each sequence drew; each step has the numbers of its sequences, and what they drew."""
    sequence = torch.cat([rows for rows, _ in steps])
    drawn = _Drawn(
        torch.cat([one.token for _, one in steps]),
        torch.cat([one.logprob for _, one in steps]),
        torch.cat([one.entropy for _, one in steps]),
        ek.Support.concatenate(sets) if (sets := [x.kept for _, x in steps if x.kept]) else None,
    ).at(sequence.argsort(stable=True))
    lengths = sequence.bincount().tolist()
    kept = [None] * len(lengths) if drawn.kept is None else drawn.kept.to("cpu").split(lengths)
    of_tokens = (x.cpu().split(lengths) for x in (drawn.token, drawn.logprob, drawn.entropy))
    return [Sampled(*one) for one in zip(*of_tokens, kept, strict=True)]


def _uniform(seeds: Sequence[int], count: int) -> Tensor:
    """`count` numbers from [0, 1) for each seed, drawn on the CPU: the same on every device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])


def _left_padded(prompts: Sequence[Sequence[int]], policy: Policy) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, P], padded on the left."""
    width, pad_id = max(map(len, prompts)), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([[len(p)] for p in prompts])
    mask = torch.arange(width) >= width - lengths
    return ids.to(policy.device), mask.to(policy.device)


def _cache(policy: Policy) -> DynamicCache:
    """An empty cache whose rows can be repeated and dropped, in every layer."""
    cache = DynamicCache(config=policy.model.config)
    other = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if other:
        raise ValueError(
            f"{type(policy.model).__name__} cannot be sampled: rows of its cache's "
            f"{', '.join(sorted(kind.__name__ for kind in other))} cannot be dropped; wanted "
            "attention in all layers"
        )
    return cache


def _draw(
    logits_BV: Tensor, temperature: float, truncation: Truncation, uniform_B: Tensor
) -> _Drawn:
    """A token per row by inversion of the distribution function, which truncation may cut."""
    if temperature and not truncation.off:
        return _draw_truncated(logits_BV, temperature, truncation, uniform_B)
    scaled_BV = logits_BV.float()
    if temperature not in (0, 1):
        scaled_BV = scaled_BV / temperature
    prob_BV = scaled_BV.softmax(1)
    token_B = logits_BV.argmax(1) if temperature == 0 else invert(prob_BV, uniform_B)
    return _Drawn(
        token_B,
        prob_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).log(),
        ek.entropy_from_logits(logits_BV, temperature or 1.0),
    )


def invert(prob_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token of each row at which its distribution function exceeds `uniform_B`, in [0, 1).

    Two sums of at most BLOCK and V / BLOCK numbers find it, which read a row once and round less
    than one sum over it. A token of no probability is never drawn.
    """
    whole = prob_BV.shape[1] // BLOCK
    mass_BK = torch.cat(
        [
            prob_BV[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(2),
            prob_BV[:, whole * BLOCK :].sum(1, keepdim=True),
        ],
        1,
    )
    block_B, left_B = _place(mass_BK, uniform_B * mass_BK.sum(1))
    token_BW = block_B.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=block_B.device)
    outside_BW = token_BW >= prob_BV.shape[1]
    within_BW = prob_BV.gather(1, token_BW.masked_fill(outside_BW, 0)).masked_fill(outside_BW, 0)
    token_B = token_BW.gather(1, _place(within_BW, left_B)[0].unsqueeze(1)).squeeze(1)
    return token_B.clamp_max(prob_BV.shape[1] - 1)  # of a row of NaN


def _place(mass_BK: Tensor, at_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose sum exceeds `at_B`, and how far `at_B` is beyond the sum before it.

    Where rounding has put `at_B` at the sum of all or beyond, the last place with any mass.
    """
    sum_BK = mass_BK.cumsum(1)
    at_B = at_B.minimum(sum_BK[:, -1].nextafter(torch.zeros_like(at_B)))
    # Strictly above: a place without mass is never found.
    place_B1 = torch.searchsorted(sum_BK, at_B.unsqueeze(1), right=True)
    place_B1 = place_B1.clamp_max(sum_BK.shape[1] - 1)  # NaN goes beyond
    before_B1 = sum_BK.gather(1, place_B1) - mass_BK.gather(1, place_B1)
    return place_B1.squeeze(1), (at_B - before_B1.squeeze(1)).clamp_min(0)


def _draw_truncated(
    logits_BV: Tensor, temperature: float, truncation: Truncation, uniform_B: Tensor
) -> _Drawn:
    found = ek.truncate(
        logits_BV,
        temperature,
        top_k=truncation.top_k,
        top_p=truncation.top_p,
        min_p=truncation.min_p,
    )
    begin_B, end_B = found.support.offsets[:-1], found.support.offsets[1:]
    # The mass of all sets before each id and of its own set up to it.
    mass_N = found.logprob.double().exp().cumsum(0)
    before_B = torch.cat([mass_N.new_zeros(1), mass_N])[begin_B]
    at_B = before_B + uniform_B * (mass_N[end_B - 1] - before_B)
    place_B = torch.searchsorted(mass_N, at_B, right=True).clamp(begin_B, end_B - 1)
    return _Drawn(
        found.support.token_ids[place_B], found.logprob[place_B], found.entropy, found.support
    )
