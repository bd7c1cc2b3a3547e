"""The head as a function: log-probability and entropy per token, without [T, V] logits.

T tokens, D hidden, V vocabulary.
"""

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _token_ids, _vocab_parallel, backends, ops, reference
from ._arguments import as_scalar, check_flag, check_group, check_threshold, check_whole, shown
from ._main_grad import GradientInto, check_main_grad
from ._rows import OF_SETS, STATISTICS, check_statistics, check_values, wanted
from ._shapes import Bool, Float, Int
from .head import Head
from .support import Support
from .verification.question import options_of


class LogprobEntropy(NamedTuple):
    """The head's outputs per token, fp32, in the shape of the targets; entropy in nats.

    The fields after logsumexp are None unless `statistics` names them, and not differentiable.
    is_top1 is bool. The last, [*tokens, K], is None unless `token_ids` are given, and
    differentiable. logsumexp is None with a support, whose sets of one form no logit.
    """

    logprob: Float[Tensor, "*tokens"]
    entropy: Float[Tensor, "*tokens"]
    logsumexp: Float[Tensor, "*tokens"] | None
    varentropy: Float[Tensor, "*tokens"] | None = None
    max_prob: Float[Tensor, "*tokens"] | None = None
    sum_p2: Float[Tensor, "*tokens"] | None = None
    sum_p2_logp: Float[Tensor, "*tokens"] | None = None
    mean_logit: Float[Tensor, "*tokens"] | None = None
    is_top1: Bool[Tensor, "*tokens"] | None = None
    token_logprobs: Float[Tensor, "*tokens K"] | None = None


