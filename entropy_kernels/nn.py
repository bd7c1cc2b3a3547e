"""The loss as a module."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .high_entropy_policy_loss import check_options, high_entropy_policy_loss


class HighEntropyPolicyLoss(torch.nn.Module):
    """`high_entropy_policy_loss` with its options fixed.

    Takes that function's keyword options once; `forward` takes its tensors, and any option again
    where it changes from call to call (`selected`, `threshold`, `denominator`, ...). It has no
    parameters: the head's weight is an argument, so a tied or sharded weight stays the model's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_options(options)
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        old_logprob: Tensor | None,
        advantage: Tensor,
        mask: Tensor,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics; see `high_entropy_policy_loss`."""
        return high_entropy_policy_loss(
            hidden, weight, target, old_logprob, advantage, mask, **(self.options | options)
        )

    if TYPE_CHECKING:
        # To type checkers, what torch.nn.Module's returns is Any.
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
