"""The paper's objective on the head: which tokens, then the loss on them.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _rows, backends
from ._arguments import check_known, check_masks, check_tensor
from ._inputs import check_selection, check_selection_options
from ._loss_options import beyond_kept, counts_left
from ._loss_options import check_options as check_loss_options
from ._main_grad import check_main_grad
from ._ratio_kernel import has_kernel
from ._shapes import Bool, Float, Int
from .head import Head, check_softcap, check_temperature
from .linear_logprob_entropy import LogprobEntropy, linear_logprob_entropy
from .linear_logprob_entropy import check_options as check_run_options
from .ratio_loss import LOSS_OPTIONS, ratio_loss
from .top_entropy_mask import top_entropy_mask

IGNORED = -100
# On a CPU, of a weight's row: below so many bytes a product of hidden states costs less than the
# first touch of the memory for its logits.
LEAST_ROW_BYTES = {"cpu": 2048, "cuda": 0}


def high_entropy_policy_loss(
    hidden: Float[Tensor, "*tokens D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, "*tokens"],
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    fraction: float = 0.2,
    selected: Bool[Tensor, "*tokens"] | None = None,
    threshold: float | Float[Tensor, ""] | None = None,
    which: str = "top",
    scope: str = "batch",
    group: ProcessGroup | None = None,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "..."] = 1.0,
    softcap: float | None = None,
    vocab_group: ProcessGroup | None = None,
    max_active_rows: int | None = None,
    main_grad: Float[Tensor, "V D"] | None = None,
    impl: str = "auto",
    **loss_options: Any,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The paper's objective: the clipped policy loss on the tokens of highest entropy.

    J = 1 / sum_t I[H_t >= tau] * sum_t I[H_t >= tau] min(r_t A_t, clip(r_t) A_t)
    (arXiv 2506.01939v2, equation 6), where tau is the entropy that `fraction` of the loss mask's
    tokens reach. Which tokens those are can be known in three ways:

    - `fraction` (default): by the entropies of the current policy, among the tokens of this call,
      or of all ranks of `group`. Forward runs on the mask's tokens, backward on the selected.
    - `threshold`: by the entropies of the current policy, against a tau known beforehand, such as
      that of the whole step from StreamingThreshold. It is the head's `keep_logits_above`.
    - `selected`: beforehand, such as by the old policy's entropies. The head runs on the selected
      tokens alone: three products (logits, two gradients) of `fraction` of the rows, while their
      fp32 logits fit into 256 MiB (on a GPU 1 GiB). Beyond, and on a CPU where D is below 512 (of
      16-bit inputs 1024) and memory costs more than products, they are recomputed: a fourth.

    Args:
        hidden, weight, target, bias, temperature, softcap, vocab_group, impl: as in
            `linear_logprob_entropy`. hidden[t] is the state that predicts target[t]. Every rank of
            a vocab_group has the whole loss, and which="random" would choose other tokens on each.
        old_logprob: log-probabilities under the sampling policy; None: on-policy, ratio 1.
        advantage: one a token, or one a sequence where target is [B, L].
        mask: the loss mask; false for prompt, padding and tool tokens, which never enter the
            threshold and on a CPU cost nothing. A target of -100 is no token, whatever the mask
            says, and enters no count.
        which, scope: as in `top_entropy_mask`.
        group: the ranks that hold other tokens, over which DDP or FSDP2 averages gradients. The
            tokens are selected among those of all, and what is left to be counted is the mean count
            per rank of it, as in `ratio_loss`: the average is the loss, and the gradient, of one
            process. A number as `denominator` or `num_sequences` is taken as it is. Metrics are of
            this rank; `distributed.join_metrics` joins them. Without it, tokens are selected among
            those of the sequence_group, if there is one.
        loss_options: keywords of `ratio_loss`, all but its entropy, which is the head's: loss_type,
            clip_low, clip_high, dual_clip, sequence_over, aggregation, denominator, num_sequences,
            sequence_group, token_weight, sampler_logprob, correction, correction_cap,
            correction_floor, reference_logprob, kl_coef, kl_type, kl_on, entropy_coef, entropy_on.
            With `selected` the head knows of the selected tokens alone, and one that reads others
            raises.
        max_active_rows, main_grad: as in `linear_logprob_entropy`. With a bound of the selected
            tokens, such as ceil(fraction * n) of a batch whose n is known to the host, nothing
            waits for a GPU. More selected tokens than that make the loss and the gradients NaN
            there, and are a ValueError on a CPU.

    Returns:
        The loss, a fp32 scalar, and its metrics, 0-dim tensors without gradient: those of
        `ratio_loss`; entropy/threshold, the lowest entropy among this rank's selected tokens, or
        the `threshold` given; entropy/selected_mean over the selected tokens; and entropy/mean over
        the mask's, unless `selected` was given.

    An empty mask or selection gives a zero loss with zero gradients. A NaN entropy is selected in
    every way but `selected`, and makes the loss and the gradients NaN; so does a `threshold` that
    is a tensor of NaN.

    Raises:
        ValueError: as the functions it is made of; both `selected` and `threshold` given, or one of
            them together with which, scope, or a group that has nothing to count; a number of NaN
            as `threshold`; which="random" with a vocab_group; scope="sequence" with a
            sequence_group; an unknown option.
    """
    head: dict[str, Any] = {
        "bias": bias,
        "softcap": softcap,
        "vocab_group": vocab_group,
        "max_active_rows": max_active_rows,
        "main_grad": main_grad,
        "impl": impl,
    }
    choice = {"threshold": threshold, "which": which, "scope": scope, "group": group}
    check_options({"fraction": fraction} | choice | head | loss_options)
    whole = Head(hidden, weight, target, bias, temperature, softcap)
    whole.check(sharded=vocab_group is not None)
    check_main_grad(main_grad, whole)
    check_tensor("mask", mask)
    check_masks(target, mask=mask, selected=selected)
    mean_group = group if counts_left(**loss_options) else None
    other_group = None if group is mean_group else group
    check_selection(selected, threshold, which, scope, other_group, vocab_group)
    sequence_group = loss_options.get("sequence_group")
    if sequence_group is not None and scope == "sequence":
        raise ValueError(
            'scope="sequence" ranks the tokens of a sequence that is on one rank, but those of '
            "sequence_group share it"
        )
    reads = beyond_kept(old_logprob is None, **loss_options) if selected is not None else None
    if reads is not None:
        raise ValueError(
            f"{reads} reads tokens that are not selected, of which the head knows nothing with "
            "selected=; select by fraction= or threshold="
        )
    mask = mask & (target != IGNORED)
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=hidden.device)
    if selected is not None:
        selected = selected & mask
        found = _on_rows(hidden, weight, target, selected, temperature, head)
    else:
        found = linear_logprob_entropy(
            hidden,
            weight,
            target.masked_fill(~mask, IGNORED),
            temperature=temperature,
            keep_logits_above=threshold,
            **head,
        )
    entropy = found.entropy.detach()
    means = {"entropy/mean": mask} if selected is None else {}
    if threshold is not None:
        selected = mask & ~(entropy < threshold)
        poison = torch.where(selected & threshold.isnan(), torch.nan, 1.0)
        found = found._replace(logprob=found.logprob * poison)
    elif selected is None:
        group = sequence_group if group is None else group
        # A sequence lives on one rank: the group is for the counts alone.
        group = None if scope == "sequence" and mean_group is not None else group
        selected = top_entropy_mask(entropy, mask, fraction, which=which, scope=scope, group=group)

    loss, metrics = ratio_loss(
        found.logprob,
        old_logprob,
        advantage,
        mask,
        selected=selected,
        entropy=found.entropy,
        group=mean_group,
        impl=_loss_impl(impl, loss_options),
        **loss_options,
    )
    lowest = entropy.masked_fill(~selected, torch.inf).flatten()
    lowest = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).min()
    metrics["entropy/threshold"] = lowest if threshold is None else threshold
    for name, among in (means | {"entropy/selected_mean": selected}).items():
        total = torch.where(among, entropy, 0.0).sum()
        metrics[name] = total / among.sum().clamp_min(1)
    return loss, metrics


