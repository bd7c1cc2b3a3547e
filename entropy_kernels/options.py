"""Options of the losses that belong together: frozen dataclasses that check themselves.

B sequences. Every error is a ValueError that names the field, what came and what was wanted.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import (
    check_choice,
    check_coefficient,
    check_count,
    check_finite,
    check_group,
    check_number,
    check_tensor,
    check_whole,
)
from ._shapes import Bool, Float
from .backends import check_impl
from .loss_terms import AGGREGATIONS, CORRECTIONS, KL_TYPES

ON = ("selected", "all")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens `fraction` and `threshold` select, beyond their number."""

    which: str = "top"
    """The "top" entropies (arXiv 2506.01939), the "bottom" or "random" tokens: its ablations."""
    scope: str = "batch"
    """`fraction` is taken of the whole "batch", or of each "sequence" (arXiv 2507.15778)."""
    threshold_tolerance: float = 0.0
    """Relative: an entropy of at least threshold (1 - tolerance) ties with `threshold`, and is
    selected. It covers the rounding between two computations of one entropy, such as 1e-5."""

    def __post_init__(self) -> None:
        check_choice("Selection.which", self.which, ("top", "bottom", "random"))
        check_choice("Selection.scope", self.scope, ("batch", "sequence"))
        wanted = "a number in [0, 1)"
        check_number(
            "Selection.threshold_tolerance", self.threshold_tolerance, wanted, lambda x: 0 <= x < 1
        )


@dataclass(frozen=True, eq=False)
class Aggregation:
    """How the losses of tokens become one number; `denominator` is the loss's own parameter."""

    type: str | None = None
    """None, the loss's own; or "token-mean", "seq-mean-token-mean", "seq-mean-token-sum",
    "seq-mean-token-sum-norm" (verl's names)."""
    num_sequences: float | Tensor | None = None
    """The number of sequences in the whole step, which the seq-mean types divide by; where DDP or
    FSDP2 averages gradients, its mean per rank. None counts those with a token of the mask."""
    sequence_over: str | None = None
    """The tokens that a loss over sequences sums log-ratios over: "all" of the mask (default of
    gspo, gspo_token, luspo, vespo) or the "selected" (default of gmpo). A loss_type of your own
    gets these tokens as its mask. Only selected tokens get a gradient either way."""
    token_weight: Float[Tensor, "*tokens"] | Bool[Tensor, "*tokens"] | None = None
    """w_t >= 0, which multiplies the token's loss, such as a soft mask; the denominator is as
    without."""

    def __post_init__(self) -> None:
        check_choice("Aggregation.type", self.type, (None, *AGGREGATIONS))
        check_choice("Aggregation.sequence_over", self.sequence_over, (None, "all", "selected"))
        if self.num_sequences is not None:
            check_count("Aggregation.num_sequences", self.num_sequences)
        if self.token_weight is not None:
            check_tensor("Aggregation.token_weight", self.token_weight)


@dataclass(frozen=True, eq=False)
class KL:
    """A penalty coef KL_t, an estimate of KL(pi || reference); without coef a metric alone."""

    coef: float | Float[Tensor, "..."] = 0.0
    """One number, or one per token."""
    type: str = "k3"
    """"k1", "k2", "k3", "abs" (http://joschu.net/blog/kl-approx.html); "k1+" and "k3+", with the
    gradient of k2; "k3_corrected", times the ratio (DeepSeek-V3.2)."""
    on: str = "selected"
    """The "selected" tokens, or "all" of the mask. With "all" every row gets a gradient and the
    head's backward is dense. Words as denominator then count all of the mask for the KL."""
    reference_logprob: Float[Tensor, "*tokens"] | None = None
    """The log-probabilities of the reference policy, without gradient; a coef needs them."""

    def __post_init__(self) -> None:
        _check_number_or_tensor("KL.coef", self.coef)
        check_choice("KL.type", self.type, KL_TYPES)
        check_choice("KL.on", self.on, ON)
        if self.reference_logprob is not None:
            check_tensor("KL.reference_logprob", self.reference_logprob, "floating-point")


