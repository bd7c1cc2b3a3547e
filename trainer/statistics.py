"""What is known of a step's tokens before its first update: old log-probs, and who is selected.

T response tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.backends import beside_head
from trainer.batch import Rollouts
from trainer.config import Config, sources
from trainer.metrics import mismatch_metrics
from trainer.rules import DRAWN, Choice, Tokens, choose, rule_named
from trainer.run import Run
from trainer.update import Scores, score


class Statistics(NamedTuple):
    """Statistics of the policy that sampled, equal on every rank."""

    logprob_T: Tensor
    """Log-probs that ratios are taken to, nats; with a pass over selected tokens only theirs."""
    entropy_T: Tensor
    """Entropies that the threshold is taken of, nats."""
    threshold: Tensor
    """The one that `algorithm.fraction` of the tokens reach."""
    choice: Choice
    """The tokens to train on, by these statistics."""
    scored: bool
    """Whether there was a scoring pass."""
    head_seconds: float
    """Seconds that this rank spent in its head."""
    metrics: dict[str, float]
    """How far the policy is from the sampler, as far as the pass tells."""


def old_policy(run: Run, rollouts: Rollouts, advantage_B: Tensor) -> Statistics:
    """What the sampler has told, or a scoring pass finds, as `sources` has it.

    Every rank holds all responses, so the threshold is exact over all ranks.
    """
    settings, of, every = run.settings, sources(run.settings), run.settings.algorithm.compare_every
    due = every > 0 and run.progress.step % every == 0
    logprob_T, entropy_T = rollouts.sampler_logprob_T, rollouts.sampler_entropy_T
    impl = beside_head(settings.model.impl)
    threshold = ek.entropy_threshold(entropy_T, fraction=settings.algorithm.fraction, impl=impl)
    lengths_B = rollouts.response_length_B
    advantage_T = advantage_B.repeat_interleave(lengths_B, output_size=len(entropy_T))
    choice = _choose(run, logprob_T, entropy_T, threshold, advantage_T, lengths_B)
    if not (of.score or due):
        return Statistics(logprob_T, entropy_T, threshold, choice, False, 0.0, {})
    alone = of.score_selected and not due
    found = score(run.policy, rollouts, settings, run.ranks, choice.selected_T if alone else None)
    metrics = {}
    if not alone:
        given = found.logprob_T, found.entropy_T, found.threshold, advantage_T, lengths_B
        by_policy = _choose(run, *given)
        both = choice.selected_T, by_policy.selected_T
        metrics = _compare(settings, rollouts, found, *both) if due else {}
        if not of.sampler_selects:
            entropy_T, threshold, choice = found.entropy_T, found.threshold, by_policy
    if of.old_logprob == "recomputed":
        logprob_T = found.logprob_T
        at = choice.selected_T if of.score_selected else slice(None)
        metrics |= mismatch_metrics(logprob_T[at], rollouts.sampler_logprob_T[at], settings)
    seconds = found.head_seconds
    return Statistics(logprob_T, entropy_T, threshold, choice, True, seconds, metrics)


def _choose(
    run: Run,
    logprob_T: Tensor,
    entropy_T: Tensor,
    threshold: Tensor,
    advantage_T: Tensor,
    lengths_B: Tensor,
) -> Choice:
    """What the run's rule chooses by these statistics, `threshold` that of these entropies."""
    algorithm = run.settings.algorithm
    # The same on every rank; rounds of sampling have other seeds.
    generator = torch.Generator(entropy_T.device).manual_seed(run.seed(-1))
    tokens = Tokens(
        *(logprob_T, entropy_T, threshold, advantage_T, lengths_B),
        *(algorithm.fraction, generator, beside_head(run.settings.model.impl)),
    )
    return choose(run.rule or rule_named(algorithm.which), algorithm.which, tokens)


def _compare(
    settings: Config, rollouts: Rollouts, found: Scores, sampler_T: Tensor, policy_T: Tensor
) -> dict[str, float]:
    """What the sampler tells beside what the policy finds, over all response tokens.

    `sampler_T` and `policy_T` are the tokens that their entropies select. mask/overlap is those of
    both over those of either, mask/shared over those of the sampler. mask/entropy_difference is the
    largest of a token, nats. mismatch/all_... are as `mismatch_metrics` has them.
    """
    both = (sampler_T & policy_T).sum()
    difference_T = (rollouts.sampler_entropy_T - found.entropy_T).abs()
    mismatch = mismatch_metrics(found.logprob_T, rollouts.sampler_logprob_T, settings)
    metrics = {name.replace("/", "/all_"): value for name, value in mismatch.items()}
    metrics["mask/entropy_difference"] = float(difference_T.max())
    if settings.algorithm.which in DRAWN:
        return metrics
    return metrics | {
        "mask/overlap": float(both / (sampler_T | policy_T).sum().clamp_min(1)),
        "mask/shared": float(both / sampler_T.sum().clamp_min(1)),
    }
