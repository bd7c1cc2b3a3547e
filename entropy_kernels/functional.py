"""The public functions: shapes and ValueErrors, then the op.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_kernels import ops, reference
from entropy_kernels._inputs import (
    cast_as_linear,
    check_head,
    check_like,
    check_main_grad,
    check_selection,
    check_statistics,
    kept_rows,
    per_token_temperature,
    resolve,
)
from entropy_kernels._ratio_kernel import has_kernel
from entropy_kernels.ratio_loss import LOSS_OPTIONS, beyond_kept, ratio_loss
from entropy_kernels.selection import top_entropy_mask

# Logits of rows that are trained on are kept for backward up to this size, and recomputed beyond
# it; and on a CPU below so many bytes a row of the weight: there a product of hidden states costs
# less than the first touch of the memory for it.
KEPT_LOGITS_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
LEAST_ROW_BYTES = {"cpu": 2048, "cuda": 0}


class LogprobEntropy(NamedTuple):
    """What the head knows of each token, fp32, in the shape of the targets; entropy in nats.

    What is below logsumexp is None unless asked for by `statistics`, and not differentiable.
    """

    logprob: Float[Tensor, "*tokens"]
    entropy: Float[Tensor, "*tokens"]
    logsumexp: Float[Tensor, "*tokens"]
    varentropy: Float[Tensor, "*tokens"] | None = None
    max_prob: Float[Tensor, "*tokens"] | None = None
    sum_p2: Float[Tensor, "*tokens"] | None = None
    sum_p2_logp: Float[Tensor, "*tokens"] | None = None


def linear_logprob_entropy(
    hidden: Float[Tensor, "*tokens D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "..."] = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    keep_logits: bool = False,
    keep_logits_above: float | Float[Tensor, ""] | None = None,
    max_active_rows: int | None = None,
    main_grad: Float[Tensor, "V D"] | None = None,
    statistics: Collection[str] = (),
    impl: str = "auto",
) -> LogprobEntropy:
    """Log-probability of each target and entropy of its distribution, from hidden states.

    z = softcap * tanh((h W^T + b) / softcap) / temperature,   p = softmax(z)
    logprob = log p[target],   entropy = -sum_j p_j log p_j   (arXiv 2506.01939, equation 1; nats)

    All three outputs are fp32 and differentiable with respect to hidden, weight and bias.
    Backward looks at the gradients that arrive: rows where they are exactly zero are dropped
    before any product, so a masked, clipped or zero-advantage token costs nothing. A frozen weight
    or detached hidden states skip their product.

    Args:
        hidden: last hidden states, fp32, bf16 or fp16.
        weight: the head's weight, same dtype; under autocast both are cast as by `linear`.
        target: token ids; rows with `ignore_index` give zeros and no gradient.
        temperature: > 0, one value or one a token; divides the logits of both outputs. It is not
            differentiated.
        softcap: bound of the logits, as in Gemma 2.
        keep_logits: keep fp32 logits [T, V] for backward, three products instead of four. For
            callers that have already dropped the rows they do not train on.
        keep_logits_above: an entropy in nats. Where forward has whole rows of logits at hand, it
            keeps those of rows of at least that entropy, in fp32, and backward reads them: 1 + 2f
            products instead of 1 + 3f where the fraction f of the rows above is trained on. It
            changes the cost and never which rows get a gradient: one without kept logits is
            recomputed. Only impl="triton" does so, where its table of tiles takes chunks of
            cuBLAS's products for it; the others recompute everything, as without it. There is room
            for the first 1 GiB of such rows (256 MiB on a CPU), at most for max_active_rows.
            Backward reads the rows that come before the first one, among those with a gradient,
            that was not kept.
        max_active_rows: a bound, known to the host, of the rows that will get a gradient: with it
            the Triton backward does not wait for the GPU to count them, and a CUDA graph can hold
            it. Where more rows get one, it gives NaN, the other backwards a ValueError.
        main_grad: fp32 [V, D], to which backward adds the weight's gradient; `weight.grad` then
            stays as it is. With impl="triton" the sum itself is never rounded to 16 bits.
            A frozen weight has no gradient to add: an error.
        statistics: of each distribution, in the same pass, as fields of the result, fp32 and not
            differentiable: "varentropy", Var_p(log p) = sum p (log p)^2 - entropy^2 (nats^2);
            "max_prob"; "sum_p2", sum p^2; "sum_p2_logp", sum p^2 log p (nats).
        impl: "auto", the fastest that is known to be right here; "cpu", the compiled kernels;
            "triton", the GPU kernels; "torch", blocks of torch.mm on any device; or "reference",
            the specification, also in fp64; it holds the logits.

    Precision: logits and their sums are fp32 whatever the inputs, gradients are accumulated in
    fp32 and rounded once. Entropy is log s - E[z - max], both terms non-negative; logprob <= 0.
    Of the statistics, all but varentropy are sums of terms of one sign. varentropy is a sum of two
    that are not negative, and keeps its digits at any small entropy (1e-6, 1e-12); where entropies
    are high it loses E[(z - max)^2] / varentropy of them, 20 for logits that are normally
    distributed.
    -inf logits (a masked vocabulary) are legal. NaN or inf in a row makes that row's outputs NaN.

    Never allocates [T, V] unless asked to by `keep_logits`, or for few tokens by
    `keep_logits_above`. Forward does not synchronise with a CUDA device; backward does once, for
    the number of active rows, unless `max_active_rows` is given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature <= 0; a target outside
            [0, V); an unknown name in `statistics`; main_grad with impl="reference" or a weight
            that requires no gradient; keep_logits together with keep_logits_above. On CUDA a bad
            target or temperature tensor gives that row NaN instead, because the check would
            synchronise.
    """
    name = resolve(impl, hidden.device)
    if name == "reference" and main_grad is not None:
        raise ValueError('main_grad is not written by impl="reference"')
    check_main_grad(main_grad, weight)
    hidden, weight, bias = cast_as_linear(hidden, weight, bias)
    check_head(hidden, weight, target, bias, softcap, fp64=name == "reference")
    scale = per_token_temperature(temperature, target)
    hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    check_statistics(statistics)
    if max_active_rows is not None and max_active_rows < 0:
        raise ValueError(f"max_active_rows must be >= 0 or None; got {max_active_rows}")
    kept = kept_rows(
        keep_logits_above,
        keep_logits,
        max_active_rows,
        name,
        hidden_TD,
        weight.shape[0],
        KEPT_LOGITS_BYTES["cuda" if hidden.is_cuda else "cpu"],
    )
    if name == "reference":
        head = (hidden_TD, weight, target_T, bias, scale, softcap, ignore_index)
        found = _reference(*head, bool(statistics))
    else:
        found = ops.linear_logprob_entropy(
            hidden_TD,
            weight,
            target_T,
            bias,
            scale,
            softcap,
            ignore_index,
            keep_logits,
            max_active_rows,
            main_grad,
            name,
            *kept,
            bool(statistics),
        )
    rows = {x: found[-1][ops.MOMENTS.index(x)].reshape(target.shape) for x in statistics}
    return LogprobEntropy(*(x.reshape(target.shape) for x in found[:3]), **rows)


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
    group: Any = None,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "..."] = 1.0,
    softcap: float | None = None,
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
        hidden, weight, target, bias, temperature, softcap, impl: as in `linear_logprob_entropy`.
            hidden[t] is the state that predicts target[t].
        old_logprob: log-probabilities under the sampling policy; None: on-policy, ratio 1.
        advantage: one a token, or one a sequence where target is [B, L].
        mask: the loss mask; false for prompt, padding and tool tokens, which never enter the
            threshold and on a CPU cost nothing.
        which, scope, group: as in `top_entropy_mask`.
        loss_options: keywords of `ratio_loss`, all but its entropy, which is the head's: loss_type,
            clip_low, clip_high, dual_clip, sequence_over, aggregation, denominator, num_sequences,
            token_weight, sampler_logprob, correction, correction_cap, correction_floor,
            reference_logprob, kl_coef, kl_type, kl_on, entropy_coef, entropy_on. With `selected`
            the head knows of the selected tokens alone, and one that reads others raises.
        max_active_rows, main_grad: as in `linear_logprob_entropy`. With a bound of the selected
            tokens, such as ceil(fraction * n) of a batch whose n is known to the host, nothing
            waits for a GPU. More selected tokens than that give NaN there, a ValueError on a CPU.

    Returns:
        The loss, a fp32 scalar, and its metrics, 0-dim tensors without gradient: those of
        `ratio_loss`; entropy/threshold, the lowest entropy among this rank's selected tokens, or
        the `threshold` given; entropy/kept_mean over the selected tokens; and entropy/mean over
        the mask's, unless `selected` was given.

    An empty mask or selection gives a zero loss with zero gradients.

    Raises:
        ValueError: as the functions it is made of; both `selected` and `threshold` given, or one of
            them together with which, scope or group; an unknown option.
    """
    check_selection(selected, threshold, which, scope, group)
    _check_loss_options(loss_options, selected is not None, old_logprob is None)
    check_like(target, mask=mask, selected=selected)
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=hidden.device)
    head: dict[str, Any] = {
        "bias": bias,
        "softcap": softcap,
        "max_active_rows": max_active_rows,
        "main_grad": main_grad,
        "impl": impl,
    }
    if selected is not None:
        selected = selected & mask
        found = _on_rows(hidden, weight, target, selected, temperature, head)
    else:
        found = linear_logprob_entropy(
            hidden,
            weight,
            target.masked_fill(~mask, -100),
            temperature=temperature,
            keep_logits_above=threshold,
            **head,
        )
    entropy = found.entropy.detach()
    means = {"entropy/mean": mask} if selected is None else {}
    if threshold is not None:
        selected = mask & (entropy >= threshold)
    elif selected is None:
        selected = top_entropy_mask(entropy, mask, fraction, which=which, scope=scope, group=group)

    loss, metrics = ratio_loss(
        found.logprob,
        old_logprob,
        advantage,
        mask,
        selected=selected,
        entropy=found.entropy,
        impl=_loss_impl(impl, loss_options),
        **loss_options,
    )
    lowest = entropy.masked_fill(~selected, torch.inf).flatten()
    lowest = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).min()
    metrics["entropy/threshold"] = lowest if threshold is None else threshold
    for name, among in (means | {"entropy/kept_mean": selected}).items():
        total = torch.where(among, entropy, 0.0).sum()
        metrics[name] = total / among.sum().clamp_min(1)
    return loss, metrics


