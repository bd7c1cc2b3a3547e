"""verl: its fused head computed by ours, and the paper's exact mask as one of its policy losses.

T tokens, D hidden, V vocabulary, B sequences, L their length.

verl 0.9 computes log-probs and entropies from hidden states where
`actor_rollout_ref.model.use_fused_kernels=True`; with `fused_kernel_options.impl_backend` "torch"
or "liger" that is one method, `FusedLinearForPPO.forward`, which `patch_verl` replaces for every
model and actor. The backward of verl's and of Liger's covers all rows; here a row whose gradient is
zero (masked, clipped, of advantage zero, prompt, padding) costs nothing.

verl has no entropy mask. Its policy losses can be registered by name, but are not given entropies:
`patch_verl` registers "high_entropy" and wraps `ppo_loss`, which has them, around it.

Ray's workers are processes of their own. verl imports what `actor_rollout_ref.model.external_lib`
names in each of them before it builds a model: `entropy_kernels.integrations.verl_external_lib`
calls `patch_verl()` there.

Not covered: the Megatron engine and `impl_backend=triton`, which keep verl's own Triton kernel. The
second raises where verl would take it, "high_entropy" raises on any engine but FSDP's, and without
`use_fused_kernels` verl makes all logits as ever. verl's fused head leaves out a bias, a scale or a
softcap of the logits, and adapters of the head: each is refused, by name. verl's FSDP engine
refuses a temperature per sample with fused kernels, although the head here takes one per token.
"""

import math
import sys
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_choice, check_flag, check_fraction
from ..backends import beside_head, check_impl
from ..head import Head
from ..linear_logprob_entropy import linear_logprob_entropy
from ..options import Aggregation
from ..ratio_loss import ratio_loss
from ..top_entropy_mask import top_entropy_mask
from ._caller import running_model
from ._head import factor_of_states, measure
from ._patch import Patch, require
from ._verl_rollout import Rollout
from ._verl_squares import Squares

LOSS_MODE = "high_entropy"
BACKENDS = ("torch", "liger")
STRATEGIES = ("fsdp", "fsdp2")
# Modules of verl that hold a copy of `ppo_loss` once they are imported.
_COPIES = ("verl.workers.engine_workers", "verl.trainer.distillation.losses")
_in_force: "_VerlPatch | None" = None


def patch_verl(
    *,
    impl: str = "auto",
    fraction: float = 0.2,
    over_ranks: bool = False,
    denominator: str = "selected",
    entropy_source: str = "current",
    sets: bool = False,
) -> Patch:
    """Give verl 0.9's fused head our kernels, and its actor the loss_mode "high_entropy".

    The head keeps verl's signature, shapes ([T, D] or [B, L, D]) and temperature, which divides the
    logits of both outputs. log_probs are fp32, as verl's. Entropies are fp32 too, where verl rounds
    them to 16 bits. Many of those tie, and a mask of the highest fifth would be drawn among them.
    Rows whose label is -100 give zeros. In FSDP's engine `actor.calculate_sum_pi_squared` works,
    which verl refuses with fused kernels.

    "high_entropy", for `actor_rollout_ref.actor.policy_loss.loss_mode`, is equation 6 of arXiv
    2506.01939v2. It is the clipped ratio loss with dual clip of verl's "vanilla". Of the n response
    tokens it takes exactly ceil(fraction * n), those of highest entropy under the current policy.
    It needs `actor.calculate_entropy=True` and `actor.loss_agg_mode=token-mean`. A KL loss or an
    entropy coefficient stays what verl makes of it, a sum over all response tokens, and gives all
    of them a gradient.

    Micro-batches and ranks: as verl's losses, the sum is divided by a count of the whole
    mini-batch, so that micro-batches and ranks add up. The threshold is of one micro-batch on one
    rank (the paper's code) or on all (`over_ranks`). So the split of the mini-batch decides which
    tokens are selected, up to one more for each part, and nothing else. One micro-batch with
    `over_ranks` is exactly the paper's formula. The paper's code instead averages over each
    micro-batch's selected tokens and weighs micro-batches by their sequences.

    Args:
        impl: as in `linear_logprob_entropy`; of the head, and of the selection and the loss of
            "high_entropy", which beside the reference are torch's.
        fraction: of the response tokens, in (0, 1].
        over_ranks: one threshold over the ranks' micro-batches of one number: sums of histograms.
        denominator: "selected", ceil(fraction * tokens of the mini-batch) (paper v2), or "all", the
            tokens of the mini-batch (v1).
        entropy_source: whose entropies "high_entropy" selects by. "current": those of the policy
            that is trained. "sampler": `AgentLoopOutput.extra_fields["rollout_entropies"]`, a list
            with the entropy, in nats, of the distribution that each response token was sampled
            from; 0 for a tool's. `calculate_entropy` is then not needed, and the head runs on the
            selected tokens alone. It runs on all with a KL loss, an entropy coefficient,
            distillation or Ulysses.
        sets: `extra_fields["rollout_sets"]` has the ids that top-k, top-p or min-p left to each
            response token, as a list of lists or a `Support`; none for a tool's. Log-probs and
            entropies of actor and reference are then over these sets, and 0 for prompts and tools.

    Returns:
        The patch, with `undo`. Called again with the same options, that which is in force.

    Raises:
        ImportError: verl is missing or not 0.9.
        ValueError: options out of range; verl is patched with other options, or has another
            "high_entropy". Later, by what verl calls: `impl_backend=triton`, and the heads and
            settings named above; extra_fields that are missing or do not fit their response.
    """
    global _in_force
    check_impl(impl)
    check_fraction(fraction)
    check_flag("over_ranks", over_ranks)
    check_choice("denominator", denominator, ("selected", "all"))
    check_choice("entropy_source", entropy_source, ("current", "sampler"))
    check_flag("sets", sets)
    options = {
        "impl": impl,
        "fraction": fraction,
        "over_ranks": over_ranks,
        "denominator": denominator,
        "entropy_source": entropy_source,
        "sets": sets,
    }
    if _in_force is not None and _in_force.active:
        if _in_force.options != options:
            raise ValueError(f"verl is patched with {_in_force.options}; undo that first")
        return _in_force
    require("verl", "0.9", "0.10")
    _in_force = _VerlPatch(options)
    return _in_force


