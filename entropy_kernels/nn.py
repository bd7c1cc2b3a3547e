"""The loss as a module."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ._loss_options import LossOptions
from .head import Head
from .high_entropy_policy_loss import check_choice_of_tokens, high_entropy_policy_loss
from .options import KL, Aggregation, Backend, Correction, EntropyBonus, Parallel, Selection
from .support import Support

Options = TypeVar("Options", LossOptions, Aggregation, KL, Correction, Backend)


class HighEntropyPolicyLoss(torch.nn.Module):
    """`high_entropy_policy_loss` with its options fixed.

    It takes that function's options once. `forward` takes its tensors, and what else changes from
    call to call. It has no parameters: the head's weight is an argument, so a tied or sharded
    weight stays the model's.
    """

    def __init__(
        self,
        *,
        fraction: float = 0.2,
        selection: Selection = Selection(),
        loss_type: str | Callable[..., Tensor] = "dapo",
        clip_low: float | Tensor | None = None,
        clip_high: float | Tensor | None = None,
        dual_clip: float | None = None,
        denominator: str | float | Tensor = "selected",
        aggregation: Aggregation = Aggregation(),
        kl: KL = KL(),
        correction: Correction = Correction(),
        entropy_bonus: EntropyBonus = EntropyBonus(),
        parallel: Parallel = Parallel(),
        backend: Backend = Backend(),
    ) -> None:
        super().__init__()
        self.fraction, self.selection, self.backend = fraction, selection, backend
        self.loss = LossOptions(
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
        check_choice_of_tokens(fraction, None, None, selection, backend, self.loss)

    def forward(
        self,
        head: Head,
        old_logprob: Tensor | None,
        advantage: Tensor,
        mask: Tensor,
        *,
        selected: Tensor | None = None,
        threshold: float | Tensor | None = None,
        lengths: Tensor | None = None,
        support: Support | None = None,
        denominator: str | float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        token_weight: Tensor | None = None,
        reference_logprob: Tensor | None = None,
        sampler_logprob: Tensor | None = None,
        main_grad: Tensor | None = None,
        max_active_rows: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics; see `high_entropy_policy_loss`.

        denominator and each parameter below it replaces the fixed option of its name, unless it is
        None. `Aggregation`, `KL`, `Correction` and `Backend` hold these options.
        """
        loss = self.loss
        loss = _with(
            loss,
            denominator=denominator,
            aggregation=_with(
                loss.aggregation, num_sequences=num_sequences, token_weight=token_weight
            ),
            kl=_with(loss.kl, reference_logprob=reference_logprob),
            correction=_with(loss.correction, sampler_logprob=sampler_logprob),
        )
        return high_entropy_policy_loss(
            head,
            old_logprob,
            advantage,
            mask,
            fraction=self.fraction,
            selected=selected,
            threshold=threshold,
            selection=self.selection,
            lengths=lengths,
            support=support,
            backend=_with(self.backend, main_grad=main_grad, max_active_rows=max_active_rows),
            **vars(loss),
        )

    if TYPE_CHECKING:
        # To type checkers, what torch.nn.Module's returns is Any.
        __call__ = forward

    def extra_repr(self) -> str:
        """The options that are fixed."""
        return f"fraction={self.fraction!r}, selection={self.selection!r}, loss={self.loss!r}"


def _with(options: Options, **given: Any) -> Options:
    """The options with those that are given, which are not None."""
    return replace(options, **{name: x for name, x in given.items() if x is not None})