@dataclass(frozen=True, eq=False)
class Correction:
    """A weight w_t of the token's loss, as the engine that sampled differs from the policy.

    With r_t = pi_old / pi_sampler it is w_t = c(r_t), where c is what `type` makes of a ratio. It
    multiplies the loss of the tokens, not their KL, and not the denominator.

    Where old_logprob is the sampler's own, the loss has the ratio to the sampler already. So with
    of="current", r_t = sg(pi) / pi_sampler and w_t = c(r_t) / r_t: the weight and the ratio of the
    loss together are c(r_t). "tis" then truncates the ratio, and "mis" keeps it or drops the token.
    """

    type: str | None = None
    """"tis" truncates r_t to [floor, cap] (fengyao.notion.site/off-policy-rl); "mis" makes it 0
    outside (IcePop, arXiv 2510.18855). "sequence_truncate" and "sequence_mask" do so with the
    product over the sequence's mask (richardli.xyz/rl-collapse). None gives metrics alone."""
    cap: float | None = 2.0
    """The upper bound of r_t; None: no bound."""
    floor: float | None = None
    """The lower bound of r_t; None: no bound."""
    sampler_logprob: Float[Tensor, "*tokens"] | None = None
    """The log-probabilities that the engine reported, without gradient; a type needs them. NaN, a
    token that it did not report, is not corrected."""
    of: str = "old"
    """Whose probability is over the sampler's: that of the "old" policy, or the "current" one's,
    without gradient, where old_logprob is the sampler's. A type then needs old_logprob."""

    def __post_init__(self) -> None:
        check_choice("Correction.type", self.type, (None, *CORRECTIONS))
        check_choice("Correction.of", self.of, ("old", "current"))
        for name, bound in {"cap": self.cap, "floor": self.floor}.items():
            if bound is not None:
                check_number(f"Correction.{name}", bound, "a number >= 0 or None", lambda x: x >= 0)
        if self.floor is not None and self.cap is not None and self.floor > self.cap:
            raise ValueError(
                f"Correction.floor must be at most Correction.cap; got {self.floor} and {self.cap}"
            )
        if self.sampler_logprob is not None:
            check_tensor("Correction.sampler_logprob", self.sampler_logprob, "floating-point")


@dataclass(frozen=True, eq=False)
class EntropyBonus:
    """coef H_t, in nats, subtracted from the loss and aggregated as the loss is.

    H_t is the entropy of the policy being trained, with gradient.
    """

    coef: float | Float[Tensor, ""] = 0.0
    """A number, or a 0-dim tensor, such as one that changes from step to step: it may be on a GPU,
    and gets no gradient. A negative one is a cost of entropy."""
    on: str = "selected"
    """The "selected" tokens: all others stay without a gradient, and the head's backward stays
    sparse. With "all" of the mask every row gets a gradient, and it is dense. Words as denominator
    then count all of the mask for the bonus. A number N as denominator divides the sum over all:
    for a mean over the step's M tokens give coef N / M."""

    def __post_init__(self) -> None:
        check_coefficient("EntropyBonus.coef", self.coef)
        check_choice("EntropyBonus.on", self.on, ON)


@dataclass(frozen=True, eq=False)
class Parallel:
    """What is divided among ranks. Every rank of a group calls, in the same order."""

    group: ProcessGroup | None = None
    """The ranks that hold other tokens, over which DDP or FSDP2 averages gradients. Counts that are
    left to the loss become the mean count per rank. So the average over ranks is the loss, and the
    gradient, of one process. The head's loss selects tokens among those of all ranks."""
    sequence_group: ProcessGroup | None = None
    """Experimental: the ranks that share the sequences. Each holds a part, maybe none, of the
    tokens of the same B sequences in the same order. Counts and sums over a sequence are those of
    whole sequences. The loss is this rank's part of a sum over the ranks, and metrics are of its
    own tokens. For losses over sequences every rank also runs backward."""
    vocab_group: ProcessGroup | None = None
    """Experimental, and the head's alone: the ranks that share the vocabulary, as in
    `linear_logprob_entropy`. Every rank has the whole loss."""

    def __post_init__(self) -> None:
        check_group("Parallel.group", self.group)
        check_group("Parallel.sequence_group", self.sequence_group)
        check_group("Parallel.vocab_group", self.vocab_group)


@dataclass(frozen=True, eq=False)
class Backend:
    """How the head runs and where its gradient goes; as in `linear_logprob_entropy`."""

    impl: str = "auto"
    """"auto", "cpu", "triton", "cuda", "torch" or "reference"."""
    main_grad: Float[Tensor, "V D"] | None = None
    """Backward adds the weight's gradient to this tensor, and gives autograd none."""
    max_active_rows: int | None = None
    """A bound, known to the host, of the tokens that get a gradient, such as ceil(fraction * n).
    With it nothing waits for a GPU. More selected tokens make the loss and the gradients NaN
    there, and are a ValueError on a CPU."""

    def __post_init__(self) -> None:
        check_impl(self.impl)
        if self.main_grad is not None:
            check_tensor("Backend.main_grad", self.main_grad)
        if self.max_active_rows is not None:
            check_whole("Backend.max_active_rows", self.max_active_rows, 0, "an int >= 0 or None")


def _check_number_or_tensor(name: str, x: Any) -> None:
    if isinstance(x, Tensor):
        check_tensor(name, x, "floating-point")
    else:
        check_finite(name, x)
