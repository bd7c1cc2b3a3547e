"""Rollouts of problems: prompts to an engine, its responses to the verifier, and useful groups.

B sequences, G groups, N tokens of prompts and responses, T response tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batch import Rollouts, concatenate_kept
from trainer.config import NO_TRUNCATION, Reward, Truncation
from trainer.engines.engine import Engine, Sampled
from trainer.launch.limits import check_length
from trainer.model.tokens import prompt_ids, response_text
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.rewards.verifier import Verifier
from trainer.run import Run
from trainer.samples import kind_metrics, kinds_of
from trainer.tasks.problem import Problem


class Groups(NamedTuple):
    """How groups came out: useful where verdicts differ, else all right or all wrong."""

    useful_B: Tensor
    useful: int
    all_right: int
    all_wrong: int


def sample_useful(run: Run) -> tuple[Rollouts, dict[str, float], Rollouts]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach something.

    Samples rounds of fresh prompts until `rollout.prompts` groups are useful, `max_rounds` at most.
    Returns the useful groups, no more than wanted, metrics of all that was sampled, and all of it.
    """
    settings = run.settings
    rounds: list[Rollouts] = []
    wanted, useful = settings.rollout.prompts, 0
    while useful < wanted and len(rounds) < settings.algorithm.max_rounds:
        rollouts = _round(run, len(rounds))
        rounds.append(rollouts)
        useful += sort_groups(rollouts.reward_B, rollouts.group_B, settings.reward).useful
    everything = Rollouts.concatenate(rounds)
    groups = sort_groups(everything.reward_B, everything.group_B, settings.reward)
    chosen = everything.group_B[groups.useful_B].unique()[:wanted]
    metrics = {
        "reward/mean": float(everything.reward_B.double().mean()),
        "reward/right": float(settings.reward.is_right(everything.reward_B).double().mean()),
        "reward/timeouts": float(everything.timed_out_B.sum()),
        "reward/crashes": float(everything.crashed_B.sum()),
        "response/length": float(everything.response_length_B.float().mean()),
        "response/truncated": float(everything.truncated_B.float().mean()),
        "tokens": float(everything.response_length_B.sum()),
        "groups/sampled": float(groups.useful + groups.all_right + groups.all_wrong),
        "groups/useful": float(groups.useful),
        "groups/all_right": float(groups.all_right),
        "groups/all_wrong": float(groups.all_wrong),
        **kind_metrics(kinds_of(everything, run.task, settings.reward)),
    }
    rows = torch.isin(everything.group_B, chosen).nonzero().squeeze(1)
    return everything.rows(rows), metrics, everything


def sort_groups(reward_B: Tensor, group_B: Tensor, settings: Reward) -> Groups:
    """Which rows lie in a useful group, and the number of groups of each kind.

    `settings.right` tells right from wrong where the verdicts of a group are equal.
    """
    _, index_B = group_B.unique(return_inverse=True)
    count = int(index_B.max()) + 1 if len(index_B) else 0
    low_G = reward_B.new_full((count,), torch.inf).scatter_reduce(0, index_B, reward_B, "amin")
    high_G = reward_B.new_full((count,), -torch.inf).scatter_reduce(0, index_B, reward_B, "amax")
    useful_G = low_G < high_G
    useful, right = int(useful_G.sum()), int((~useful_G & settings.is_right(high_G)).sum())
    return Groups(useful_G[index_B], useful, right, count - useful - right)


def _round(run: Run, number: int) -> Rollouts:
    """Responses to the next prompts of the stream; groups are numbered on from earlier rounds."""
    rollout, first = run.settings.rollout, run.progress.next_problem
    run.progress.next_problem += rollout.prompts
    rollouts = sample(
        run.engine,
        run.policy,
        run.verifier,
        [run.task.problem("train", first + i) for i in range(rollout.prompts)],
        group_size=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        truncation=rollout.truncation,
        seed=run.seed(number),
        ranks=run.ranks,
    )
    return replace(rollouts, group_B=rollouts.group_B + number * rollout.prompts)


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
    truncation: Truncation = NO_TRUNCATION,
    first: int = 0,
    ranks: Ranks | None = None,
) -> Rollouts:
    """`group_size` responses to each problem, verified; temperature 0 is greedy.

    Each rank samples its share of the groups, and every rank gets the rollouts of all. A response
    depends on `seed`, the number of its problem, its number in the group, and the weights. There is
    no other random state, so another number of ranks samples the same but for rounding. Problems
    count from `first`: part of a list of problems has the responses that it has in the whole.
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
        truncation=truncation,
    )
    groups = [group for group, _ in rows]
    parts = ranks.gather(_verified(policy, verifier, problems, prompts, groups, sampled))
    everything = Rollouts.concatenate([part for part in parts if part is not None])
    return everything.rows(everything.group_B.argsort(stable=True)).to(policy.device)


def _seed(seed: int, group: int, member: int) -> int:
    """The seed of one sequence's random numbers, in [0, 2^56)."""
    digest = hashlib.sha256(f"{seed}/{group}/{member}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _verified(
    policy: Policy,
    verifier: Verifier,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    groups: Sequence[int],
    sampled: Sequence[Sampled],
) -> Rollouts | None:
    """This rank's rollouts, on the CPU, if any; `groups` are the numbers of their problems."""
    if not groups:
        return None
    eos_ids = policy.eos_ids
    asked = [torch.tensor(prompts[group], dtype=torch.long) for group in groups]
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
    posed = [problems[group] for group in groups]
    verdicts = verifier.verify(posed, texts)
    pairs = zip(asked, answered, strict=True)
    return Rollouts(
        problems=posed,
        responses=texts,
        group_B=torch.tensor(groups),
        tokens_N=torch.cat([part for pair in pairs for part in pair]),
        prompt_length_B=torch.tensor(list(map(len, asked))),
        response_length_B=torch.tensor(list(map(len, answered))),
        sampler_logprob_T=torch.cat([one.logprobs for one in sampled]),
        sampler_entropy_T=torch.cat([one.entropies for one in sampled]),
        truncated_B=~torch.tensor(ended),
        reward_B=torch.tensor(verdicts.rewards, dtype=torch.float32),
        timed_out_B=torch.tensor(verdicts.timed_out),
        crashed_B=torch.tensor(verdicts.crashed),
        kept=concatenate_kept([one.kept for one in sampled]),
    )
