"""TRL's trainers on our head: `patch_trl()`, before or after a trainer is built.

TRL 1.16 gives the models of its trainers a fused LM head, whose forward looks up the function that
computes, `trl.trainer.utils._ChunkedLogProbFunction`, at each call. The patch replaces it there, so
whatever stands around it stays: every loss, PEFT, DDP, FSDP2, gradient checkpointing.

n scored tokens, D hidden, V vocabulary, B sequences, L their length.
"""

import inspect
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._arguments import check_choice
from ..backends import beside_head, check_impl
from ..head import Head
from ..linear_logprob_entropy import linear_logprob_entropy
from ..streaming_threshold import StreamingThreshold
from ..top_entropy_mask import top_entropy_mask
from ._caller import running_model
from ._head import as_linear, factor_of_states, measure, parts
from ._patch import Patch, require

SCOPES = ("micro-batch", "step")
# What TRL's function can return besides the log-probabilities, and what ours can.
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_COMPUTED = {"log_probs", "entropy", "log_sum_sq_probs"}

_in_force: tuple[dict[str, str], Patch] | None = None
# Scale and softcap of each model that came to its fused head.
_measured: WeakKeyDictionary[Any, tuple[float, float | None]] = WeakKeyDictionary()


def patch_trl(*, scope: str = "micro-batch", impl: str = "auto") -> Patch:
    """Let TRL's trainers score tokens by `linear_logprob_entropy`, until the patch is undone.

    In fp32, and with `cast_lm_head_to_fp32`, losses, gradients and metrics stay what they were, to
    rounding. In 16 bits they lose TRL's error: it rounds its logits to the dtype of the hidden
    states, or that of autocast; here logits are fp32. The worst errors against fp64, of 512 tokens
    whose logits reach 60 (V = 2048), for TRL's head and for this one:

        bf16    log-probabilities 6e-2 and 4e-6, entropies 5e-2 and 4e-6
        fp16    log-probabilities 1e-2 and 1e-5, entropies 6e-3 and 4e-6

    So do ratios to a sampler's log-probabilities, the KL and the entropies that are logged. What
    else changes:

    - Backward runs on the rows with gradient alone: with `top_entropy_quantile=0.2` on a fifth of
      the completions' tokens, less the clipped ones and those of a zero advantage. With a KL term
      (`beta > 0`) or ratios of sequences (`importance_sampling_level="sequence"`) every token has a
      gradient, whatever the quantile.
    - On a CPU only tokens with a label are scored, as on a GPU, not prompt and padding too.
    - Entropies are log s - E[z - max], which does not cancel; TRL's can be negative where small.
    - Under autocast the gradient of the head's weight is rounded once, as by `torch.nn.Linear`,
      where TRL's is not.

    With LoRA on the head TRL scores by the frozen weight and trains nothing of the adapters. Its
    trainers refuse that of a PeftModel, but not of `model.add_adapter`. Here they are a part of the
    head. So is what the model does to its logits, which is measured at its first call. TRL reads
    the names of a few families from the config instead, and misses RecurrentGemma's and xLSTM's
    bound.

    Some calls go on to TRL's own function. They want the mean logit or whether the label is the
    most likely token, which SFT, DPO and KTO log. Or they are in fp64, or have a temperature, a
    `logit_scale` or a softcap that is not positive.

    Args:
        scope: the tokens of which `top_entropy_quantile` is a fraction. "micro-batch": those of one
            micro-batch on all ranks, TRL's rule. "step": those of all micro-batches of an optimizer
            step on all ranks. The threshold is the exact k-th largest entropy, k = ceil(fraction *
            n) (arXiv 2506.01939, section 5.1). Its equals are selected, as by TRL. At the first
            micro-batch of a step the current policy scores the others without gradient. That is one
            more forward pass of each, with dropout drawn anew, and none without gradient
            accumulation. In evaluation, and for a caller of `get_high_entropy_mask` that does not
            train, a step is one call; each call's own threshold is taken.
        impl: as in `linear_logprob_entropy`. With scope="step" it also names the kernel of the
            threshold, which beside the reference is torch's.

    Returns:
        The patch: `undo()` ends it, and so does the end of a `with` block. Called again while it
        is in force, the same one.

    Raises:
        ImportError: where TRL is not 1.16.
        ValueError: an unknown scope or `impl`, or others than those of the patch in force. What
            follows comes while training. An `impl` that cannot run where the model is. DeepSpeed
            ZeRO-3, which takes the head's weight apart before backward. A head that is more than a
            linear layer with plain LoRA, layers between backbone and head, or logits that no scale
            and softcap explain. With scope="step" an optimizer step whose micro-batches were not
            generated together.
    """
    global _in_force
    require("trl", "1.16", "1.17")
    from trl import GRPOTrainer
    from trl.trainer import utils

    check_choice("scope", scope, SCOPES)
    check_impl(impl)
    options = {"scope": scope, "impl": impl}
    if _in_force is not None and _in_force[1].active:
        if _in_force[0] != options:
            raise ValueError(f"TRL is patched with {_in_force[0]}; undo that before {options}")
        return _in_force[1]
    replacements: list[tuple[Any, str, Any]] = [
        (utils, "_ChunkedLogProbFunction", LogProbFunction(impl)),
        (utils, "_use_triton", _drops_unlabelled),
    ]
    if scope == "step":
        choose = _choice_of_step(beside_head(impl))
        replacements.append((GRPOTrainer, "get_high_entropy_mask", choose))
    _in_force = options, Patch(*replacements)
    return _in_force[1]