def linear_logprob_entropy(
    head: Head,
    *,
    vocab_group: ProcessGroup | None = None,
    keep_logits: bool = False,
    keep_logits_above: float | Float[Tensor, ""] | None = None,
    max_active_rows: int | None = None,
    main_grad: Float[Tensor, "V D"] | None = None,
    statistics: Collection[str] = (),
    support: Support | None = None,
    token_ids: Int[Tensor, " K"] | Int[Tensor, "*tokens K"] | None = None,
    impl: str = "auto",
) -> LogprobEntropy:
    """Log-probability of each target and entropy of its distribution, from hidden states.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature,   p = softmax(z)
    logprob = log p[target],   entropy = -sum_j p_j log p_j   (arXiv 2506.01939, equation 1; nats)

    All three outputs are fp32 and differentiable with respect to hidden, weight and bias.
    Backward drops the rows whose incoming gradients are exactly zero before any product, so a
    masked, clipped or zero-advantage token costs nothing. A frozen weight or detached hidden
    states skip their product.

    Args:
        head: hidden states, weight, targets and what forms the logits: `Head`. Tokens whose target
            is its ignore_index give zeros and no gradient.
        vocab_group: the process group among whose ranks V is divided. weight, bias and main_grad
            are this rank's rows, any number of them, in the order of ranks. All other arguments
            are the same on every rank, and targets count over the whole vocabulary. Every rank
            gets the outputs of the whole vocabulary and all of hidden's gradient, but only its own
            rows' gradients of weight and bias. Every rank runs backward, with the same gradients.
        keep_logits: stores fp32 logits [T, V] for backward, which then needs three products
            instead of four. It suits callers that have already dropped the rows they do not train.
        keep_logits_above: an entropy in nats. Forward stores the fp32 logits of the rows of at
            least that entropy where it has whole rows at hand. If the fraction f of the rows is
            trained, 1 + 2f products are needed instead of 1 + 3f. The option changes the cost and
            never which rows get a gradient. "triton" and "cuda" store, where the table of tiles
            takes chunks of cuBLAS's products; the others recompute everything, and so do
            vocab_group and token_ids. There is room for 1 GiB of such rows (256 MiB on a CPU) and
            at most max_active_rows of them. Backward recomputes from the first active row that was
            not stored. A row of NaN entropy is not stored, and a tensor of NaN stores none.
        max_active_rows: an upper bound, known to the host, of the rows that will get a gradient.
            With it backward does not wait for a GPU to count them, and a CUDA graph can hold it. If
            more rows get one, all gradients are NaN. On a CPU the "cpu" and "torch" backwards raise
            a ValueError instead, and the reference takes any number.
        main_grad: the caller's contiguous buffer [V, D], fp32 or of weight's dtype. Backward adds
            the weight's gradient to it in fp32, rounds once, and allocates no [V, D] of its own.
            `weight.grad` fits if `zero_grad(set_to_none=False)` keeps it. So does a fp32 sum over
            micro-batches, such as Megatron's `weight.main_grad`. Autograd gets no gradient for
            weight: what weight was computed from gets none, and weight's hooks see None. DDP
            averages `weight.grad` as ever; the caller averages any other buffer. FSDP's gathered
            weights keep no gradient to add to. Every backward through the graph adds again, also
            one for hidden's gradient alone, except the reference's. An interrupted backward has
            added a part.
        statistics: names of further outputs of the same pass, not differentiable and fp32 but for
            the last: "varentropy", Var_p(log p) = sum p (log p)^2 - entropy^2 (nats^2); "max_prob";
            "sum_p2", sum p^2; "sum_p2_logp", sum p^2 log p (nats); "mean_logit", sum z / V (nats);
            "is_top1", bool, whether z[target] is the largest of z and the first of equals.
        support: the ids that top-k, top-p or min-p left to each token: `Support`. The distribution,
            its entropy and statistics are then over each token's set, where is_top1 takes the
            lowest id of equals. mean_logit is refused: sets of one form no logit. A forward costs D
            multiplications per id, and a backward twice as many for the tokens with a gradient. A
            set of one has log-prob 0 and entropy 0, no gradient and no cost. The weight's gradient
            is zero outside of the sets. Repeats are refused where values are checked, as below.
        token_ids: int64 or int32 ids whose log-probabilities are wanted in every row, [K]; or ids
            per token, such as a teacher's top k. They may repeat. The target's is `logprob`, to the
            bit. Forward costs D multiplications per id, and a backward twice as many more for the
            tokens with a gradient. A token whose gradients add up to 0, as those of a log-ratio do,
            costs its ids alone. Ids per token of a 16-bit weight hold fp32 [V, D] in backward,
            which a main_grad of fp32 spares.
        impl: "auto", the fastest backend known to be right here; "cpu", the compiled kernels;
            "triton", the GPU kernels; "torch", blocks of torch.mm on any device. "cuda" takes the
            kernels of csrc/cuda, and Triton's for what those lack, told once. "reference", the
            specification, holds the logits and takes fp64 too.

    Precision: logits and their sums are fp32 whatever the inputs; gradients are accumulated in
    fp32 and rounded once. Entropy is log s - E[z - max], both terms non-negative; logprob <= 0.
    Gradients of chosen ids are computed from 1 - p where p is near 1. For 16-bit products p of ids
    per token is rounded before their own gradient is added, but the likeliest one's.
    All statistics but varentropy are sums of terms of one sign. varentropy is a sum of two
    non-negative terms and keeps its digits at any small entropy (1e-6, 1e-12). At high entropies
    its relative error grows by E[(z - max)^2] / varentropy, 20 for normally distributed logits.
    -inf logits (a masked vocabulary) are legal. NaN or inf in a row makes that row's outputs NaN,
    and its is_top1 false.

    Never allocates [T, V] unless `keep_logits` asks for it, or `keep_logits_above` for few tokens.
    Forward does not synchronise with a CUDA device. Backward does once, for the number of active
    rows, unless `max_active_rows` is given, and twice with shared `token_ids`. With a support or
    ids per token the torch path does in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature or logit_scale <= 0; a
            target or id outside [0, V); an unknown name in `statistics`; a set without its target.
            "mean_logit", keep_logits, keep_logits_above or token_ids with a support. vocab_group
            with impl="reference" or token_ids; keep_logits together with keep_logits_above; ranks
            of vocab_group with different numbers of tokens. A main_grad whose weight requires no
            gradient, or in the memory of hidden, weight or bias. The checks that would synchronise
            with a GPU are left out there: a bad target or temperature tensor makes that row's
            outputs and their gradients NaN, and numbers of tokens are not compared. A bad id makes
            its log-prob NaN, and its row's gradients where one arrives at it. torch.compile leaves
            out the check of main_grad's memory.
    """
    if not isinstance(head, Head):
        raise ValueError(f"head must be a Head; got {shown(head)}")
    check_options(
        vocab_group=vocab_group,
        keep_logits=keep_logits,
        max_active_rows=max_active_rows,
        impl=impl,
    )
    head.check(sharded=vocab_group is not None)
    check_main_grad(main_grad, head)
    check_statistics(statistics)
    shape = head.target.shape
    ids = None if token_ids is None else _token_ids.flat(token_ids, head)
    head = head.flat(fp64=impl == "reference")
    run: dict[str, Any] = {
        "max_active_rows": max_active_rows,
        "main_grad": main_grad,
        "statistics_wanted": wanted(statistics),
    }
    if support is None:
        stored = keep_logits, keep_logits_above
        outputs = _on_vocabulary(head, impl, vocab_group, stored, run, statistics, ids)
    else:
        if ids is not None:
            raise ValueError("token_ids have no meaning with a support, which names its own ids")
        if keep_logits or keep_logits_above is not None:
            raise ValueError("keep_logits and keep_logits_above have no meaning with a support")
        if not set(statistics) <= {*OF_SETS}:
            raise ValueError(
                f"with a support, statistics must be out of {', '.join(OF_SETS)}; got "
                f"{', '.join(sorted({*statistics} - {*OF_SETS}))}: sets of one form no logit"
            )
        outputs = _on_support(head, support, impl, vocab_group, run)
    *per_token, rows, chosen = outputs if ids is not None else (*outputs, None)
    assert rows is not None
    named = {name: rows[STATISTICS.index(name)].reshape(shape) for name in statistics}
    if "is_top1" in named:
        named["is_top1"] = named["is_top1"] == 1
    logprob, entropy, logsumexp = (None if x is None else x.reshape(shape) for x in per_token[:3])
    assert logprob is not None
    assert entropy is not None
    if chosen is not None:
        chosen = chosen.reshape(*shape, chosen.shape[1])
    return LogprobEntropy(logprob, entropy, logsumexp, **named, token_logprobs=chosen)


