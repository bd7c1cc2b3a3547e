"""The paper's objective on the head: which tokens, then the loss on them.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _rows, backends
from ._arguments import (
    as_scalar,
    check_fraction,
    check_masks,
    check_tensor,
    check_threshold,
    shown,
)
from ._loss_options import LossOptions, check_kinds
from ._loss_tokens import read_tokens
from ._main_grad import check_main_grad
from ._ragged import check_lengths, in_rows, rows
from ._shapes import Bool, Float, Int
from .head import Head
from .linear_logprob_entropy import LogprobEntropy, linear_logprob_entropy
from .options import KL, Aggregation, Backend, Correction, EntropyBonus, Parallel, Selection
from .ratio_loss import loss_of_tokens
from .support import Support
from .top_entropy_mask import top_entropy_mask

# On a CPU, of a weight's row: below so many bytes a product of hidden states costs less than the
# first touch of the memory for its logits.
LEAST_ROW_BYTES = {"cpu": 2048, "cuda": 0}


def high_entropy_policy_loss(
    head: Head,
    old_logprob: Float[Tensor, "*tokens"] | None,
    advantage: Float[Tensor, "..."],
    mask: Bool[Tensor, "*tokens"],
    *,
    fraction: float = 0.2,
    selected: Bool[Tensor, "*tokens"] | None = None,
    threshold: float | Float[Tensor, ""] | None = None,
    selection: Selection = Selection(),
    lengths: Int[Tensor, " B"] | None = None,
    support: Support | None = None,
    loss_type: str | Callable[..., Tensor] = "dapo",
    clip_low: float | Float[Tensor, "..."] | None = None,
    clip_high: float | Float[Tensor, "..."] | None = None,
    dual_clip: float | None = None,
    denominator: str | float | Tensor = "selected",
    aggregation: Aggregation = Aggregation(),
    kl: KL = KL(),
    correction: Correction = Correction(),
    entropy_bonus: EntropyBonus = EntropyBonus(),
    parallel: Parallel = Parallel(),
    backend: Backend = Backend(),
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The paper's objective: the clipped policy loss on the tokens of highest entropy.

    J = 1 / sum_t I[H_t >= tau] * sum_t I[H_t >= tau] min(r_t A_t, clip(r_t) A_t)
    (arXiv 2506.01939v2, equation 6), where tau is the entropy that `fraction` of the loss mask's
    tokens reach. The tokens can be chosen in three ways:

    - `fraction` (default): by the entropies of the current policy, among the tokens of this call,
      or of all ranks of the group. Forward runs on the mask's tokens, backward on the selected.
      With one of the other two `fraction` has no effect.
    - `threshold`: by the entropies of the current policy, against a tau known beforehand, such as
      that of the whole step from StreamingThreshold. It is also the head's `keep_logits_above`.
    - `selected`: beforehand, such as by the old policy's entropies. The head runs on the selected
      tokens alone: three products (logits, two gradients) of `fraction` of the rows, while their
      fp32 logits fit into 256 MiB (on a GPU 1 GiB). Beyond that the rows that do not fit are
      recomputed, which is a fourth product; or all rows, where `keep_logits_above` stores none. A
      CPU also recomputes them where D is below 512 (with 16-bit inputs 1024), as
      memory costs more than products there.

    Args:
        head: hidden states, weight, target and the rest of the LM head: `Head`. hidden[t] is the
            state that predicts target[t].
        old_logprob: log-probabilities under the sampling policy; None: on-policy, ratio 1.
        advantage: one per token, or one per sequence where target is [B, L] or lengths is given.
        mask: the loss mask, false for prompt, padding and tool tokens. They never enter the
            threshold. They cost nothing on a CPU; on a GPU only cuBLAS and the torch path multiply
            them. A target of head.ignore_index is no token, whatever the mask says, and enters no
            count.
        selection: the ablations of `fraction`, and the tolerance of `threshold`: `Selection`.
        parallel: the ranks that share the batch, its sequences or the vocabulary: `Parallel`. With
            `group` the tokens are selected among those of all its ranks, without it among those of
            the sequence_group. A number as `denominator` or `num_sequences` is taken as it is.
            Metrics are of this rank; `distributed.join_metrics` joins them.
        backend: the kernels, main_grad and max_active_rows: `Backend`.
        support: the ids that a sampler kept of each token's vocabulary: `Support`. Log-probs,
            ratios, entropies and the choice of tokens are then those of the truncated policy that
            sampled. Each of the three ways costs D products per id in the sets of its tokens.
        lengths, loss_type, clip_low, clip_high, dual_clip, denominator: as in `ratio_loss`.
        aggregation, kl, correction, entropy_bonus: as in `ratio_loss`. With `selected` the head
            knows the selected tokens alone, and an option that reads others raises.

    Returns:
        The loss, a fp32 scalar, and its metrics, 0-dim tensors without gradient. They are those of
        `ratio_loss` and the following. entropy/threshold is the lowest entropy among this rank's
        selected tokens, or the `threshold` given. entropy/selected_mean is over the selected
        tokens, and entropy/mean over the mask's, unless `selected` was given.

    An empty mask or selection gives a zero loss with zero gradients. A NaN entropy is selected in
    every way but `selected`, and makes the loss and the gradients NaN; so does a `threshold` that
    is a tensor of NaN.

    Raises:
        ValueError: as the functions it is made of; both `selected` and `threshold` given. One of
            them with Selection.which, Selection.scope or a group that has nothing to count. A
            tolerance without a threshold; which="random" with a vocab_group; scope="sequence" with
            a sequence_group.
    """
    options = LossOptions(
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        denominator=denominator,
        aggregation=aggregation,
        kl=kl,
        correction=correction,
        entropy_bonus=entropy_bonus,
        parallel=parallel,
    )
    check_choice_of_tokens(fraction, selected, threshold, selection, backend, options)
    if selected is not None and (reads := options.reads_beyond_selected(old_logprob is None)):
        raise ValueError(
            f"{reads} reads tokens that are not selected, of which the head knows nothing with "
            "selected=; select by fraction= or threshold="
        )
    if threshold is None and selection.threshold_tolerance != 0:
        raise ValueError(
            "Selection.threshold_tolerance has a meaning with threshold= only; "
            f"got {selection.threshold_tolerance}"
        )
    if not isinstance(head, Head):
        raise ValueError(f"head must be a Head; got {shown(head)}")
    head.check(sharded=parallel.vocab_group is not None)
    check_main_grad(backend.main_grad, head)
    check_tensor("mask", mask)
    check_masks(head.target, mask=mask, selected=selected)
    if lengths is not None:
        check_lengths(lengths, head.target, "target")
    mask = mask & head.valid
    least = None
    if threshold is not None:
        threshold = as_scalar(threshold, torch.float32, mask.device)
        least = threshold * (1 - selection.threshold_tolerance)
    if selected is None:
        found = _on_mask(head, mask, least, support, parallel.vocab_group, backend)
        entropy = found.entropy.detach()
        if least is None:
            ways = fraction, selection, lengths, options, backend.impl
            selected = _top(entropy, mask, *ways)
        else:
            selected = mask & ~(entropy < least)
            poison = torch.where(selected & least.isnan(), torch.nan, 1.0)
            found = found._replace(logprob=found.logprob * poison)
        means = {"entropy/mean": mask, "entropy/selected_mean": selected}
    else:
        selected = selected & mask
        if support is None:
            found = on_rows(head, selected, parallel.vocab_group, backend)
        else:
            found = _on_mask(head, selected, None, support, parallel.vocab_group, backend)
        entropy, means = found.entropy.detach(), {"entropy/selected_mean": selected}

    if not options.counts_left:
        options = replace(options, parallel=replace(parallel, group=None))
    given = found.logprob, old_logprob, advantage, mask, selected, found.entropy
    impl = backends.beside_head(backend.impl) if options.has_kernel else "auto"
    loss, metrics = loss_of_tokens(read_tokens(*given, lengths, options), options, impl)
    lowest = entropy.masked_fill(~selected, torch.inf).flatten()
    lowest = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).min()
    metrics["entropy/threshold"] = lowest if threshold is None else threshold
    for name, among in means.items():
        total = torch.where(among, entropy, 0.0).sum()
        metrics[name] = total / among.sum().clamp_min(1)
    return loss, metrics


