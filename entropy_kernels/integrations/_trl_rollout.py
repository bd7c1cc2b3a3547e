"""What TRL's rollout_func knows of the tokens that it sampled, carried on to the loss.

TRL 1.16 gives the fields that a rollout_func returns beside ids and log-probs to the reward
functions, and to nothing else. These wrappers of GRPOTrainer's methods read two of them where they
pass, and tell the head of them.

B sequences, L their length, n scored tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..support import Support
from ._patch import Patch

ENTROPIES, SETS = "sampling_entropies", "sampling_sets"
SOURCES, OLD_LOGPROBS = ("current", "sampler"), ("recomputed", "sampler")
_METHODS = (
    "_generate",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
    "_compute_loss",
)


@dataclass
class Told:
    """What the head is told of scored tokens, which one or more of its calls take in order."""

    selected_n: Tensor | None
    """The tokens that the loss reads; None for all."""
    support: Support | None
    """Each token's set; an empty one is that of a token that nobody sampled."""
    count: int
    taken: int = 0

    @torch.compiler.disable
    def take(self, count: int) -> tuple[Tensor | None, Support | None]:
        """What is known of the next `count` tokens."""
        first, self.taken = self.taken, self.taken + count
        if self.taken > self.count:
            self.check()
        rows = slice(first, self.taken)
        support = self.support
        if support is not None:
            support = support.at(torch.arange(first, self.taken, device=support.offsets.device))
        return None if self.selected_n is None else self.selected_n[rows], support

    def check(self) -> None:
        """Check that the head scored the tokens that it was told of."""
        if self.taken != self.count:
            raise ValueError(
                f"the fused head must score the completions' {self.count} tokens; got {self.taken}"
            )


@dataclass
class Sampled:
    """What is known of the completions of a call."""

    entropy_BL: Tensor | None = None
    sets: Sequence[Support] | None = None
    selected_BL: Tensor | None = None
    """The tokens that the loss reads, where it reads no others."""
    old_BL: Tensor | None = None
    """What the loss reads as the log-probs of the others."""
    answer_BL: Tensor | None = None
    """The sampler's log-probs, which answer the next call for those of the old policy."""

    def told(self, scored_BL: Tensor) -> Told:
        """What the head is told of the tokens that it scores, in its order."""
        selected, support = self.selected_BL, None
        if self.sets is not None:
            device = scored_BL.device
            support = Support.concatenate([s.to(device) for s in self.sets])
            lengths_B = torch.tensor([len(s.offsets) - 1 for s in self.sets], device=device)
            number_BL = torch.arange(scored_BL.shape[1], device=device)
            number_BL = number_BL + (lengths_B.cumsum(0) - lengths_B).unsqueeze(1)
            support = support.at(number_BL[scored_BL])
        flat = None if selected is None else selected[scored_BL]
        return Told(flat, support, int(scored_BL.sum()))