def _on_vocabulary(
    head: Head,
    impl: str,
    group: ProcessGroup | None,
    stored: tuple[bool, float | Tensor | None],
    run: dict[str, Any],
    statistics: Collection[str],
    ids: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """logprob, entropy, logsumexp, what backward alone reads, and statistics, of a flat head.

    Then the log-probs of flat `ids`, where there are any.
    """
    keep_logits, above = stored
    name = backends.resolve_head(
        impl,
        head,
        keep_logits=keep_logits,
        stored=above is not None,
        statistics_wanted=run["statistics_wanted"],
        group=group,
    )
    check_statistics(statistics, name)
    store_above, store_rows = _room(above, keep_logits, run["max_active_rows"], name, head)
    if name == "reference":
        if group is not None:
            raise ValueError('impl="reference" holds all logits; it has no vocab_group')
        return _reference(head, run["main_grad"], bool(statistics), ids=ids)
    run = run | {"impl": name, "keep_logits": keep_logits}
    if group is not None:
        if ids is not None:
            raise ValueError(
                "token_ids need the whole vocabulary; got a vocab_group, which divides it"
            )
        check_statistics(statistics, "vocab_group")
        return _vocab_parallel.linear_logprob_entropy(head, group, **run)
    run = run | {"store_above": store_above, "store_rows": store_rows}
    if ids is not None:
        from . import _token_logprobs  # as below

        run |= {"store_above": None, "store_rows": 0}
        return _token_logprobs.linear_logprob_entropy(head, ids, impl, _token_ids.Run(run))
    return ops.linear_logprob_entropy(**ops.in_schema(head), **run)


def _on_support(
    head: Head, support: Support, impl: str, group: ProcessGroup | None, run: dict[str, Any]
) -> tuple[Tensor | None, ...]:
    """logprob, entropy, no logsumexp, and statistics, of a flat head over the sets."""
    if not isinstance(support, Support):
        raise ValueError(f"support must be a Support or None; got {shown(support)}")
    support.check(head.target.shape[0], head.target.device)
    name = backends.resolve("support", impl, head.hidden.device, head.hidden.dtype)
    if name == "reference":
        if group is not None:
            raise ValueError('impl="reference" holds all logits; it has no vocab_group')
        logprob, entropy, _, rows = _reference(
            head, run["main_grad"], bool(run["statistics_wanted"]), support
        )
        return logprob, entropy, None, rows
    from . import _support_head  # whose import brings torch.compile's

    support_run = _support_head.Run(**run, impl=name, group=group)
    logprob, entropy, rows = _support_head.linear_logprob_entropy(head, support, support_run)
    return logprob, entropy, None, rows


def check_options(
    *,
    vocab_group: object = None,
    keep_logits: bool = False,
    max_active_rows: int | None = None,
    impl: str = "auto",
) -> None:
    """Each option beside the head by itself."""
    check_group("vocab_group", vocab_group)
    check_flag("keep_logits", keep_logits)
    if max_active_rows is not None:
        check_whole("max_active_rows", max_active_rows, 0, "an int >= 0 or None")
    backends.check_impl(impl)


def _room(
    above: float | Tensor | None,
    keep_logits: bool,
    max_active_rows: int | None,
    impl: str,
    head: Head,
) -> tuple[Tensor | None, int]:
    """The threshold, fp32 [], and how many rows' logits there is room for; or None and 0.

    None where that backend stores no rows, here or at all, or no backward can follow.
    """
    if above is None:
        return None, 0
    device = head.hidden.device
    if keep_logits:
        raise ValueError("keep_logits keeps all rows; keep_logits_above has no meaning with it")
    if isinstance(above, Tensor) and (above.numel() != 1 or above.device != device):
        raise ValueError(
            f"keep_logits_above must be one value on {device}, like hidden; "
            f"got {tuple(above.shape)} on {above.device}"
        )
    check_threshold("keep_logits_above", above)
    most_bytes = backends.STORED_LOGITS_BYTES["cuda" if head.hidden.is_cuda else "cpu"]
    rows = min(head.hidden.shape[0], most_bytes // (4 * max(head.weight.shape[0], 1)))
    rows = rows if max_active_rows is None else min(rows, max_active_rows)
    if rows == 0 or impl not in ("triton", "cuda") or not torch.is_grad_enabled():
        return None, 0
    # An index is a constant to torch.compile, the size of a dynamic shape is not.
    hidden, options = operator.index(head.hidden.shape[1]), options_of(head, stored=True)
    if not backends.stores_rows(device, head.hidden.dtype, hidden, options):
        return None, 0
    return as_scalar(above, torch.float32, device), rows


def _reference(
    head: Head,
    main_grad: Tensor | None,
    with_statistics: bool,
    support: Support | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The specification, in fp64 for fp64 inputs and in fp32 for all others; last as in the op."""
    check_values(head, head.weight.shape[0])
    if support is not None:
        support.check_values(head.target, head.valid, head.weight.shape[0])
    if ids is not None:
        _token_ids.check_values(ids, head)
    dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    weight = head.weight.to(dtype)
    if main_grad is not None:
        weight = GradientInto.apply(weight, main_grad)
    bias = None if head.bias is None else head.bias.to(dtype)
    head = replace(head, hidden=head.hidden.to(dtype), weight=weight, bias=bias)
    rows = head.hidden[:0]
    if with_statistics:
        with torch.no_grad():
            rows = torch.stack(reference.head_statistics(head, support))
    found = *reference.linear_logprob_entropy(head, support), rows
    return found if ids is None else (*found, reference.token_logprobs(head, ids))
