"""TRL's trainers on our head: `patch_trl()`, before or after a trainer is built.

TRL 1.16 gives the models of its trainers a fused LM head, whose forward looks up the function that
computes, `trl.trainer.utils._ChunkedLogProbFunction`, at each call. The patch replaces it there, so
whatever stands around it stays: every loss, PEFT, DDP, FSDP2, gradient checkpointing.

n scored tokens, D hidden, V vocabulary, B sequences, L their length.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import linear_logprob_entropy
from ..selection import StreamingThreshold, top_entropy_mask
from ._patch import Patch, require

SCOPES = ("micro-batch", "step")
# What TRL's function can return besides the log-probabilities, and what ours can.
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_COMPUTED = {"log_probs", "entropy", "log_sum_sq_probs"}

_in_force: tuple[str, Patch] | None = None


def patch_trl(*, scope: str = "micro-batch") -> Patch:
    """Let TRL's trainers score tokens by `linear_logprob_entropy`, until the patch is undone.

    Losses, gradients and metrics stay what they were, to rounding. What changes:

    - Backward runs on the rows with gradient alone: with `top_entropy_quantile=0.2` on a fifth of
      the completions' tokens, less the clipped ones and those of a zero advantage. With a KL term
      (`beta > 0`) or ratios of sequences (`importance_sampling_level="sequence"`) every token has a
      gradient, whatever the quantile.
    - On a CPU only tokens with a label are scored, as on a GPU, not prompt and padding too.
    - Entropies are log s - E[z - max], which does not cancel; TRL's can be negative where small.
    - Under autocast logits are fp32, where TRL's are rounded to 16 bits; the gradient of the head's
      weight is rounded once, as by `torch.nn.Linear`, where TRL's is not. With
      `cast_lm_head_to_fp32` neither is.

    Calls that want the mean logit or whether the label is the most likely token, which SFT, DPO and
    KTO log, or whose `logit_scale` is not positive, go on to TRL's own function.

    Args:
        scope: the tokens of which `top_entropy_quantile` is a fraction. "micro-batch": those of one
            micro-batch on all ranks, TRL's rule. "step": those of all micro-batches of an
            optimizer step on all ranks; the threshold is the exact k-th largest entropy, k =
            ceil(fraction * n) (arXiv 2506.01939, section 5.1), and its equals are kept, as by TRL.
            At the first micro-batch of a step the current policy scores the others without
            gradient: one more forward pass of each, none without gradient accumulation, with
            dropout drawn anew. In evaluation a step is one batch.

    Returns:
        The patch: `undo()` ends it, and so does the end of a `with` block. Called again while it
        is in force, the same one.

    Raises:
        ImportError: where TRL is not 1.16.
        ValueError: an unknown scope, or another than that of the patch in force. While training:
            DeepSpeed ZeRO-3, which takes the head's weight apart before backward; and with
            scope="step" an optimizer step whose micro-batches were not generated together.
    """
    global _in_force
    require("trl", "1.16", "1.17")
    from trl import GRPOTrainer
    from trl.trainer import utils

    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    if _in_force is not None and _in_force[1].active:
        if _in_force[0] != scope:
            raise ValueError(
                f"patch_trl(scope={_in_force[0]!r}) is in force; undo it before scope={scope!r}"
            )
        return _in_force[1]
    replacements: list[tuple[Any, str, Any]] = [
        (utils, "_ChunkedLogProbFunction", LogProbFunction),
        (utils, "_use_triton", _drops_unlabelled),
    ]
    if scope == "step":
        replacements.append((GRPOTrainer, "get_high_entropy_mask", high_entropy_mask_of_step))
    _in_force = scope, Patch(*replacements)
    return _in_force[1]


class LogProbFunction:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        """Log-probability, entropy, log sum_v p_v^2, mean logit, top-1: [n] each or None.

        hidden [n, D], weight [V, D], bias [V], targets [n]. The scale s folds into two numbers:

        softcap * tanh(s z / softcap) / temperature = c * tanh(z / c) / t
        with c = softcap / s, t = temperature / s

        `chunk_size` is that of TRL's function, to which calls go that ours cannot answer.
        """
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
        from trl.kernels import ChunkedLogProbFunction

        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "patch_trl does not gather the LM head's weight again for backward, which "
                "DeepSpeed ZeRO-3 needs; use ZeRO-2 or FSDP2, or undo the patch"
            )
        if not _COMPUTED.issuperset(outputs) or not logit_scale > 0:
            return ChunkedLogProbFunction.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                softcap,
                logit_scale,
                outputs,
            )
        options: dict[str, Any] = {}
        if "log_sum_sq_probs" in outputs:
            options["statistics"] = ("sum_p2",)
        found = linear_logprob_entropy(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature / logit_scale,
            softcap=None if softcap is None else softcap / logit_scale,
            **options,
        )
        entropy = found.entropy if "entropy" in outputs else None
        log_sum_sq_probs = None if found.sum_p2 is None else found.sum_p2.log()
        return found.logprob, entropy, log_sum_sq_probs, None, None


def _drops_unlabelled(device: torch.device) -> bool:
    """Whether the fused head's forward drops the rows without a label: also on a CPU.

    Elsewhere as TRL decides, which keeps them where shapes must not change.
    """
    from trl.kernels.chunked_logprob import _use_triton

    return device.type == "cpu" or _use_triton(device)


def high_entropy_mask_of_step(
    trainer: Any, entropies: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """`GRPOTrainer.get_high_entropy_mask`, by the threshold of the whole optimizer step.

    entropies [B, L], mask [B, L]; the trainer's own `top_entropy_quantile` is read in place of
    `threshold`, which is 1 minus it, rounded. Collective, as TRL's.
    """
    entropy_BL, valid_BL = entropies.detach(), mask.bool()
    group = dist.group.WORLD if dist.is_initialized() else None
    fraction = trainer.top_entropy_quantile
    if not trainer.model.training:
        return top_entropy_mask(entropy_BL, valid_BL, fraction, ties="threshold", group=group)
    none: tuple[range, Any] = (range(0), None)
    steps, found = getattr(trainer, "_threshold_of_step", none)
    if trainer._step not in steps:
        steps, found = _micro_batches(trainer), StreamingThreshold(fraction, group=group)
        found.update(entropy_BL, valid_BL)
        for step in steps[1:]:
            found.update(*_score(trainer, step))
        trainer._threshold_of_step = steps, found
    return found.mask(entropy_BL, valid_BL)


def _micro_batches(trainer: Any) -> range:
    """Numbers of the micro-batches of the optimizer step that begins, all of them generated."""
    count = trainer.current_gradient_accumulation_steps
    generated = trainer.args.steps_per_generation * trainer.num_iterations
    used = trainer._step % generated
    if used + count > generated:
        raise ValueError(
            f'scope="step" needs the {count} micro-batches of an optimizer step generated before '
            f"it begins, but {generated - used} are: steps_per_generation * num_iterations = "
            f"{generated}, of which {used} are done. Make it a multiple of "
            f"gradient_accumulation_steps = {trainer.args.gradient_accumulation_steps}"
        )
    return range(trainer._step, trainer._step + count)


@torch.no_grad()
def _score(trainer: Any, step: int) -> tuple[Tensor, Tensor]:
    """Entropies and mask [B, L] of a micro-batch, by the current policy."""
    inputs = trainer._buffered_inputs[step % trainer.args.steps_per_generation]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    takes = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
    of_images = {name: value for name, value in inputs.items() if name in takes}
    _, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, mask.shape[1], compute_entropy=True, **of_images
    )
    return entropies, mask.bool()