class _VerlPatch(Patch):
    """The replacements, and the registered loss."""

    def __init__(self, options: dict[str, Any]) -> None:
        from verl.models.transformers import monkey_patch
        from verl.trainer.ppo import core_algos
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.workers.utils import losses

        self.options = options
        self._registry = core_algos.POLICY_LOSS_REGISTRY
        if LOSS_MODE in self._registry:
            raise ValueError(f"verl has a policy loss {LOSS_MODE!r} already")
        loss = _HighEntropyLoss(losses, options)
        rollout, squares = loss.rollout, Squares(loss.rollout)
        ppo_loss = loss.ppo_loss
        holders = [losses, *(sys.modules[name] for name in _COPIES if name in sys.modules)]
        super().__init__(
            (FusedLinearForPPO, "forward", _head(options["impl"], rollout, squares)),
            (monkey_patch, "patch_forward_with_backends", _checked(monkey_patch)),
            *((holder, "ppo_loss", ppo_loss) for holder in holders),
            *rollout.replacements(),
            *squares.replacements(),
        )
        core_algos.register_policy_loss(LOSS_MODE)(loss.policy_loss)

    def undo(self) -> None:
        """Put back what was there before."""
        super().undo()
        self._registry.pop(LOSS_MODE, None)


def _head(impl: str, rollout: Rollout, squares: Squares) -> Any:
    """What stands in for FusedLinearForPPO.forward."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """log_probs and entropy, fp32, of input_ids' shape."""
        if not torch.compiler.is_compiling():
            _check_adapters(running_model("forward_with_torch_backend"))
        head = Head(hidden_states, vocab_weights, input_ids.long(), temperature=temperature)
        if rollout.known is not None:
            return rollout.known.score(head, impl)
        if rollout.sets:
            raise ValueError("sets=True runs in FSDP's engine only")
        found = linear_logprob_entropy(head, statistics=squares.statistics, impl=impl)
        squares.keep(found.sum_p2)
        return found.logprob, found.entropy

    return forward


def _check_adapters(model: Any) -> None:
    """Check a model whose forward gives the fused head the head's own weight alone."""
    peft: Any = sys.modules.get("peft")
    if model is None or peft is None:
        return
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    for part in model.get_output_embeddings().modules():
        if isinstance(part, layer) and not part.disable_adapters and not part.merged:
            active = sorted(part._get_available_adapters() & {*part.active_adapters})
            if active:
                raise ValueError(
                    "verl's fused head reads the head's own weight, and would leave out its "
                    f"adapters, which get no gradient; got {', '.join(active)}: take the head out "
                    "of actor_rollout_ref.model.target_modules, or set use_fused_kernels=False"
                )


def _check_head(model: Any) -> None:
    """verl's fused forwards compute h W^T of the backbone's states, and nothing else."""
    if type(model).forward.__module__.startswith("verl."):
        return  # another of its class was here before, or verl has its own forward of it
    head = model.get_output_embeddings()
    scale, softcap = measure(model, head)
    scale *= factor_of_states(model, head)
    bias = getattr(head, "bias", None) is not None
    if bias or scale != 1 or softcap is not None:
        raise ValueError(
            "verl's fused head must be of a model whose logits are h W^T; those of "
            f"{type(model).__name__} have {bias=}, {scale=}, {softcap=}: set "
            "actor_rollout_ref.model.use_fused_kernels=False"
        )


def _checked(monkey_patch: Any) -> Any:
    """verl's choice of a fused forward, which must come to the patched method."""
    original = monkey_patch.patch_forward_with_backends

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend not in BACKENDS:
            raise ValueError(
                "patch_verl covers actor_rollout_ref.model.fused_kernel_options.impl_backend "
                f"{' and '.join(BACKENDS)}; got {fused_kernels_backend}"
            )
        if use_fused_kernels:
            _check_head(model)
        original(model, use_fused_kernels, fused_kernels_backend)

    return patch_forward_with_backends


