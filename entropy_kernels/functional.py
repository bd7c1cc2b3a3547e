"""The public functions: shapes and ValueErrors, then the op.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

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
    kept_rows,
    per_token_temperature,
    resolve,
)
from entropy_kernels.losses import ratio_loss
from entropy_kernels.selection import top_entropy_mask

# Logits of rows that are trained on are kept for backward up to this size, and recomputed beyond
# it.
KEPT_LOGITS_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


class LogprobEntropy(NamedTuple):
    """What the head knows of each token, fp32, in the shape of the targets; entropy in nats."""

    logprob: Float[Tensor, "*tokens"]
    entropy: Float[Tensor, "*tokens"]
    logsumexp: Float[Tensor, "*tokens"]


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
        impl: "auto", the fastest that is known to be right here; "cpu", the compiled kernels;
            "triton", the GPU kernels; "torch", blocks of torch.mm on any device; or "reference",
            the specification, also in fp64; it holds the logits.

    Precision: logits and their sums are fp32 whatever the inputs, gradients are accumulated in
    fp32 and rounded once. Entropy is log s - E[z - max], both terms non-negative; logprob <= 0.
    -inf logits (a masked vocabulary) are legal. NaN or inf in a row makes that row's outputs NaN.

    Never allocates [T, V] unless asked to by `keep_logits`, or for few tokens by
    `keep_logits_above`. Forward does not synchronise with a CUDA device; backward does once, for
    the number of active rows, unless `max_active_rows` is given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature <= 0; a target outside
            [0, V); main_grad with impl="reference" or a weight that requires no gradient;
            keep_logits together with keep_logits_above. On CUDA a bad target or temperature tensor
            gives that row NaN instead, because the check would synchronise.
    """
    name = resolve(impl, hidden.device)
    if name == "reference" and main_grad is not None:
        raise ValueError('main_grad is not written by impl="reference"')
    check_main_grad(main_grad, weight)
    hidden, weight, bias = cast_as_linear(hidden, weight, bias)
    check_head(hidden, weight, target, bias, softcap, fp64=name == "reference")
    scale = per_token_temperature(temperature, target)
    hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
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
        found = _reference(hidden_TD, weight, target_T, bias, scale, softcap, ignore_index)
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
        )
    return LogprobEntropy(*(x.reshape(target.shape) for x in found[:3]))


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
    loss_type: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    denominator: str | float | Tensor = "selected",
    num_sequences: float | Tensor | None = None,
    max_active_rows: int | None = None,
    main_grad: Float[Tensor, "V D"] | None = None,
    impl: str = "auto",
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
      fp32 logits fit into 256 MiB (on a GPU 1 GiB); beyond, they are recomputed, a fourth product.

    Args:
        hidden, weight, target, bias, temperature, softcap, impl: as in `linear_logprob_entropy`.
            hidden[t] is the state that predicts target[t].
        old_logprob: log-probabilities under the sampling policy; None: on-policy, ratio 1.
        advantage: one a token, or one a sequence where target is [B, L].
        mask: the loss mask; false for prompt, padding and tool tokens, which never enter the
            threshold and on a CPU cost nothing.
        which, scope, group: as in `top_entropy_mask`.
        loss_type, clip_low, clip_high, dual_clip, denominator, num_sequences: as in `ratio_loss`.
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
            them together with which, scope or group.
    """
    check_selection(selected, threshold, which, scope, group)
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
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        denominator=denominator,
        num_sequences=num_sequences,
        impl="torch" if impl == "reference" else impl,
    )
    lowest = entropy.masked_fill(~selected, torch.inf).flatten()
    lowest = torch.cat([lowest, lowest.new_full((1,), torch.inf)]).min()
    metrics["entropy/threshold"] = lowest if threshold is None else threshold
    for name, among in (means | {"entropy/kept_mean": selected}).items():
        total = torch.where(among, entropy, 0.0).sum()
        metrics[name] = total / among.sum().clamp_min(1)
    return loss, metrics


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
    kept_bytes = 4 * index_R.shape[0] * weight.shape[0]
    most_bytes = KEPT_LOGITS_BYTES["cuda" if hidden.is_cuda else "cpu"]
    found = linear_logprob_entropy(
        hidden.reshape(-1, hidden.shape[-1])[index_R],
        weight,
        target_R,
        temperature=temperature,
        keep_logits=torch.is_grad_enabled() and kept_bytes <= most_bytes,
        **head,
    )
    # Padding rows are zero and point at any token: adding them changes nothing.
    zeros = [x.new_zeros(target.numel()).index_add(0, index_R, x) for x in found]
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in fp64 for fp64 inputs and in fp32 for all others."""
    ops.check_values(target, temperature, weight.shape[0], ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return reference.linear_logprob_entropy(
        hidden.to(dtype),
        weight.to(dtype),
        target,
        None if bias is None else bias.to(dtype),
        1.0 if temperature is None else temperature,
        softcap,
        ignore_index,
    )
