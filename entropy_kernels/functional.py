"""The public functions: shapes and ValueErrors, then the op.

T tokens, D hidden, V vocabulary, B sequences, L their length.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import _vocab_parallel, ops, reference
from ._inputs import (
    cast_as_linear,
    check_dtypes,
    check_head,
    check_head_options,
    check_statistics,
    kept_rows,
    per_token_temperature,
    resolve,
)
from ._shapes import Float, Int

# Logits of rows that are trained on are kept for backward up to this size, and recomputed beyond
# it.
KEPT_LOGITS_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


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
    vocab_group: ProcessGroup | None = None,
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
        vocab_group: V is divided among the ranks of this process group: weight, bias and main_grad
            are this rank's rows, in the order of ranks, any number of them. hidden and all else
            are the same on every rank, targets count over the whole vocabulary. Every rank has
            the outputs of the whole vocabulary and all of hidden's gradient; the gradients of
            weight and bias are of its rows. Every rank runs backward, with the same gradients.
        keep_logits: keep fp32 logits [T, V] for backward, three products instead of four. For
            callers that have already dropped the rows they do not train on.
        keep_logits_above: an entropy in nats. Where forward has whole rows of logits at hand, it
            keeps those of rows of at least that entropy, in fp32, and backward reads them: 1 + 2f
            products instead of 1 + 3f where the fraction f of the rows above is trained on. It
            changes the cost and never which rows get a gradient: one without kept logits is
            recomputed. Only impl="triton" does so, where its table of tiles takes chunks of
            cuBLAS's products for it; the others recompute everything, as without it, and so does a
            vocab_group, where no rank knows a row's entropy in time. There is room
            for the first 1 GiB of such rows (256 MiB on a CPU), at most for max_active_rows.
            Backward reads the rows that come before the first one, among those with a gradient,
            that was not kept. A NaN entropy is not kept, a tensor of NaN keeps none: both are
            recomputed, and are NaN then.
        max_active_rows: a bound, known to the host, of the rows that will get a gradient: with it
            the Triton backward does not wait for the GPU to count them, and a CUDA graph can hold
            it. Where more rows get one, all gradients are NaN; the "cpu" and "torch" backwards
            raise a ValueError, and the reference takes any number.
        main_grad: [V, D] of the caller's, contiguous, fp32 or of weight's dtype. Backward adds the
            weight's gradient to it, in fp32 and rounded once, and allocates no [V, D] of its own.
            It may be `weight.grad`, kept by `zero_grad(set_to_none=False)`: None, as at the first
            step, is no option. Or it is a fp32 sum over micro-batches, such as Megatron's
            `weight.main_grad`, which is never rounded to 16 bits. Autograd gets no gradient for
            weight: what weight was computed from gets none, and weight's hooks are called with
            None. DDP averages `weight.grad` as ever; another buffer is the caller's to average, and
            FSDP's gathered weights keep no gradient to add to. A second backward through the graph
            adds again; so does one for hidden's gradient alone, but for the reference's. A backward
            that is interrupted has added a part.
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
            [0, V); an unknown name in `statistics`; vocab_group with impl="reference"; main_grad
            with a weight that requires no gradient, or in the memory of hidden, weight or bias;
            keep_logits together with keep_logits_above; ranks of vocab_group with different numbers
            of tokens. On CUDA a bad target or temperature tensor makes that row's outputs NaN
            instead, and the gradients that come of them, because the check would synchronise; that
            of the numbers of tokens is left out. torch.compile leaves out that of memory.
    """
    check_head_options(
        softcap=softcap,
        ignore_index=ignore_index,
        vocab_group=vocab_group,
        keep_logits=keep_logits,
        max_active_rows=max_active_rows,
        impl=impl,
    )
    check_head(hidden, weight, target, bias, main_grad, sharded=vocab_group is not None)
    name = resolve(impl, hidden.device)
    if name == "reference" and vocab_group is not None:
        raise ValueError('impl="reference" holds all logits; it has no vocab_group')
    hidden, weight, bias = cast_as_linear(hidden, weight, bias)
    check_dtypes(hidden, weight, bias, fp64=name == "reference")
    scale = per_token_temperature(temperature, target)
    hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    check_statistics(statistics)
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
        found = _reference(*head, main_grad, bool(statistics))
    elif vocab_group is not None:
        found = _vocab_parallel.linear_logprob_entropy(
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
            bool(statistics),
            vocab_group,
        )
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
    rows = {x: found[-1][ops.STATISTICS.index(x)].reshape(target.shape) for x in statistics}
    return LogprobEntropy(*(x.reshape(target.shape) for x in found[:3]), **rows)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    main_grad: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, in fp64 for fp64 inputs and in fp32 for all others; last as in the op."""
    ops.check_values(target, temperature, weight.shape[0], ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight = weight.to(dtype)
    if main_grad is not None:
        weight = _GradientInto.apply(weight, main_grad)
    head = (
        hidden.to(dtype),
        weight,
        target,
        None if bias is None else bias.to(dtype),
        1.0 if temperature is None else temperature,
        softcap,
        ignore_index,
    )
    with torch.no_grad():
        moments = torch.stack(reference.head_statistics(*head)) if statistics else hidden[:0]
    return *reference.linear_logprob_entropy(*head), moments


class _GradientInto(torch.autograd.Function):
    """The weight, whose gradient is added to `main_grad` and reaches nothing else."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.main_grad += gradient
        return None, None
