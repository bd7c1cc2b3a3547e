"""The coefficient of an entropy bonus, from step to step, by the entropy that is measured."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._arguments import check_finite, check_group, check_number, is_number, shown
from .distributed import all_reduce_sum


class EntropyController:
    """Moves the coefficient c of an entropy bonus so that the mean entropy H stays where it should.

    Call `update` once per optimizer step with the entropy of its tokens, in nats. Give `coef` to
    the losses of the next step, as `EntropyBonus(coef)`. With a target number it is the adaptive
    control of Skywork-OR1 (arXiv 2505.22312), as TRL 1.16 has it (`use_adaptive_entropy`):

        c <- min(c + delta, high) where H <= target, else max(c - delta, low)
        applied: c where H <= target, else 0

    Before the first measurement 0 is applied. With a target band (least, most) it is

        c <- min(c + delta, high) where H < least, max(c - delta, low) where H > most, else c

    and c is applied always. With low < 0 a band may also turn the bonus into a cost of entropy,
    which brings an entropy down that has risen above it. c is a sum over steps, so it answers
    late: far bounds with a large delta let the entropy swing about the band.

    Only the state is kept, as Python numbers: `state_dict` goes into a checkpoint.
    """

    def __init__(
        self,
        target: float | tuple[float, float],
        *,
        coef: float = 0.0,
        delta: float = 0.005,
        bounds: tuple[float, float] = (0.0, 1.0),
        group: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            target: the entropy that is held, nats: a number, or a band (least, most).
            coef: the c to begin with, within the bounds.
            delta: what one step adds to c or takes away; TRL's default.
            bounds: (low, high), the least and the largest c; TRL's defaults.
            group: the ranks that hold other tokens. Every rank calls `update`, and all have the
                same coefficient. None: the caller measures over all ranks, or there is one.

        Raises:
            ValueError: a target or band that is not finite, below 0 or out of order; bounds out of
                order; coef outside of them; delta below 0.
        """
        self._is_band = isinstance(target, tuple)
        wanted = "an entropy in nats, or a band (least, most)"
        if not self._is_band:
            check_number("target", target, wanted, lambda x: 0 <= x < math.inf)
        self._band = _pair("target", target if self._is_band else (target, target), wanted)
        if self._band[0] < 0:
            raise ValueError(f"target must be {wanted}, at least 0; got {target}")
        self._low, self._high = _pair("bounds", bounds, "two numbers (low, high)")
        check_finite("coef", coef)
        if not self._low <= coef <= self._high:
            raise ValueError(f"coef must lie within bounds={bounds}; got {coef}")
        check_number("delta", delta, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        check_group("group", group)
        self._coef, self._delta, self._group = float(coef), float(delta), group
        self._entropy: float | None = None

    @property
    def coef(self) -> float:
        """The coefficient to apply in the next step."""
        if self._is_band:
            return self._coef
        applies = self._entropy is not None and self._entropy <= self._band[1]
        return self._coef if applies else 0.0

    @property
    def entropy(self) -> float | None:
        """The entropy that was measured last, nats, over all ranks; None before."""
        return self._entropy

    def update(self, entropy: float | Tensor, tokens: float | Tensor = 1) -> float:
        """Measure, and return `coef` for the next step.

        Args:
            entropy: the mean entropy of a step's tokens, nats: a number or a tensor of one.
            tokens: how many tokens that is the mean of, which weighs the ranks of the group. A rank
                without tokens gives 0, and any entropy. Without tokens on any rank nothing changes.

        Raises:
            ValueError: an entropy that is below 0 or not finite, on this rank or on another one;
                nothing has changed then.
        """
        total, count = self._over_ranks(_number("entropy", entropy), _number("tokens", tokens))
        if math.isnan(count):
            raise ValueError(f"tokens must be a count, at least 0; got {tokens} on this rank")
        if count == 0:
            return self.coef
        mean = total / count
        # Entropies of one word each may be rounded below 0.
        if not -1e-3 <= mean < math.inf:
            raise ValueError(f"entropy must be a mean in nats, finite and at least 0; got {mean}")
        least, most = self._band
        if mean < least or (not self._is_band and mean == least):
            self._coef = min(self._coef + self._delta, self._high)
        elif mean > most:
            self._coef = max(self._coef - self._delta, self._low)
        self._entropy = mean
        return self.coef

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs, for JSON: the c that moves, and the last entropy or None."""
        return {"coef": self._coef, "entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Go on from the `state_dict` of another controller.

        The target, delta and bounds stay this one's. A c outside of these bounds is brought to the
        nearer one.

        Raises:
            ValueError: `state` is no such state; nothing has changed then.
        """
        if not isinstance(state, Mapping) or state.keys() != {"coef", "entropy"}:
            found = (
                f"{shown(state)} of {sorted(state)}" if isinstance(state, dict) else shown(state)
            )
            raise ValueError(f"state must be that of state_dict: coef and entropy; got {found}")
        coef, entropy = state["coef"], state["entropy"]
        check_finite("state: coef", coef)
        if entropy is not None:
            check_finite("state: entropy", entropy)
        assert coef is not None
        self._coef = min(max(float(coef), self._low), self._high)
        self._entropy = None if entropy is None else float(entropy)

    def _over_ranks(self, entropy: float, tokens: float) -> tuple[float, float]:
        """The sum of entropies and the number of tokens of all ranks."""
        if not 0 <= tokens < math.inf:
            tokens = math.nan  # so that every rank raises, and none waits for this one
        total = entropy * tokens if tokens != 0 else 0.0
        if self._group is None:
            return total, tokens
        device = "cuda" if torch.distributed.get_backend(self._group) == "nccl" else "cpu"
        both = torch.tensor([total, tokens], dtype=torch.float64, device=device)
        total, tokens = all_reduce_sum(both, self._group).tolist()
        return total, tokens


def _pair(name: str, values: object, wanted: str) -> tuple[float, float]:
    """Two finite numbers in order."""
    told = f"{shown(values)}, {values}" if isinstance(values, tuple) else shown(values)
    numbers = values if isinstance(values, tuple) else ()
    if len(numbers) != 2 or not all(is_number(x) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} must be {wanted}, finite; got {told}")
    if numbers[0] > numbers[1]:
        raise ValueError(f"{name} must be in order, the lower one first; got {told}")
    return float(numbers[0]), float(numbers[1])


def _number(name: str, x: float | Tensor) -> float:
    """The number that `x` is or holds; a GPU is waited for."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta:
        return float(x.detach())
    if not is_number(x):
        raise ValueError(f"{name} must be one number; got {shown(x)}")
    return float(x)
