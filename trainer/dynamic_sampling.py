"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach something.

B sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batch import Rollouts
from trainer.config import Reward
from trainer.run import Run
from trainer.samples import kind_metrics, kinds_of
from trainer.sampling import sample


class Groups(NamedTuple):
    """How groups came out: useful where verdicts differ, else all right or all wrong."""

    useful_B: Tensor
    useful: int
    all_right: int
    all_wrong: int


def sort_groups(reward_B: Tensor, group_B: Tensor, settings: Reward) -> Groups:
    """Which rows lie in a useful group, and the number of groups of each kind.

    Of equal verdicts `settings.right` tells right from wrong.
    """
    _, index_B = group_B.unique(return_inverse=True)
    count = int(index_B.max()) + 1 if len(index_B) else 0
    low_G = reward_B.new_full((count,), torch.inf).scatter_reduce(0, index_B, reward_B, "amin")
    high_G = reward_B.new_full((count,), -torch.inf).scatter_reduce(0, index_B, reward_B, "amax")
    useful_G = low_G < high_G
    useful, right = int(useful_G.sum()), int((~useful_G & settings.is_right(high_G)).sum())
    return Groups(useful_G[index_B], useful, right, count - useful - right)


def sample_useful(run: Run) -> tuple[Rollouts, dict[str, float], Rollouts]:
    """Rounds of fresh prompts until `rollout.prompts` groups are useful, `max_rounds` at most.

    Returns the useful groups, no more than wanted, metrics of all that was sampled, and all of it.
    """
    settings = run.settings
    rounds: list[Rollouts] = []
    wanted, useful = settings.rollout.prompts, 0
    while useful < wanted and len(rounds) < settings.algorithm.max_rounds:
        rollouts = _round(run, len(rounds))
        rounds.append(rollouts)
        useful += sort_groups(rollouts.reward_B, rollouts.group_B, settings.reward).useful
    everything = Rollouts.concatenate(rounds, run.policy.tokenizer.pad_token_id)
    groups = sort_groups(everything.reward_B, everything.group_B, settings.reward)
    chosen = everything.group_B[groups.useful_B].unique()[:wanted]
    metrics = {
        "reward/mean": float(everything.reward_B.double().mean()),
        "reward/right": float(settings.reward.is_right(everything.reward_B).double().mean()),
        "reward/timeouts": float(everything.timed_out_B.sum()),
        "reward/crashes": float(everything.crashed_B.sum()),
        "response/length": float(everything.mask_BL.sum(1).float().mean()),
        "response/truncated": float(everything.truncated_B.float().mean()),
        "tokens": float(everything.mask_BL.sum()),
        "groups/sampled": float(groups.useful + groups.all_right + groups.all_wrong),
        "groups/useful": float(groups.useful),
        "groups/all_right": float(groups.all_right),
        "groups/all_wrong": float(groups.all_wrong),
        **kind_metrics(kinds_of(everything, run.task, settings.reward)),
    }
    rows = torch.isin(everything.group_B, chosen).nonzero().squeeze(1)
    return everything.rows(rows), metrics, everything


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
        seed=run.seed(number),
        ranks=run.ranks,
    )
    rollouts.group_B += number * rollout.prompts
    return rollouts
