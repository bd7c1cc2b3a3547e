"""Accuracy on held-out problems."""

from trainer.estimators import standard_error
from trainer.rollout import sample
from trainer.run import Run
from trainer.types import Rollouts

# Fixed, so that evaluations of one run and of different runs see the same random numbers.
SEED = 20_250_602


def evaluate(run: Run) -> dict[str, float]:
    """One sample a problem at temperature 1, and one greedy, on the same held-out problems.

    The standard error is that of the accuracy, over problems.
    """
    count = min(run.settings.eval.problems, run.task.num_test)
    problems = [run.task.problem("test", index) for index in range(count)]

    def draw(temperature: float) -> Rollouts:
        return sample(
            run.engine,
            run.policy,
            run.verifier,
            problems,
            group_size=1,
            max_new_tokens=run.settings.rollout.max_new_tokens,
            temperature=temperature,
            seed=SEED,
            ranks=run.ranks,
        )

    sampled, greedy = draw(1.0), draw(0.0)
    return {
        "eval/accuracy": float(sampled.reward_B.mean()),
        "eval/standard_error": standard_error(sampled.reward_B.tolist()),
        "eval/greedy": float(greedy.reward_B.mean()),
        "eval/length": float(sampled.mask_BL.sum(1).float().mean()),
    }
