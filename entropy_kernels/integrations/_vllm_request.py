"""What a request to vLLM asks of our logits processor, and what it may not ask with it.

Requests are vLLM's SamplingParams; this module does without vLLM.
"""

from dataclasses import asdict, dataclass
from typing import Any

NAME = "entropy_kernels"
"""The entry of SamplingParams.extra_args that is ours."""
EPSILON = 1e-5
"""vLLM is greedy at lower temperatures."""


@dataclass(frozen=True)
class Asked:
    """Entropies under `key`, and the sets that top-k, top-p and min-p leave, if these cut."""

    key: int | str
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"{NAME}'s top_k must be at least 0; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{NAME}'s top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"{NAME}'s min_p must lie in [0, 1]; got {self.min_p}")

    @property
    def cuts(self) -> bool:
        """Whether anything is to be cut off the vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def plain(self) -> dict[str, int | float | str]:
        """The same for extra_args."""
        return asdict(self)


def asked_by(params: Any) -> Asked | None:
    """What `params` ask; None where they ask nothing.

    Raises:
        ValueError: the entry in extra_args is none of ours; it names what came.
    """
    entry = (params.extra_args or {}).get(NAME)
    if entry is None:
        return None
    types = {"key": (int, str), "top_k": (int,), "top_p": (int, float), "min_p": (int, float)}
    if not (isinstance(entry, dict) and "key" in entry and entry.keys() <= types.keys()):
        raise ValueError(
            f'extra_args["{NAME}"] must have a key, and may have {", ".join(types)}; got {entry!r}'
        )
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, types[name]):
            wanted = " or ".join(x.__name__ for x in types[name])
            raise ValueError(f"{NAME}'s {name} must be {wanted}; got {value!r}")
    return Asked(**entry)


def check_params(params: Any) -> None:
    """Raise ValueError where what vLLM samples from would not be what is recorded."""
    asked = asked_by(params)
    if asked is None:
        return
    if params.n != 1:
        raise ValueError(
            f"requests whose entropies are recorded must have n=1 and a key each; got n={params.n}"
        )
    # All of these change the logits behind our processor, under one runner of vLLM or both.
    wanted: dict[str, int | None] = {"presence_penalty": 0, "frequency_penalty": 0}
    wanted |= {"repetition_penalty": 1, "thinking_token_budget": None}
    if asked.cuts:
        wanted |= {"top_k": 0, "top_p": 1, "min_p": 0}
    for name, value in wanted.items():
        if (got := getattr(params, name, value)) != value:
            why = " and sets are" if asked.cuts and name in ("top_k", "top_p", "min_p") else " are"
            raise ValueError(f"{name} must be {value} where entropies{why} recorded; got {got}")


def temperature_of(params: Any) -> float:
    """The temperature that the entropies of a request have: 1 where it is greedy."""
    return float(params.temperature) if params.temperature >= EPSILON else 1.0
