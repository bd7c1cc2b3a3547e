"""What a step shows of its tokens: percentiles of entropy, and whole responses.

B sequences, L response width.
"""

from torch import Tensor

from trainer.log import Sample
from trainer.run import Run
from trainer.update import Batch


def entropy_metrics(entropy: Tensor) -> dict[str, float]:
    """Percentiles over the step's response tokens, nats, and the share below 0.01."""
    ordered = entropy.flatten().sort().values
    at = {f"entropy/p{p}": int(p / 100 * (len(ordered) - 1)) for p in (50, 80, 95)}
    return {name: float(ordered[index]) for name, index in at.items()} | {
        "entropy/mean": float(ordered.mean()),
        "entropy/below_0.01": float((ordered < 0.01).float().mean()),
    }


def write_samples(run: Run, batch: Batch, entropy_BL: Tensor) -> None:
    """Rows of samples.jsonl: the first response of as many groups as asked for."""
    rollouts, tokenizer = batch.rollouts, run.policy.tokenizer
    first = [int((rollouts.group_B == group).nonzero()[0]) for group in rollouts.group_B.unique()]
    rows = []
    for b in first[: run.settings.samples]:
        mask = rollouts.mask_BL[b]
        rows.append(
            Sample(
                prompt=rollouts.problems[b].prompt,
                response=rollouts.responses[b],
                reward=float(rollouts.reward_B[b]),
                tokens=[tokenizer.decode([token]) for token in rollouts.response_BL[b][mask]],
                entropy=entropy_BL[b][mask].tolist(),
                kept=batch.selected_BL[b][mask].tolist(),
            )
        )
    run.log.samples(run.progress.step, rows)
