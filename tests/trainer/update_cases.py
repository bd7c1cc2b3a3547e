"""Batches of a small policy, and the gradients of one optimizer step on them."""

import copy
import dataclasses
import math
from pathlib import Path

import torch

from tests.trainer.small import EVEN, sampled, settings
from trainer.advantages import group_advantages
from trainer.batch import Batch
from trainer.config import Optimizer, Rollout
from trainer.fsdp import whole
from trainer.ranks import Ranks
from trainer.update import at_least, score, update

ALONE = Ranks(torch.device("cpu"))
TEMPERATURE = 0.8
CONFIG = settings(Path(), rollout=Rollout(temperature=TEMPERATURE))


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of its last step; None: it made none."""

    def __init__(self, policy):
        super().__init__(policy.model.parameters(), lr=1.0)
        self.seen = None

    def step(self, closure=None):
        self.seen = {
            id(p): whole(torch.zeros_like(p) if p.grad is None else p.grad.clone())
            for p in self.param_groups[0]["params"]
        }
        return super().step(closure)


def configure(algorithm=CONFIG.algorithm, tokens=10**6, grad_clip=1e9):
    optimizer = Optimizer(tokens_per_micro_batch=tokens, grad_clip=grad_clip)
    return dataclasses.replace(CONFIG, algorithm=algorithm, optimizer=optimizer)


def roll(policy):
    """Twelve responses of different lengths to three prompts of different lengths."""
    policy.model.generation_config.eos_token_id = [1, 4]
    return sampled(policy, EVEN[:3], max_new_tokens=8, temperature=TEMPERATURE)


def on_policy(policy, config=CONFIG):
    """The batch of a step's first mini-batch."""
    rollouts = roll(policy)
    old_logprob_T, entropy_T, threshold, _ = score(policy, rollouts, config, ALONE)
    advantage_B = group_advantages(torch.linspace(-1, 1, 12).square(), rollouts.group_B)
    selected_T = at_least(entropy_T, threshold)
    return Batch(rollouts, advantage_B, old_logprob_T, selected_T, threshold), entropy_T


def off_policy(policy):
    """The same with the ratios of a policy that has moved: some tokens are clipped on each side.

    The threshold lies between two entropies, so that rounding selects the same tokens.
    """
    batch, entropy_T = on_policy(policy)
    noise_T = 0.3 * torch.randn(entropy_T.shape, generator=torch.Generator().manual_seed(1))
    ordered = entropy_T.sort().values
    middle = int(0.6 * len(ordered))
    threshold = (ordered[middle] + ordered[middle + 1]) / 2
    return dataclasses.replace(
        batch,
        old_logprob_T=batch.old_logprob_T + noise_T,
        selected_T=entropy_T >= threshold,
        threshold=threshold,
    )


def gradients(policy, batch, config):
    """The gradients that `update` steps along, and its metrics, on a copy of the policy."""
    return step(copy.deepcopy(policy), batch, config)


def step(policy, batch, config, ranks=ALONE):
    """The same on the policy itself, which the step moves; whole gradients of a sharded one."""
    optimizer = Recorder(policy)
    metrics, seconds = update(policy, optimizer, batch, config, ranks)
    assert seconds > 0
    assert all(p.grad is None for p in policy.model.parameters())
    return [optimizer.seen[id(p)] for p in policy.model.parameters()], metrics


def distance(got, want):
    """|got - want| / |want| of all gradients as one vector."""
    error = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True)
    )
    return math.sqrt(error / sum(float(b.double().square().sum()) for b in want))