class _HighEntropyLoss:
    """verl's ppo_loss, and inside it the registered loss, to which the entropies are handed."""

    def __init__(self, losses: Any, options: dict[str, Any]) -> None:
        self._ppo_loss, self._pad = losses.ppo_loss, losses.no_padding_2_padding
        self._fraction, self._denominator = options["fraction"], options["denominator"]
        self._over_ranks, self._impl = options["over_ranks"], beside_head(options["impl"])
        self._by_sampler = options["entropy_source"] == "sampler"
        self.rollout = Rollout(self._by_sampler, options["sets"], self._select)
        self._entropy: Tensor | None = None
        self._selected: Tensor | None = None
        self._group: Any = None

    def ppo_loss(
        self, config: Any, model_output: Any, data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's ppo_loss; under "high_entropy" `policy_loss` finds the entropies [B, L]."""
        if config.policy_loss.get("loss_mode", "vanilla") != LOSS_MODE:
            return self._ppo_loss(config, model_output, data, dp_group)
        if config.strategy not in STRATEGIES:
            raise ValueError(
                f"loss_mode={LOSS_MODE} runs on the strategies {', '.join(STRATEGIES)}; "
                f"got {config.strategy}"
            )
        if self._by_sampler:
            known = self.rollout.known
            if known is None or known.selected_BL is None:
                raise ValueError(
                    f'{LOSS_MODE} with entropy_source="sampler" runs in FSDP\'s engine only'
                )
            self._entropy, self._selected = known.entropy_BL, known.selected_BL
        elif model_output.get("entropy") is None:
            raise ValueError(
                f"loss_mode={LOSS_MODE} needs actor_rollout_ref.actor.calculate_entropy=True"
            )
        else:
            self._entropy = self._pad(model_output["entropy"], data).detach().float()
            self._group = dp_group
        try:
            return self._ppo_loss(config, model_output, data, dp_group)
        finally:
            self._entropy = self._selected = self._group = None

    def policy_loss(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of `patch_verl`, times the number of ranks, over which gradients are averaged.

        All tensors are [B, L]. Metrics, over the selected tokens of this rank: actor/pg_clipfrac,
        actor/ppo_kl; of the mask: actor/selected_fraction and the mean entropies
        actor/selected_entropy and actor/mask_entropy.
        """
        if loss_agg_mode != "token-mean":
            raise ValueError(
                f"loss_mode={LOSS_MODE} has loss_agg_mode=token-mean; got {loss_agg_mode}"
            )
        entropy, selected, mask = self._entropy, self._selected, response_mask.bool()
        if entropy is None:
            raise ValueError(f"loss_mode={LOSS_MODE} runs inside verl's ppo_loss only")
        if selected is None:
            selected = self._select(entropy, mask, self._group)
        low, high = config.clip_ratio_low, config.clip_ratio_high
        loss, found = ratio_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask,
            selected=selected,
            clip_low=config.clip_ratio if low is None else low,
            clip_high=config.clip_ratio if high is None else high,
            dual_clip=config.get("clip_ratio_c", 3.0),
            denominator=self._count(config.global_batch_info),
            aggregation=Aggregation(token_weight=rollout_is_weights),
            impl=self._impl,
        )
        chosen, valid = (torch.where(of, entropy, 0).sum() for of in (selected, mask))
        metrics = {
            "actor/pg_clipfrac": found["clip/low"] + found["clip/high"],
            "actor/ppo_kl": found["kl/k1"],
            "actor/selected_fraction": found["entropy/selected_fraction"],
            "actor/selected_entropy": chosen / found["tokens/selected"].clamp_min(1),
            "actor/mask_entropy": valid / found["tokens/all"].clamp_min(1),
        }
        values = torch.stack([x.float() for x in metrics.values()]).tolist()
        return loss, dict(zip(metrics, values, strict=True))

    def _select(self, entropy_BL: Tensor, mask_BL: Tensor, dp_group: Any) -> Tensor:
        group = dp_group if self._over_ranks else None
        return top_entropy_mask(entropy_BL, mask_BL, self._fraction, group=group, impl=self._impl)

    def _count(self, info: dict[str, Any]) -> float | str:
        """The mini-batch's count of tokens, a rank's share of it; without one, that of the call."""
        tokens, ranks = info.get("batch_num_tokens"), info.get("dp_size", 1)
        if tokens is None and ranks > 1:
            raise ValueError(f"dp_size={ranks} needs batch_num_tokens in global_batch_info")
        if tokens is None:
            return self._denominator
        # As top_entropy_mask does, fraction is read as a decimal.
        share = Decimal(str(self._fraction)) if self._denominator == "selected" else 1
        return max(1, math.ceil(share * int(tokens))) / ranks
