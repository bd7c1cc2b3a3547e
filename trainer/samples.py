"""What a step shows of its tokens: percentiles of entropy, and whole responses of every kind.

B sequences, L response width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.batch import Rollouts
from trainer.config import Reward
from trainer.log import Sample
from trainer.model.tokens import pieces
from trainer.report.skips import KINDS
from trainer.rewards.terms import is_answered
from trainer.run import Run
from trainer.tasks.problem import Task
from trainer.update import Batch


def entropy_metrics(entropy: Tensor) -> dict[str, float]:
    """Percentiles over the step's response tokens, nats, and the share below 0.01."""
    ordered = entropy.flatten().sort().values
    at = {f"entropy/p{p}": int(p / 100 * (len(ordered) - 1)) for p in (50, 80, 95)}
    return {name: float(ordered[index]) for name, index in at.items()} | {
        "entropy/mean": float(ordered.mean()),
        "entropy/below_0.01": float((ordered < 0.01).float().mean()),
    }


def kinds_of(rollouts: Rollouts, task: Task, reward: Reward) -> list[str]:
    """Of each response, one of KINDS."""
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
    run: Run, everything: Rollouts, batch: Batch | None = None, entropy_BL: Tensor | None = None
) -> None:
    """Rows of samples.jsonl, where some are due: of all that the step sampled, each kind in turn.

    `entropy_BL` belongs to `batch`, what is trained on; other responses have no entropies.
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
            _sample(run, everything, b, kinds[b], batch, entropy_BL)
            for b in choose(rows, kinds, groups, settings.samples)
        ],
    )


def choose(
    rows: Sequence[int], kinds: Sequence[str], groups: Sequence[int], count: int
) -> list[int]:
    """`count` of `rows` at most: each kind in turn, the first row of a group not yet seen."""
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
    run: Run,
    everything: Rollouts,
    b: int,
    kind: str,
    batch: Batch | None,
    entropy_BL: Tensor | None,
) -> Sample:
    tokens = everything.response_BL[b][everything.mask_BL[b]]
    entropy, kept = [], []
    at = None if batch is None else _place(batch.rollouts, int(everything.group_B[b]), tokens)
    if batch is not None and entropy_BL is not None and at is not None:
        mask = batch.rollouts.mask_BL[at]
        entropy, kept = entropy_BL[at][mask].tolist(), batch.selected_BL[at][mask].tolist()
    return Sample(
        prompt=everything.problems[b].prompt,
        response=everything.responses[b],
        reward=float(everything.reward_B[b]),
        tokens=pieces(run.policy.tokenizer, tokens.tolist()),
        entropy=entropy,
        kept=kept,
        kind=kind,
    )


def _place(rollouts: Rollouts, group: int, tokens: Tensor) -> int | None:
    """A row of `group` with these tokens; equal rows have equal entropies."""
    for row in (rollouts.group_B == group).nonzero().flatten().tolist():
        if torch.equal(rollouts.response_BL[row][rollouts.mask_BL[row]], tokens):
            return row
    return None