def _check_loss_options(options: dict[str, Any], rows_known: bool, on_policy: bool) -> None:
    unknown = sorted(set(options) - LOSS_OPTIONS)
    if unknown:
        raise ValueError(
            f"unknown options {', '.join(unknown)}; those of the loss are "
            f"{', '.join(sorted(LOSS_OPTIONS))}"
        )
    reads = beyond_kept(on_policy, **options) if rows_known else None
    if reads is not None:
        raise ValueError(
            f"{reads} reads tokens that are not selected, of which the head knows nothing with "
            "selected=; select by fraction= or threshold="
        )


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
    fits = 4 * index_R.shape[0] * weight.shape[0] <= KEPT_LOGITS_BYTES[device]
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
        fits = rows.sum() <= head["max_active_rows"]
        zeros = [torch.where(fits, x, torch.nan) for x in zeros]
    return LogprobEntropy(*(x.reshape(target.shape) for x in zeros))


def _compact(rows_T: Tensor, target_T: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Numbers and targets of the tokens of `rows_T`, filled up to `most` with ignored ones."""
    if most is None:
        index_R = rows_T.nonzero().squeeze(1)
        return index_R, target_T[index_R]
    if not rows_T.is_cuda and (count := int(rows_T.sum())) > most:
        raise ValueError(f"max_active_rows is {most}; got {count} selected tokens")
    most = min(most, rows_T.numel())
    index_R = torch.nonzero_static(rows_T, size=most, fill_value=0).squeeze(1)
    real_R = torch.arange(most, device=rows_T.device) < rows_T.sum()
    return index_R, target_T[index_R].masked_fill(~real_R, -100)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, in fp64 for fp64 inputs and in fp32 for all others; last as in the op."""
    ops.check_values(target, temperature, weight.shape[0], ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head = (
        hidden.to(dtype),
        weight.to(dtype),
        target,
        None if bias is None else bias.to(dtype),
        1.0 if temperature is None else temperature,
        softcap,
        ignore_index,
    )
    with torch.no_grad():
        moments = torch.stack(reference.head_statistics(*head)) if statistics else hidden[:0]
    return *reference.linear_logprob_entropy(*head), moments