def check_choice_of_tokens(
    fraction: float,
    selected: Tensor | None,
    threshold: float | Tensor | None,
    selection: Selection,
    backend: Backend,
    options: LossOptions,
) -> None:
    """The options beside those of the loss, each by itself and with each other."""
    check_kinds(selection=(selection, Selection), backend=(backend, Backend))
    check_fraction(fraction)
    check_threshold("threshold", threshold)
    parallel, which, scope = options.parallel, selection.which, selection.scope
    if parallel.vocab_group is not None and which == "random":
        raise ValueError(
            'which="random" draws on each rank by itself, but those of vocab_group must select the '
            "same tokens; draw once and give selected="
        )
    if parallel.sequence_group is not None and scope == "sequence":
        raise ValueError(
            'scope="sequence" ranks the tokens of a sequence that is on one rank, but those of '
            "sequence_group share it"
        )
    if selected is not None and threshold is not None:
        raise ValueError("selected and threshold both name the tokens; give one of them")
    if selected is None and threshold is None:
        return
    name = "threshold" if selected is None else "selected"
    group = None if options.counts_left else parallel.group
    if (which, scope, group) != ("top", "batch", None):
        raise ValueError(
            f"which, scope and group choose tokens by `fraction`; with {name}= they have no "
            f"meaning; got which={which!r}, scope={scope!r}, group={group!r}"
        )


