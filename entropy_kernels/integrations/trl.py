"""TRL's trainers on our head: `patch_trl()`, before or after a trainer is built.

TRL 1.16 gives the models of its trainers a fused LM head, whose forward looks up the function that
computes, `trl.trainer.utils._ChunkedLogProbFunction`, at each call. The patch replaces it there, so
whatever stands around it stays: every loss, PEFT, DDP, FSDP2, gradient checkpointing.

n scored tokens, D hidden, V vocabulary, B sequences, L their length.
"""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._arguments import check_choice
from ..backends import beside_head, check_impl
from ..head import Head
from ..high_entropy_policy_loss import on_rows
from ..linear_logprob_entropy import LogprobEntropy, linear_logprob_entropy
from ..options import Backend
from ..support import Support
from ._caller import running_model
from ._head import as_linear, factor_of_states, measure, parts
from ._patch import Patch, require
from ._trl_rollout import OLD_LOGPROBS, SOURCES, Rollout, Told
from ._trl_step import choice_of_step

SCOPES = ("micro-batch", "step")
# What TRL's function can return besides the log-probabilities; and the statistics that are ours.
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS = {"log_sum_sq_probs": "sum_p2", "mean_logits": "mean_logit", "is_top1": "is_top1"}

_in_force: tuple[dict[str, str], Patch] | None = None
# Scale and softcap of each model that came to its fused head.
_measured: WeakKeyDictionary[Any, tuple[float, float | None]] = WeakKeyDictionary()


def patch_trl(
    *,
    scope: str = "micro-batch",
    entropy_source: str = "current",
    old_logprob: str = "recomputed",
    impl: str = "auto",
) -> Patch:
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

    A GRPOTrainer's rollout_func may return two more fields, a list with an entry per completion.
    "sampling_entropies": the entropy, in nats, of the distribution that each token was sampled
    from; see `entropy_source`. "sampling_sets": the ids that top-k, top-p or min-p left to each
    token, as a list of lists or a `Support`. Log-probs, ratios, entropies and a KL term are then
    over these sets, with the reference too. A token with an empty set, such as one of a tool, has
    log-prob 0 and no gradient. Reward functions get both fields, as they get all.

    SFT, DPO, KTO and RLOO run on this head too. The mean logit, whether the label is the most
    likely token, and the weights of DPO's WPO come from the same pass. Calls in fp64, or with a
    temperature, a `logit_scale` or a softcap that is not positive, go on to TRL's own function.

    Args:
        scope: the tokens of which `top_entropy_quantile` is a fraction. "micro-batch": those of one
            micro-batch on all ranks, TRL's rule. "step": those of all micro-batches of an optimizer
            step on all ranks. The threshold is the exact k-th largest entropy, k = ceil(fraction *
            n) (arXiv 2506.01939, section 5.1). Its equals are selected, as by TRL. At the first
            micro-batch of a step the current policy scores the others without gradient. That is one
            more forward pass of each, with dropout drawn anew, and none without gradient
            accumulation. In evaluation, and for a caller of `get_high_entropy_mask` that does not
            train, a step is one call; each call's own threshold is taken.
        entropy_source: whose entropies `top_entropy_quantile` selects by. "current": those of the
            policy that is trained, as TRL. "sampler": "sampling_entropies", by TRL's rule. The
            selection is then known before the forward, and the head runs on the selected tokens
            alone. It runs on all where the loss reads others: `beta`, ratios of sequences, VESPO,
            or `off_policy_mask_threshold`. scope="step" then scores nothing more. In what is
            logged, tokens that the head leaves out count as unclipped, with the sampler's entropy.
        old_logprob: "recomputed": TRL's, which scores all completions before the first loss where
            steps are not aligned or vLLM's log-probs are corrected. "sampler": the log-probs of
            rollout_func or vLLM, without that pass. The ratio is then to the policy that sampled,
            and TRL's correction for vLLM is 1.
        impl: as in `linear_logprob_entropy`. With scope="step" it also names the kernel of the
            threshold, which beside the reference is torch's.

    Returns:
        The patch: `undo()` ends it, and so does the end of a `with` block. Called again while it
        is in force, the same one.

    Raises:
        ImportError: where TRL is not 1.16.
        ValueError: an unknown option, or others than those of the patch in force. What follows
            comes while training. Fields of rollout_func that are missing or do not fit its
            completions; log-probs that are NaN. An `impl` that cannot run where the model is.
            DeepSpeed ZeRO-3, which takes the head's weight apart before backward. A head that is
            more than a linear layer with plain LoRA, layers between backbone and head, or logits
            that no scale and softcap explain. With scope="step" an optimizer step whose
            micro-batches were not generated together.
    """
    global _in_force
    require("trl", "1.16", "1.17")
    from trl import GRPOTrainer
    from trl.trainer import utils

    check_choice("scope", scope, SCOPES)
    check_choice("entropy_source", entropy_source, SOURCES)
    check_choice("old_logprob", old_logprob, OLD_LOGPROBS)
    check_impl(impl)
    options = {
        "scope": scope,
        "entropy_source": entropy_source,
        "old_logprob": old_logprob,
        "impl": impl,
    }
    if _in_force is not None and _in_force[1].active:
        if _in_force[0] != options:
            raise ValueError(f"TRL is patched with {_in_force[0]}; undo that before {options}")
        return _in_force[1]
    function = LogProbFunction(impl)
    replacements: list[tuple[Any, str, Any]] = [
        (utils, "_ChunkedLogProbFunction", function),
        (utils, "_use_triton", _drops_unlabelled),
        *Rollout(function, entropy_source, old_logprob).replacements(GRPOTrainer),
    ]
    if scope == "step":
        choose = choice_of_step(beside_head(impl), entropy_source == "sampler")
        replacements.append((GRPOTrainer, "get_high_entropy_mask", choose))
    _in_force = options, Patch(*replacements)
    return _in_force[1]


class LogProbFunction:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`."""

    told: Told | None = None

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

        Calls that ours cannot answer go on to TRL's function: a temperature, scale or softcap that
        is not positive; fp64. Only there is `chunk_size` used.
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
        if not positive or hidden.dtype == torch.float64:
            if self.told is not None:
                raise ValueError(
                    "fields of rollout_func need a positive temperature, scale and softcap, and a "
                    f"dtype of at most 32 bits; got {temperature=}, {logit_scale=}, {softcap=}, "
                    f"{hidden.dtype}"
                )
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
        head = Head(
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        statistics = tuple(ours for name, ours in _STATISTICS.items() if name in outputs)
        if self.told is None:
            found = linear_logprob_entropy(head, statistics=statistics, impl=self.impl)
        elif statistics:
            raise ValueError(f"fields of rollout_func go with entropies alone; got {outputs=}")
        else:
            selected_n, support = self.told.take(len(targets))
            found = _of_told(head, selected_n, support, self.impl)
        entropy = found.entropy if "entropy" in outputs else None
        log_sum_sq_probs = None if found.sum_p2 is None else found.sum_p2.log()
        return found.logprob, entropy, log_sum_sq_probs, found.mean_logit, found.is_top1


def _of_told(
    head: Head, selected_n: Tensor | None, support: Support | None, impl: str
) -> LogprobEntropy:
    """The head on the selected tokens, over their sets; zeros elsewhere."""
    if support is None:
        assert selected_n is not None
        return on_rows(head, selected_n, None, Backend(impl=impl))
    none = support.sizes == 0
    if selected_n is not None:
        none |= ~selected_n
    head = replace(head, target=head.target.masked_fill(none, head.ignore_index))
    return linear_logprob_entropy(head, support=support, impl=impl)


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
