"""GRPO and DAPO on high-entropy tokens: the whole loop.

Names follow "Beyond the 80/20 Rule" (arXiv 2506.01939). B sequences, T response tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.advantages import group_advantages
from trainer.batch import Batch
from trainer.config import Config
from trainer.evaluation.in_training import evaluate
from trainer.finite import naming_step
from trainer.launch.lock import owned
from trainer.launch.notes import stop_is_told
from trainer.launch.stop import asked, end_if, finishing
from trainer.metrics import Meter, clock, mismatch_in_loss
from trainer.ranks import join
from trainer.report.page import LiveReport
from trainer.report.progress import progress
from trainer.report.skips import took_step
from trainer.rewards.terms import shaped_reward
from trainer.rules import Rule, name_of, rule_named
from trainer.run import Run, check_start, start
from trainer.samples import entropy_metrics, write_samples
from trainer.sampling import sample_useful
from trainer.statistics import old_policy
from trainer.update import check_statistics, update


def train(
    settings: Config,
    on_step: Callable[[int], Any] = lambda step: None,
    *,
    allow_changes: Sequence[str] = (),
    branch: str = "",
    rule: Rule | None = None,
) -> Path:
    """Train up to `settings.steps`, from the last checkpoint where there is one.

    `on_step` is called when a step is on disk. `rule` chooses the tokens in the place of
    `algorithm.which`, for which the run notes its name. The other arguments are those of `start`.
    Returns the path of the report.

    Raises:
        ValueError: somebody else works in the run's folder, or what `start` raises.
        KeyboardInterrupt: `trainer.launch.stop.Stopped`, where a signal has ended it.
    """
    if rule is not None:
        algorithm = replace(settings.algorithm, which=name_of(rule))
        settings = replace(settings, algorithm=algorithm)
    rule = rule or rule_named(settings.algorithm.which)
    check_start(settings)
    group = settings.model.compute_dtype is not None
    with join(settings.device, group) as ranks, owned(settings.folder, ranks):
        run = start(settings, ranks, allow_changes, branch)
        run.rule = rule
        try:
            with stop_is_told(run):
                return _train(run, on_step)
        finally:
            run.engine.close()


def _train(run: Run, on_step: Callable[[int], Any]) -> Path:
    settings, first = run.settings, run.ranks.first
    page = LiveReport(run.folder, first)
    if run.fresh:
        run.write({"step": 0, **_evaluate(run)})
        _save(run)
        page.refresh()
    shown = progress("RL", settings.steps, start=run.progress.step, shown=first)
    with finishing(), shown as bar:
        bar.recall(run.rows())
        for step in range(run.progress.step + 1, settings.steps + 1):
            run.progress.step = step
            last = step == settings.steps
            with naming_step(step, run.folder):
                metrics = _step(run)
            if last or step % settings.eval.every == 0:
                metrics |= _evaluate(run)
            run.write({"step": step, **metrics})
            stopping = asked(run.ranks)
            if last or stopping or step % settings.checkpoint_every == 0:
                _save(run)
            bar.update(step, metrics)
            if step % settings.eval.every == 0:
                page.refresh()
            on_step(step)
            end_if(stopping and not last)
    run.log.close()
    return page.refresh(running=False)


def _step(run: Run) -> dict[str, float]:
    """Sample, verify, select the tokens, update."""
    settings, algorithm, policy = run.settings, run.settings.algorithm, run.policy
    began, updates = clock(policy.device), run.progress.updates

    # Sample G responses per prompt; keep the groups that are neither all right nor all wrong.
    rollouts, metrics, everything = sample_useful(run)
    sampled = clock(policy.device)
    metrics["time/sample"] = sampled - began
    if metrics["groups/useful"] < algorithm.min_groups:
        write_samples(run, everything)
        metrics |= {"skipped/few_groups": 1.0, "groups/wanted": float(algorithm.min_groups)}
        return metrics | {"time/step": sampled - began}

    # Group advantages of the verdict and what is added to it, such as the overlong punishment.
    shaped_B, terms = shaped_reward(rollouts, settings)
    metrics |= terms
    advantage_B = group_advantages(shaped_B, rollouts.group_B, algorithm.advantage)
    if settings.reward.drop_truncated:
        finished = (~rollouts.truncated_B).nonzero().squeeze(1)
        metrics["response/dropped"] = float(len(rollouts) - len(finished))
        rollouts, advantage_B = rollouts.rows(finished), advantage_B[finished]
        if not len(finished):
            write_samples(run, everything)
            return metrics | {"skipped/all_truncated": 1.0, "time/step": sampled - began}
    run.engine.sleep()

    # Log-probs and entropies, of the sampler or of a scoring pass; tau and the mask over the step.
    old = old_policy(run, rollouts, advantage_B)
    scored = clock(policy.device) if old.scored else sampled
    metrics["time/score"] = scored - sampled

    # An optimizer step on each mini-batch of whole groups.
    choice = old.choice
    batch = Batch(
        *(rollouts, advantage_B, old.logprob_T, choice.selected_T, old.threshold),
        *(choice.weight_T, choice.kept_length_B),
    )
    updated, seconds = _update(run, batch, old.entropy_T)
    run.engine.update_weights(policy.weights())
    ended = clock(policy.device)

    write_samples(run, everything, batch, old.entropy_T)
    metrics |= updated | entropy_metrics(old.entropy_T) | old.metrics
    return metrics | {
        "updates": float(run.progress.updates - updates),
        "entropy/threshold": float(old.threshold),
        "tokens_per_second": metrics["tokens"] / (ended - began),
        "time/update": ended - scored,
        "time/head": old.head_seconds + seconds,
        "time/step": ended - began,
    }


def _update(run: Run, batch: Batch, entropy_T: Tensor) -> tuple[dict[str, float], float]:
    """The metrics of the step's updates, and seconds in the head; no update if statistics are not
    finite."""
    if poisoned := check_statistics(run.policy, batch, entropy_T, run.ranks, run.guard):
        return poisoned, 0.0
    meter, head_seconds, rate, moved = Meter(), 0.0, 0.0, False
    for index in _mini_batches(batch.rollouts.group_B, run.settings.optimizer.mini_batches):
        rate = run.set_learning_rate()
        part, coef = batch.rows(index), run.entropy_coef
        updated, seconds = update(
            run.policy, run.optimizer, part, run.settings, run.ranks, run.guard, coef
        )
        head_seconds += seconds
        weight = updated["head/rows"]
        meter.add(mismatch_in_loss(updated, run.settings, moved), weight)
        moved |= took_step(updated)
        if took_step(updated) and run.control is not None:
            run.follow_entropy(updated["entropy/of_bonus"])
        run.progress.updates += took_step(updated)
    return meter.result() | {"lr": rate}, head_seconds


def _mini_batches(group_B: Tensor, count: int) -> list[Tensor]:
    """Row numbers of `count` parts of about as many whole groups each."""
    parts = group_B.unique().tensor_split(count)
    return [torch.isin(group_B, part).nonzero().squeeze(1) for part in parts if len(part)]


def _evaluate(run: Run) -> dict[str, float]:
    began = time.perf_counter()
    metrics = evaluate(run)
    return metrics | {"time/evaluate": time.perf_counter() - began}


def _save(run: Run) -> None:
    with naming_step(run.progress.step, run.folder):
        checkpoint.save(
            run.folder,
            run.policy,
            run.optimizer,
            run.progress,
            run.settings.keep_checkpoints,
            run.ranks,
            run.settings.keep_every,
        )