def _top(
    entropy: Tensor,
    mask: Tensor,
    fraction: float,
    selection: Selection,
    lengths: Tensor | None,
    options: LossOptions,
    impl: str,
) -> Tensor:
    """The tokens that `fraction` selects."""
    which, scope, parallel = selection.which, selection.scope, options.parallel
    group = parallel.sequence_group if parallel.group is None else parallel.group
    # A sequence lives on one rank: the group is for the counts alone.
    group = None if scope == "sequence" and options.counts_left else group
    # The sort of a sequence has no kernel.
    impl = backends.beside_head(impl) if scope == "batch" else "auto"
    pick = partial(
        top_entropy_mask, fraction=fraction, which=which, scope=scope, group=group, impl=impl
    )
    if scope == "batch" or lengths is None:
        return pick(entropy, mask)
    ragged = in_rows(lengths, entropy)
    chosen_BL = pick(rows(entropy, ragged), rows(mask, ragged))
    return chosen_BL.reshape(-1)[ragged.index_T]


def _on_mask(
    head: Head,
    mask: Tensor,
    above: Tensor | None,
    support: Support | None,
    vocab_group: ProcessGroup | None,
    backend: Backend,
) -> LogprobEntropy:
    """The head on the tokens of the mask; zeros elsewhere."""
    return linear_logprob_entropy(
        replace(head, target=head.target.masked_fill(~mask, head.ignore_index)),
        vocab_group=vocab_group,
        keep_logits_above=above if support is None else None,
        max_active_rows=backend.max_active_rows,
        main_grad=backend.main_grad,
        support=support,
        impl=backend.impl,
    )


def on_rows(
    head: Head, rows: Tensor, vocab_group: ProcessGroup | None, backend: Backend
) -> LogprobEntropy:
    """The head on the tokens of `rows` alone; zeros elsewhere.

    Without max_active_rows it waits for a CUDA device once, for their number.
    """
    most, target = backend.max_active_rows, head.target
    index_R, real_R = _compact(rows.reshape(-1), most)
    some = head.at(index_R)
    if real_R is not None:
        some = replace(some, target=some.target.masked_fill(~real_R, head.ignore_index))
    device = "cuda" if head.hidden.is_cuda else "cpu"
    weight = head.weight
    fits = 4 * index_R.shape[0] * weight.shape[0] <= backends.STORED_LOGITS_BYTES[device]
    pays = weight.shape[1] * weight.element_size() >= LEAST_ROW_BYTES[device]
    keeps = torch.is_grad_enabled() and pays
    outputs = linear_logprob_entropy(
        some,
        vocab_group=vocab_group,
        keep_logits=keeps and fits,
        keep_logits_above=-math.inf if keeps and not fits else None,
        max_active_rows=most,
        main_grad=backend.main_grad,
        impl=backend.impl,
    )
    # Padding rows are zero: adding them changes nothing.
    zeros = [x.new_zeros(target.numel()).index_add(0, index_R, x) for x in outputs[:2]]
    if most is not None:
        # A factor, which where() would keep from the gradients.
        poison = torch.where(rows.sum() <= most, 1.0, torch.nan)
        zeros = [x * poison for x in zeros]
    logprob, entropy = (x.reshape(target.shape) for x in zeros)
    return LogprobEntropy(logprob, entropy, logsumexp=None)


def _compact(rows_T: Tensor, most: int | None) -> tuple[Tensor, Tensor | None]:
    """The numbers of the tokens of `rows_T`, filled up to `most`, and which of them are real.

    Each token comes once: where one came often, its gradients would be added one after the other.
    """
    if most is None:
        return rows_T.nonzero().squeeze(1), None
    if _rows.sees_values(rows_T.device) and (count := int(rows_T.sum())) > most:
        raise ValueError(f"max_active_rows is {most}; got {count} selected tokens")
    # At least one, so that what is beyond a bound of 0 has a row to be seen at.
    most = min(max(most, 1), rows_T.numel())
    index_R = rows_T.byte().argsort(descending=True, stable=True)[:most]
    return index_R, torch.arange(most, device=rows_T.device) < rows_T.sum()