_OWN = frozenset(
    p.name
    for p in inspect.signature(high_entropy_policy_loss).parameters.values()
    if p.kind is p.KEYWORD_ONLY
)
_SELECTION = ("fraction", "threshold", "which", "scope", "group")
_RUN = ("vocab_group", "max_active_rows", "impl")


def check_options(options: Mapping[str, object]) -> None:
    """Each keyword that is given, by itself: its name, and its value without the tensors' shapes.

    Raises:
        ValueError: an unknown name, of those of this function and of its loss; a bad value.
    """
    check_known(options, _OWN | LOSS_OPTIONS)
    check_selection_options(**_among(options, _SELECTION))
    check_softcap(options.get("softcap"))
    check_run_options(**_among(options, _RUN))
    for temperature in _among(options, ("temperature",)).values():
        check_temperature(temperature)
    check_loss_options(_among(options, LOSS_OPTIONS))


def _among(options: Mapping[str, object], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _loss_impl(impl: str, options: dict[str, Any]) -> str:
    """`impl` names the head's; the reference has no ratio loss with gradient, others no kernel."""
    chosen = ("loss_type", "clip_low", "clip_high")
    if not has_kernel(**{name: options[name] for name in chosen if name in options}):
        return "auto"
    return "torch" if impl == "reference" else impl


def _on_rows(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor,
    temperature: float | Tensor,
    head: dict[str, Any],
) -> LogprobEntropy:
    """The head on the tokens of `rows` alone; zeros elsewhere.

    Without max_active_rows it waits for a CUDA device once, for their number.
    """
    index_R, target_R = _compact(rows.reshape(-1), target.reshape(-1), head["max_active_rows"])
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        temperature = temperature.expand(target.shape).reshape(-1)[index_R]
    device = "cuda" if hidden.is_cuda else "cpu"
    fits = 4 * index_R.shape[0] * weight.shape[0] <= backends.STORED_LOGITS_BYTES[device]
    pays = weight.shape[1] * weight.element_size() >= LEAST_ROW_BYTES[device]
    found = linear_logprob_entropy(
        hidden.reshape(-1, hidden.shape[-1])[index_R],
        weight,
        target_R,
        temperature=temperature,
        keep_logits=torch.is_grad_enabled() and fits and pays,
        **head,
    )
    # Padding rows are zero and point at any token: adding them changes nothing.
    zeros = [x.new_zeros(target.numel()).index_add(0, index_R, x) for x in found[:3]]
    if head["max_active_rows"] is not None:
        # A factor, which where() would keep from the gradients.
        poison = torch.where(rows.sum() <= head["max_active_rows"], 1.0, torch.nan)
        zeros = [x * poison for x in zeros]
    return LogprobEntropy(*(x.reshape(target.shape) for x in zeros))


def _compact(rows_T: Tensor, target_T: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Numbers and targets of the tokens of `rows_T`, filled up to `most` with ignored ones."""
    if most is None:
        index_R = rows_T.nonzero().squeeze(1)
        return index_R, target_T[index_R]
    if _rows.sees_values(rows_T.device) and (count := int(rows_T.sum())) > most:
        raise ValueError(f"max_active_rows is {most}; got {count} selected tokens")
    # At least one, so that what is beyond a bound of 0 has a row to be seen at.
    most = min(max(most, 1), rows_T.numel())
    index_R = torch.nonzero_static(rows_T, size=most, fill_value=0).squeeze(1)
    real_R = torch.arange(most, device=rows_T.device) < rows_T.sum()
    return index_R, target_T[index_R].masked_fill(~real_R, IGNORED)