class Rollout:
    """The wrappers; `function` is what stands in for TRL's and reads `function.told`."""

    def __init__(self, function: Any, entropy_source: str, old_logprob: str) -> None:
        self.function, self.entropy_source, self.old_logprob = function, entropy_source, old_logprob

    def replacements(self, trainer: type) -> list[tuple[Any, str, Any]]:
        """Owner, name and wrapper of each method of the trainer's class."""
        return [
            (trainer, name, _around(getattr(trainer, name), getattr(self, name)))
            for name in _METHODS
        ]

    def _generate(self, original: Any, trainer: Any, *args: Any, **options: Any) -> Any:
        found = original(trainer, *args, **options)
        _, completion_ids, _, _, logprobs, extra, *_ = found
        trainer._sampled = self._read(trainer, completion_ids, logprobs, extra)
        return found

    def _generate_and_score_completions(
        self, original: Any, trainer: Any, *args: Any, **options: Any
    ) -> Any:
        with _known(trainer, None):
            output = original(trainer, *args, **options)
            sampled = trainer._sampled
        if sampled.entropy_BL is not None:
            output[ENTROPIES] = sampled.entropy_BL
        if sampled.sets is not None:
            output[SETS] = sampled.sets
        if self.old_logprob == "sampler":
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        return output

    def _get_per_token_logps_and_entropies(
        self,
        original: Any,
        trainer: Any,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **options: Any,
    ) -> Any:
        call = model, input_ids, attention_mask, logits_to_keep, *args
        sampled = getattr(trainer, "_sampled", None) or Sampled()
        if sampled.answer_BL is not None:
            answer, sampled.answer_BL = sampled.answer_BL, None
            return answer, None, None
        if sampled.selected_BL is None and sampled.sets is None:
            return original(trainer, *call, **options)
        told = sampled.told(attention_mask[:, -logits_to_keep:].bool())
        self.function.told = told
        try:
            logps, entropies, aux_loss = original(trainer, *call, **options)
        finally:
            self.function.told = None
        told.check()
        if sampled.selected_BL is not None:
            if sampled.old_BL is not None:
                # Their ratio is 1: exp of another difference may be inf, and 0 times it NaN.
                logps = torch.where(sampled.selected_BL, logps, sampled.old_BL)
            assert sampled.entropy_BL is not None
            entropies = torch.where(sampled.selected_BL, entropies, sampled.entropy_BL)
        return logps, entropies, aux_loss

    def compute_loss(
        self,
        original: Any,
        trainer: Any,
        model: Any,
        inputs: dict[str, Any],
        *args: Any,
        **options: Any,
    ) -> Any:
        """Check that what is known reached the loss."""
        trainer._loss_of_trl = False
        loss = original(trainer, model, inputs, *args, **options)
        selects = self.entropy_source == "sampler" and trainer.top_entropy_quantile < 1
        if not trainer._loss_of_trl and (selects or SETS in inputs):
            raise ValueError(
                f"{type(trainer).__name__} has a _compute_loss of its own, which does not call "
                "GRPOTrainer's, and knows nothing of the fields of rollout_func"
            )
        return loss

    def _compute_loss(self, original: Any, trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
        trainer._loss_of_trl = True
        entropy_BL, sets = inputs.get(ENTROPIES), inputs.get(SETS)
        fraction = trainer.top_entropy_quantile
        if self.entropy_source != "sampler" or fraction >= 1 or entropy_BL is None:
            with _known(trainer, None if sets is None else Sampled(sets=sets)):
                return original(trainer, model, inputs)
        mask_BL = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask_BL = mask_BL * inputs["tool_mask"]
        keep_BL = trainer.get_high_entropy_mask(entropy_BL, mask_BL, 1 - fraction)
        sampled = Sampled(
            entropy_BL=entropy_BL,
            sets=sets,
            selected_BL=None if _reads_others(trainer) else keep_BL,
            old_BL=inputs.get("old_per_token_logps"),
        )
        chosen = Patch((trainer, "get_high_entropy_mask", lambda *_, **__: keep_BL))
        with _known(trainer, sampled), chosen:
            return original(trainer, model, inputs)

    def _read(
        self,
        trainer: Any,
        completion_ids: list[list[int]],
        logprobs: list[list[float]] | None,
        extra: dict[str, Any],
    ) -> Sampled:
        """What rollout_func returned, checked and padded as TRL pads log-probs."""
        lengths = [len(ids) for ids in completion_ids]
        entropies, sets = extra.get(ENTROPIES), extra.get(SETS)
        sampled = Sampled()
        if entropies is not None:
            sampled.entropy_BL = _padded(trainer, _checked(ENTROPIES, entropies, lengths))
            if not bool((sampled.entropy_BL.isfinite() & (sampled.entropy_BL >= 0)).all()):
                raise ValueError(f"rollout_func's {ENTROPIES} must be finite and not negative")
        elif self.entropy_source == "sampler" and trainer.top_entropy_quantile < 1:
            raise ValueError(
                f'entropy_source="sampler" needs a rollout_func that returns {ENTROPIES}, a list '
                f"per completion; got {sorted(extra) or 'no extra field'}"
            )
        if sets is not None:
            sampled.sets = [s if isinstance(s, Support) else Support.of(s) for s in sets]
            _checked(SETS, [s.sizes for s in sampled.sets], lengths)
        if self.old_logprob == "sampler":
            if logprobs is None:
                raise ValueError('old_logprob="sampler" needs log-probs of vLLM or a rollout_func')
            _checked("logprobs", logprobs, lengths)
            if any(x is None or x != x for row in logprobs for x in row):
                raise ValueError('old_logprob="sampler" needs every log-prob; got None or NaN')
            if _asks_for_old(trainer):
                sampled.answer_BL = _padded(trainer, logprobs)
        return sampled


def _around(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(trainer: Any, *args: Any, **options: Any) -> Any:
        return wrapper(original, trainer, *args, **options)

    return method


@contextmanager
def _known(trainer: Any, sampled: Sampled | None) -> Iterator[None]:
    """While this is what is known of the completions whose log-probs are asked for."""
    before = getattr(trainer, "_sampled", None)
    trainer._sampled = sampled
    try:
        yield
    finally:
        trainer._sampled = before


def known_of_inputs(trainer: Any, inputs: dict[str, Any]) -> Any:
    """The same for another micro-batch, all of whose tokens are scored."""
    return _known(trainer, Sampled(sets=inputs.get(SETS)))


def _reads_others(trainer: Any) -> bool:
    """Whether the loss reads log-probs of tokens that are not selected."""
    return (
        trainer.beta != 0
        or trainer.importance_sampling_level != "token"
        or trainer.loss_type == "vespo"
        or trainer.off_policy_mask_threshold is not None
    )


def _asks_for_old(trainer: Any) -> bool:
    """Whether TRL scores the completions before the first loss of them."""
    every = trainer.args.steps_per_generation * trainer.num_iterations
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return trainer.args.gradient_accumulation_steps % every != 0 or corrects


def _checked(name: str, rows: Sequence[Any], lengths: list[int]) -> Sequence[Any]:
    found = [len(row) for row in rows]
    if found != lengths:
        raise ValueError(
            f"rollout_func's {name} must have one entry for each of the completions' {lengths} "
            f"tokens; got {found}"
        )
    return rows


def _padded(trainer: Any, rows: Sequence[Any]) -> Tensor:
    """fp32 [B, L], zeros behind each row."""
    from trl.trainer.utils import pad

    tensors = [torch.as_tensor(row, dtype=torch.float32).cpu() for row in rows]
    every = trainer.pad_to_multiple_of
    padded: Tensor = pad(tensors, padding_value=0, padding_side="right", pad_to_multiple_of=every)
    return padded.to(trainer.accelerator.device)
