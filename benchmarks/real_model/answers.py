"""A pretrained model's own answers, which the steps of bench_real_model train on.

B sequences, T response tokens.
"""

from dataclasses import replace
from pathlib import Path

from benchmarks.real_model.prompts import rows
from benchmarks.sampler_step import Bench
from trainer.batch import Rollouts
from trainer.config import Model, Reward, Truncation
from trainer.engines.transformers import TransformersEngine
from trainer.policy import Policy, check_policy, read_policy
from trainer.rewards.verifier import Verifier
from trainer.sampling import sample
from trainer.tasks.problem import Problem

TOP_P, GROUP = 0.95, 4


def real_bench(folder: Path, sequences: int, response: int) -> Bench:
    """The folder's model, its answers to word problems in one micro-batch, and AdamW.

    Each prompt has GROUP answers of `response` tokens at most. They are drawn with a top-p of
    TOP_P, whose sets are those of the truncated sampler; without sets, each token keeps all ids.
    """
    policy = read_policy(Model(path=str(folder), gradient_checkpointing=True), seed=0)
    check_policy(policy)
    rollouts = _sampled(policy, sequences, response)
    kept = rollouts.kept
    assert kept is not None
    whole = replace(rollouts, kept=None)
    return Bench(policy, whole, lambda *_: kept, int(rollouts.length_B.sum()))


class _Unjudged:
    """A task whose answers nobody reads."""

    name, num_train, num_test = "prompts", None, 0

    def problem(self, split: str, index: int) -> Problem:
        """None: the prompts are given."""
        raise NotImplementedError

    def reward(self, problem: Problem, response: str) -> float:
        """0."""
        return 0.0


def _sampled(policy: Policy, sequences: int, response: int) -> Rollouts:
    asked = rows("word-problems", sequences // GROUP)
    return sample(
        TransformersEngine(policy, sequences),
        policy,
        Verifier(_Unjudged(), Reward()),
        [Problem(row["prompt"], row["answer"]) for row in asked],
        group_size=GROUP,
        max_new_tokens=response,
        temperature=1.0,
        truncation=Truncation(top_p=TOP_P),
        seed=0,
    )