class LogProbFunction:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`."""

    def __init__(self, impl: str = "auto") -> None:
        self.impl = impl

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        """Log-probability, entropy, log sum_v p_v^2, mean logit, top-1: [n] each or None.

        hidden [n, D], weight [V, D], bias [V], targets [n]. Inside of TRL's
        fused forward, head, scale and softcap are those of the model that runs it.

        Calls that ours cannot answer go on to TRL's function: other outputs; a temperature, scale
        or softcap that is not positive; fp64. Only there is `chunk_size` used.
        """
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
        from trl.kernels import ChunkedLogProbFunction

        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "patch_trl does not gather the LM head's weight again for backward, which "
                "DeepSpeed ZeRO-3 needs; use ZeRO-2 or FSDP2, or undo the patch"
            )
        softcap = final_logit_softcapping
        model = running_model("_fused_forward")
        if model is not None:
            hidden, weight, bias = _with_adapters(model, hidden, weight, bias)
            logit_scale, softcap = _scale_and_softcap(model)
        positive = temperature > 0 and logit_scale > 0 and (softcap is None or softcap > 0)
        if not (positive and _COMPUTED.issuperset(outputs)) or hidden.dtype == torch.float64:
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
        found = linear_logprob_entropy(
            Head(
                hidden,
                weight.to(hidden.dtype),
                targets,
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
            ),
            statistics=("sum_p2",) if "log_sum_sq_probs" in outputs else (),
            impl=self.impl,
        )
        entropy = found.entropy if "entropy" in outputs else None
        log_sum_sq_probs = None if found.sum_p2 is None else found.sum_p2.log()
        return found.logprob, entropy, log_sum_sq_probs, None, None


def _with_adapters(
    model: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, or with LoRA on the model's head, of which TRL reads the frozen weight, its."""
    head = model.get_output_embeddings()
    return as_linear(head, hidden) if parts(head)[1] else (hidden, weight, bias)


@torch.compiler.disable
def _scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """From the backbone's states to the logits, measured once; TRL has them of the config."""
    if model not in _measured:
        head = model.get_output_embeddings()
        scale, softcap = measure(model, head)
        _measured[model] = scale * factor_of_states(model, head), softcap
    return _measured[model]


def _drops_unlabelled(device: torch.device) -> bool:
    """Whether the fused head's forward drops the rows without a label: also on a CPU.

    Elsewhere as TRL decides, which keeps them where shapes must not change.
    """
    from trl.kernels.chunked_logprob import _use_triton

    return device.type == "cpu" or _use_triton(device)


def _choice_of_step(impl: str) -> Callable[..., Tensor]:
    """What stands in for GRPOTrainer.get_high_entropy_mask."""

    def get_high_entropy_mask(
        self: Any, entropies: Tensor, mask: Tensor, threshold: float
    ) -> Tensor:
        return high_entropy_mask_of_step(self, entropies, mask, threshold, impl)

    return get_high_entropy_mask


def high_entropy_mask_of_step(
    self: Any, entropies: Tensor, mask: Tensor, threshold: float, impl: str = "auto"
) -> Tensor:
    """`GRPOTrainer.get_high_entropy_mask`, by the threshold of the whole optimizer step.

    entropies [B, L], mask [B, L] of any dtype; threshold: the quantile, 1 - fraction. While `self`
    trains, n and k are of all micro-batches of its step, and the entropies of the others are the
    current policy's. In evaluation, and for any other caller, n and k are of the call. Another
    threshold in the same step scores the other micro-batches once more. Collective, as TRL's.

    Raises:
        ValueError: a threshold outside [0, 1]; as `patch_trl`.
    """
    fraction = _fraction(self, float(threshold))
    entropy_BL, valid_BL = entropies.detach().float(), mask.bool()
    group = dist.group.WORLD if dist.is_initialized() else None
    if getattr(self, "is_in_train", False) is not True or not self.model.training:
        return top_entropy_mask(
            entropy_BL, valid_BL, fraction, ties="threshold", group=group, impl=impl
        )
    none: tuple[range, dict[float, StreamingThreshold]] = (range(0), {})
    steps, found = getattr(self, "_threshold_of_step", none)
    if self._step not in steps:
        steps, found = _micro_batches(self), {}
        self._threshold_of_step = steps, found
    if fraction not in found:
        found[fraction] = StreamingThreshold(
            fraction, group=group, device=entropy_BL.device, impl=impl
        )
        found[fraction].update(entropy_BL, valid_BL)
        for step in steps:
            if step != self._step:
                found[fraction].update(*_score(self, step))
    return found[fraction].mask(entropy_BL, valid_BL)


def _fraction(trainer: Any, threshold: float) -> float:
    """1 - threshold: the trainer's own fraction where TRL made the threshold of it, rounding."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a quantile in [0, 1]; got {threshold}")
    own = getattr(trainer, "top_entropy_quantile", None)
    if isinstance(own, int | float) and 0 < own <= 1 and 1 - own == threshold:
        return own
    # The quantile 1 leaves the highest entropy.
    return max(float(1 - Decimal(str(threshold))), 1e-12)


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
