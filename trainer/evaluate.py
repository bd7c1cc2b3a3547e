"""Accuracy on held-out problems."""

from trainer.config import Config
from trainer.policy import Policy
from trainer.rollout import sample
from trainer.types import Task

# Fixed, so that evaluations of one run and of different runs see the same random numbers.
SEED = 20_250_602


def evaluate(policy: Policy, task: Task, settings: Config) -> dict[str, float]:
    """One sample a problem at temperature 1, and one greedy, on the same held-out problems."""
    count = min(settings.eval_problems, task.num_test)
    problems = [task.problem("test", index) for index in range(count)]
    options = {
        "group_size": 1,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "batch_size": settings.rollout.batch_size,
        "seed": SEED,
    }
    sampled = sample(policy, task, problems, temperature=1.0, **options)
    greedy = sample(policy, task, problems, temperature=0.0, **options)
    return {
        "eval/accuracy": float(sampled.reward_B.mean()),
        "eval/greedy": float(greedy.reward_B.mean()),
        "eval/length": float(sampled.mask_BL.sum(1).float().mean()),
    }
