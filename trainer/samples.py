"""What a step shows of its tokens: percentiles of entropy, and whole responses of every kind.

T response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.batch import Batch, Rollouts
from trainer.config import Reward
from trainer.log import Sample
from trainer.model.tokens import pieces
from trainer.report.skips import KINDS
from trainer.rewards.terms import is_answered
from trainer.run import Run
from trainer.tasks.problem import Task


def entropy_metrics(entropy_T: Tensor) -> dict[str, float]:
    """Percentiles over the step's response tokens, nats, and the share below 0.01."""
    ordered = entropy_T.sort().values
    at = {f"entropy/p{p}": int(p / 100 * (len(ordered) - 1)) for p in (50, 80, 95)}
    return {name: float(ordered[index]) for name, index in at.items()} | {
        "entropy/mean": float(ordered.mean()),
        "entropy/below_0.01": float((ordered < 0.01).float().mean()),
    }


def kinds_of(rollouts: Rollouts, task: Task, reward: Reward) -> list[str]:
    """The kind of each response, one of KINDS."""
    return [
        "unverified"
        if failed
        else "right"
        if reward.is_right(verdict)
        else "truncated"
        if truncated
        else "wrong"
        if is_answered(response, task, reward)
        else "unparsed"
        for response, verdict, failed, truncated in zip(
            rollouts.responses,
            rollouts.reward_B.tolist(),
            (rollouts.timed_out_B | rollouts.crashed_B).tolist(),
            rollouts.truncated_B.tolist(),
            strict=True,
        )
    ]


def kind_metrics(kinds: Sequence[str]) -> dict[str, float]:
    """The number of responses, and the share of each kind."""
    shares = {f"kind/{kind}": kinds.count(kind) / max(len(kinds), 1) for kind in KINDS}
    return {"response/count": float(len(kinds))} | shares


def write_samples(
    run: Run, everything: Rollouts, batch: Batch | None = None, entropy_T: Tensor | None = None
) -> None:
    """Write some of the step's responses to samples.jsonl if they are due, each kind in turn.

    `batch` is trained on, and `entropy_T` has its entropies. Other responses have none.
    """
    settings, step = run.settings, run.progress.step
    due = step % settings.samples_every == 0 or step in (1, settings.steps)
    if not run.ranks.first or not due:
        return
    kinds = kinds_of(everything, run.task, settings.reward)
    trained = set(batch.rollouts.group_B.tolist()) if batch is not None else set()
    groups = everything.group_B.tolist()
    rows = sorted(range(len(groups)), key=lambda b: groups[b] not in trained)  # it is stable
    run.log.samples(
        step,
        [
            _sample(run, _one(everything, b), kinds[b], batch, entropy_T)
            for b in choose(rows, kinds, groups, settings.samples)
        ],
    )


def choose(
    rows: Sequence[int], kinds: Sequence[str], groups: Sequence[int], count: int
) -> list[int]:
    """At most `count` of `rows`: each kind in turn, if it can from a group not yet chosen."""
    left = {kind: [row for row in rows if kinds[row] == kind] for kind in KINDS}
    chosen: list[int] = []
    seen: set[int] = set()
    while len(chosen) < min(count, len(rows)):
        for kind in filter(left.get, KINDS):
            row = next((row for row in left[kind] if groups[row] not in seen), left[kind][0])
            left[kind].remove(row)
            seen.add(groups[row])
            chosen.append(row)
    return chosen[:count]


def _sample(
    run: Run, one: Rollouts, kind: str, batch: Batch | None, entropy_T: Tensor | None
) -> Sample:
    """The row of samples.jsonl for `one` sequence."""
    entropy, selected = [], []
    at = None if batch is None else _places(batch.rollouts, one)
    if batch is not None and entropy_T is not None and at is not None:
        entropy, selected = entropy_T[at].tolist(), batch.selected_T[at].tolist()
    return Sample(
        prompt=one.problems[0].prompt,
        response=one.responses[0],
        reward=float(one.reward_B),
        tokens=pieces(run.policy.tokenizer, one.response_T.tolist()),
        entropy=entropy,
        selected=selected,
        kind=kind,
    )


def _one(rollouts: Rollouts, b: int) -> Rollouts:
    return rollouts.rows(torch.tensor([b], device=rollouts.group_B.device))


def _places(rollouts: Rollouts, one: Rollouts) -> Tensor | None:
    """The places in `rollouts` of the tokens of `one` or of an equal response, if there is one."""
    for row in (rollouts.group_B == one.group_B).nonzero():
        if torch.equal(rollouts.rows(row).response_T, one.response_T):
            return rollouts.places(row)
    return None
