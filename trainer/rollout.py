"""Sampling responses with transformers: one prefill a prompt, then a token a step.

B sequences, P prompt width, L response width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trainer.policy import Policy, positions
from trainer.types import Problem, Rollouts, Task

# Finished rows leave the batch once they are this share of it; leaving copies the cache.
DROP_SHARE = 0.2


@torch.no_grad()
def sample(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> Rollouts:
    """`group_size` responses to each problem, verified; temperature 0 is greedy.

    Responses depend on `seed` and the weights only: there is no other random state.
    """
    policy.model.eval()
    generator = torch.Generator(policy.device).manual_seed(seed)
    prompts = max(batch_size // group_size, 1)
    parts = [
        _sample_batch(
            policy,
            problems[start : start + prompts],
            start,
            group_size,
            max_new_tokens,
            temperature,
            generator,
        )
        for start in range(0, len(problems), prompts)
    ]
    rollouts = Rollouts.concatenate(parts, policy.tokenizer.pad_token_id)
    rewards = [
        task.reward(problem, response)
        for problem, response in zip(rollouts.problems, rollouts.responses, strict=True)
    ]
    rollouts.reward_B = torch.tensor(rewards, dtype=torch.float32, device=policy.device)
    return rollouts


def _sample_batch(
    policy: Policy,
    problems: Sequence[Problem],
    first_group: int,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Rollouts:
    encoded = policy.tokenizer(
        [problem.prompt for problem in problems],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    ).to(policy.device)
    mask = encoded["attention_mask"].bool()
    _check_length(policy, mask.shape[1], max_new_tokens)
    response_BL = _decode(
        policy, encoded["input_ids"], mask, group_size, max_new_tokens, temperature, generator
    )
    ended = torch.isin(response_BL, policy.eos_ids)
    mask_BL = ended.long().cumsum(1) - ended.long() == 0
    width = int(mask_BL.sum(1).max())
    response_BL, mask_BL, ended = response_BL[:, :width], mask_BL[:, :width], ended[:, :width]
    texts = [
        policy.tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(response_BL, mask_BL & ~ended, strict=True)
    ]
    groups = torch.arange(first_group, first_group + len(problems), device=policy.device)
    return Rollouts(
        problems=[problem for problem in problems for _ in range(group_size)],
        responses=texts,
        group_B=groups.repeat_interleave(group_size),
        prompt_BP=encoded["input_ids"].repeat_interleave(group_size, 0),
        prompt_mask_BP=mask.repeat_interleave(group_size, 0),
        response_BL=response_BL.masked_fill(~mask_BL, policy.tokenizer.pad_token_id),
        mask_BL=mask_BL,
        truncated_B=~ended.any(1),
        reward_B=torch.zeros(len(texts), device=policy.device),
    )


def _check_length(policy: Policy, prompt: int, new: int) -> None:
    settings = policy.model.config.get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and up to {new} new ones do not fit into the model's "
            f"{limit} positions; lower rollout.max_new_tokens or leave such prompts out"
        )


def _decode(
    policy: Policy,
    prompt: Tensor,
    mask: Tensor,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Token ids [B, max_new_tokens]; what follows an end-of-sequence is padding."""
    model, cache, eos_ids = policy.model, _cache(policy), policy.eos_ids
    logits = model(
        input_ids=prompt,
        attention_mask=mask.long(),
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    logits, mask = (x.repeat_interleave(group_size, 0) for x in (logits, mask))
    rows = torch.arange(len(mask), device=mask.device)  # the sequence of each row of the batch
    running = torch.ones_like(rows, dtype=torch.bool)
    response = torch.full(
        (len(rows), max_new_tokens), policy.tokenizer.pad_token_id, device=mask.device
    )
    for step in range(max_new_tokens):
        token = _draw(logits, temperature, generator)
        response[rows[running], step] = token[running]
        running = running & ~torch.isin(token, eos_ids)
        if step + 1 == max_new_tokens or not running.any():
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
    return response


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


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(1)
    p = (logits.float() / temperature).softmax(1)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)
