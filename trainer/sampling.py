"""Rollouts of problems: prompts to an engine, its responses to the verifier.

B sequences, P prompt width, L response width.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.batch import Rollouts
from trainer.engines.engine import Engine, Sampled
from trainer.launch.limits import check_length
from trainer.model.tokens import prompt_ids, response_text
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verifier
from trainer.tasks.problem import Problem


def sample(
    engine: Engine,
    policy: Policy,
    verifier: Verifier,
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    first: int = 0,
    ranks: Ranks | None = None,
) -> Rollouts:
    """`group_size` responses to each problem, verified; temperature 0 is greedy.

    Each rank samples its share of the groups, and all of them get the rollouts of all. A response
    depends on `seed`, the place of its problem, its own place in the group, and the weights: there
    is no other random state, and other ranks sample the same but for rounding. Places count from
    `first`, so that part of a list of problems has the responses that it has in the whole.
    """
    ranks = ranks or Ranks(policy.device)
    prompts = prompt_ids(policy.tokenizer, problems)
    longest = max(map(len, prompts))
    check_length("the model's {} positions", policy.longest, longest, max_new_tokens)
    mine = range(ranks.rank, len(problems), ranks.size)
    rows = [(group, member) for group in mine for member in range(group_size)]
    sampled = engine.sample(
        [prompts[group] for group, _ in rows],
        [_seed(seed, first + group, member) for group, member in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    parts = ranks.gather(_verified(policy, verifier, problems, prompts, rows, sampled))
    everything = Rollouts.concatenate(
        [part for part in parts if part is not None], policy.tokenizer.pad_token_id
    )
    return everything.rows(everything.group_B.argsort(stable=True)).to(policy.device)


def _seed(seed: int, group: int, member: int) -> int:
    """Of one sequence's random numbers, in [0, 2^56)."""
    digest = hashlib.sha256(f"{seed}/{group}/{member}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _verified(
    policy: Policy,
    verifier: Verifier,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    rows: Sequence[tuple[int, int]],
    sampled: Sequence[Sampled],
) -> Rollouts | None:
    """Rollouts, on the CPU, of this rank's `rows`: (number of the problem, place in its group)."""
    if not rows:
        return None
    pad_id, eos_ids = policy.tokenizer.pad_token_id, policy.eos_ids
    asked = [torch.tensor(prompts[group], dtype=torch.long) for group, _ in rows]
    answered = [one.tokens for one in sampled]
    ended = [bool(torch.isin(tokens[-1:], eos_ids).all()) for tokens in answered]
    texts = [
        response_text(
            policy.tokenizer,
            (tokens[:-1] if end else tokens).tolist(),
            eos_ids.tolist(),
            verifier.keep_special_tokens,
        )
        for tokens, end in zip(answered, ended, strict=True)
    ]
    posed = [problems[group] for group, _ in rows]
    verdicts = verifier.verify(posed, texts)
    return Rollouts(
        problems=posed,
        responses=texts,
        group_B=torch.tensor([group for group, _ in rows]),
        prompt_BP=_pad(asked, pad_id, "left"),
        prompt_mask_BP=_pad([torch.ones_like(x).bool() for x in asked], 0, "left"),
        response_BL=_pad(answered, pad_id),
        mask_BL=_pad([torch.ones_like(x).bool() for x in answered], 0),
        sampler_logprob_BL=_pad([one.logprobs for one in sampled], 0),
        truncated_B=~torch.tensor(ended),
        reward_B=torch.tensor(verdicts.rewards, dtype=torch.float32),
        timed_out_B=torch.tensor(verdicts.timed_out),
        crashed_B=torch.tensor(verdicts.crashed),
    )


def _pad(rows: list[Tensor], fill: int, side: str = "right") -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
